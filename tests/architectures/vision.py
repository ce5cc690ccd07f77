"""Vision: transformers, and networks of stages, most of which convolve."""

import torch
from building import BATCH, CLASSES, Table, classes, rows

SIZE = 32
COMMON = dict(
    image_size=SIZE, num_channels=3, num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    drop_path_rate=0.0, classifier_dropout_prob=0.0, dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
LAYERS = dict(patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
TRANSFORMERS: Table = {
    "deit": dict(architectures=["DeiTForImageClassification"]), "dinov2": {}, "dinov2_with_registers": {},
    "beit": dict(use_relative_position_bias=True), "data2vec-vision": {}, "vit_msn": {}, "ijepa": {},
}  # fmt: skip
STAGES = dict(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2)
WINDOWS = dict(embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2, patch_size=4)
PYRAMID = dict(
    hidden_sizes=[16, 32], depths=[1, 1], num_encoder_blocks=2, patch_sizes=[7, 3], strides=[4, 2],
    num_attention_heads=[1, 2], mlp_ratios=[2, 2],
)  # fmt: skip
STAGED: Table = {
    "swin": WINDOWS, "swinv2": WINDOWS,
    "focalnet": dict(embed_dim=16, depths=[1, 1], patch_size=4, focal_levels=[2, 2], focal_windows=[3, 3]),
    "hiera": dict(
        image_size=[SIZE, SIZE], embed_dim=16, depths=[1, 1], num_heads=[1, 2], masked_unit_size=[4, 4],
        query_stride=[2, 2], num_query_pool=1,
    ),
    "convnext": dict(STAGES, patch_size=4), "convnextv2": dict(STAGES, patch_size=4),
    "resnet": dict(STAGES, embedding_size=16), "regnet": dict(STAGES, embedding_size=16, groups_width=8),
    "bit": dict(STAGES, embedding_size=16, num_groups=4),
    "mobilenet_v1": dict(depth_multiplier=0.25), "mobilenet_v2": dict(depth_multiplier=0.25, finegrained_output=False),
    "efficientnet": dict(
        width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320, dropout_rate=0.0, drop_connect_rate=0.0
    ),
    "mobilevit": dict(
        hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 32], expand_ratio=2.0, patch_size=2,
        num_attention_heads=2,
    ),
    "mobilevitv2": dict(
        image_size=64, patch_size=2, width_multiplier=0.25, ffn_dropout=0.0, base_attn_unit_dims=[16, 16, 16]
    ),
    "poolformer": dict(PYRAMID, padding=[2, 1]),
    "segformer": dict(PYRAMID, sr_ratios=[2, 1]), "pvt_v2": dict(PYRAMID, sr_ratios=[2, 1]),
    "pvt": dict(PYRAMID, patch_sizes=[4, 2], sequence_reduction_ratios=[2, 1]),
    "levit": dict(
        hidden_sizes=[16, 32, 32], num_attention_heads=[1, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8],
        attention_ratio=[2, 2, 2], mlp_ratio=[2, 2, 2], image_size=64, drop_path_rate=0,
        architectures=["LevitForImageClassification"],
    ),
    "swiftformer": dict(embed_dims=[16, 32], depths=[1, 1], downsamples=[True, True]),
}  # fmt: skip
SIZES = {"mobilevitv2": 64, "levit": 64}


def _inputs(family):
    size = SIZES.get(family, SIZE)
    return {"pixel_values": torch.randn(BATCH, 3, size, size), "labels": classes()}


KIND = "AutoModelForImageClassification"
BUILDERS = rows(KIND, TRANSFORMERS, COMMON | LAYERS, _inputs) | rows(KIND, STAGED, COMMON, _inputs)
