"""Ways to train that change the model or its forward: save_on_cpu, Liger-Kernel, transformers' own checkpointing."""

import importlib.util
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama

from graphopt.demo.models import WithLoss

OFFLOAD, LIGER = "save_on_cpu", "liger"


class Offloaded:
    """A forward whose saved tensors, parameters among them, move to the host's memory, as save_on_cpu does it.

    Its hook is the innermost, so one around it sees nothing saved; `host_bytes` is what moved in the last call.
    """

    def __init__(self, forward: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.forward, self.host_bytes = forward, 0

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.host_bytes = 0
        hooks = save_on_cpu(pin_memory=x.is_cuda)
        move = hooks.pack_hook

        def counted(saved: Tensor) -> Any:
            self.host_bytes += saved.nbytes
            return move(saved)

        hooks.pack_hook = counted
        with hooks:
            return self.forward(x, y)


class Liger(WithLoss):
    """A Llama with Liger's norms, SwiGLU, rotary embedding, and its cross entropy that makes no logits; eager."""

    def __init__(self, model: nn.Module, autocast: bool) -> None:
        if not isinstance(base_of(model), LlamaForCausalLM):
            raise TypeError("of the families here, Liger-Kernel has Llama alone")
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, apply_liger_kernel_to_llama
        from liger_kernel.transformers.rope import liger_rotary_pos_emb

        super().__init__(model, autocast)
        self.loss, self.rotary = LigerFusedLinearCrossEntropyLoss(), liger_rotary_pos_emb
        names = "LlamaRMSNorm", "LlamaMLP"
        # Liger replaces the classes of the module too, and other methods build theirs of them
        with mock.patch.multiple(modeling_llama, **{name: getattr(modeling_llama, name) for name in names}):
            apply_liger_kernel_to_llama(rope=False, fused_linear_cross_entropy=False, model=base_of(model))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        base = base_of(self.model)
        with (
            mock.patch.object(modeling_llama, "apply_rotary_pos_emb", self.rotary),
            torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast),
        ):
            hidden = base.model(x).last_hidden_state
            return self.loss(base.lm_head.weight, hidden.flatten(0, 1), y.flatten())


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model, without the adapters' wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def checkpointed(model: nn.Module) -> nn.Module:
    """The model, each block of which now keeps its input alone, by transformers' own means."""
    base = base_of(model)
    base.config.use_cache = False  # with it a warning is logged, which no graph can hold
    base.activation_checkpointing_enable({"use_reentrant": False})
    base.disable_input_require_grads()  # only reentrant checkpointing needs what is enabled for adapters
    return model


def missing(method: str, device: torch.device, family: str | None = None) -> str | None:
    """Why a method cannot be measured here, or of this family, None if it can."""
    if method == LIGER and family not in (None, "llama"):
        return "of the families here, Liger-Kernel has Llama alone"
    if method == OFFLOAD and device.type == "cpu":
        return "it moves to the host's memory what is there already: it needs a GPU"
    if method == LIGER and (device.type != "cuda" or importlib.util.find_spec("liger_kernel") is None):
        return "it needs a GPU and the package liger-kernel"
    return None
