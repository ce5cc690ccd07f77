"""One training step of models of timm, as of other architectures."""

import pytest
import torch
from building import BATCH, CLASSES, classes, trained
from checks import check_step
from torch import nn

timm = pytest.importorskip("timm", exc_type=ImportError)  # without torchvision it cannot be imported

MODELS = {
    "test_convnext": {}, "test_efficientnet": {}, "test_resnet": dict(norm_layer="groupnorm1"), "test_mambaout": {},
    "test_nfnet": {}, "mobilenetv3_small_050": {},
    "swin_tiny_patch4_window7_224": dict(img_size=32, embed_dim=16, depths=(1, 1), num_heads=(2, 2), window_size=4),
}  # fmt: skip


class Loss(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.model = timm.create_model(name, num_classes=CLASSES, drop_path_rate=0.0, drop_rate=0.0, **MODELS[name])

    def forward(self, x, labels):
        return nn.functional.cross_entropy(self.model(x), labels)


@pytest.mark.parametrize("name", MODELS)
def test_one_step_is_eagers_and_saves_no_more_than_stock(name):
    check_step(trained(lambda: (Loss(name), {"x": torch.randn(BATCH, 3, 32, 32), "labels": classes()})))
