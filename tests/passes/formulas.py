"""Norms and activations written out as users write them, and the op that canonicalize makes of each."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import activations
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

D = 8


class Formula(nn.Module):
    """A formula of x, and of a weight and a bias where it takes them."""

    def __init__(self, formula: Callable[..., Tensor], parameters: int = 0) -> None:
        super().__init__()
        self.formula = formula
        self.parts = nn.ParameterList(nn.Parameter(torch.ones(D)) for _ in range(parameters))

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, *list(self.parts))  # without the list Dynamo of torch 2.11 gives up


def mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def layer_norm_mean(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    m = x.mean(-1, keepdim=True)
    v = (x - m).pow(2).mean(dim=-1, keepdim=True)
    return w * (x - m) / torch.sqrt(v + 1e-5) + b


def layer_norm_var(x: Tensor, w: Tensor) -> Tensor:
    v = x.var(dim=[-1], unbiased=False, keepdim=True)
    return w * ((x - torch.mean(x, -1, True)) * torch.rsqrt(v + 1e-5))


def layer_norm_plain(x: Tensor) -> Tensor:
    return (x - mean(x)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()


def layer_norm_float(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    h = x.float()
    centred = h - mean(h)
    return (b + centred * (mean(centred * centred) + 1e-5) ** -0.5 * w).type_as(x)


def tanh_gelu_distributed(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608 * x + 0.044715 * 0.7978845608 * x * x * x))


def rms_mean_dtype(x: Tensor, w: Tensor) -> Tensor:
    variance = x.float().pow(2).mean(-1, keepdim=True, dtype=torch.float32)
    return w * (x * torch.rsqrt(variance + 1e-6)).type_as(x)


def t5_layer_norm() -> nn.Module:
    return T5LayerNorm(D)


NORMS = [
    ("LlamaRMSNorm", lambda: LlamaRMSNorm(D), "rms_norm.default"),
    ("Qwen3RMSNorm", lambda: Qwen3RMSNorm(D), "rms_norm.default"),
    ("Gemma3RMSNorm", lambda: Gemma3RMSNorm(D), "rms_norm.default"),
    ("T5LayerNorm", t5_layer_norm, "rms_norm.default"),
    ("nn.RMSNorm", lambda: nn.RMSNorm(D), "rms_norm.default"),
    ("nn.RMSNorm eps", lambda: nn.RMSNorm(D, eps=1e-3), "rms_norm.default"),
    ("F.rms_norm", lambda: Formula(lambda x: F.rms_norm(x, (D,))), "rms_norm.default"),
    ("rms sqrt", lambda: Formula(lambda x: x / torch.sqrt(mean(x.square()) + 1e-6)), "rms_norm.default"),
    ("rms mean dtype", lambda: Formula(rms_mean_dtype, 1), "rms_norm.default"),
    ("rms power", lambda: Formula(lambda x, w: w * x * (mean(x * x) + 1e-6) ** -0.5, 1), "rms_norm.default"),
    ("layer norm mean", lambda: Formula(layer_norm_mean, 2), "layer_norm"),
    ("layer norm var", lambda: Formula(layer_norm_var, 1), "layer_norm"),
    ("layer norm float", lambda: Formula(layer_norm_float, 2), "layer_norm"),
    ("layer norm plain", lambda: Formula(layer_norm_plain), "layer_norm"),
]  # fmt: skip
ACTIVATIONS = [
    ("NewGELUActivation", activations.NewGELUActivation, "gelu"),
    ("FastGELUActivation", activations.FastGELUActivation, "gelu"),
    ("AccurateGELUActivation", activations.AccurateGELUActivation, "gelu"),
    ("GELUTanh", lambda: activations.GELUTanh(use_gelu_tanh_python=True), "gelu"),
    ("GELUActivation", lambda: activations.GELUActivation(use_gelu_python=True), "gelu"),
    ("tanh distributed", lambda: Formula(tanh_gelu_distributed), "gelu"),
    ("QuickGELUActivation", activations.QuickGELUActivation, "silu"),
    ("x * sigmoid(x)", lambda: Formula(lambda x: torch.sigmoid(x) * x), "silu"),
    ("x / (1 + exp(-x))", lambda: Formula(lambda x: x / (1 + torch.exp(-x))), "silu"),
]
MATHS = {"pow", "square", "mean", "var", "rsqrt", "sqrt", "tanh", "erf", "sigmoid", "exp"}


def prepared(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    module = make()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.to(dtype)


def rounding(dtype: torch.dtype, times: int, exact: Tensor) -> float:
    """How far a result may be from `exact`: `times` roundings to dtype, and those of an op that works in float32."""
    # float32: at most 8 + 6 additions (width, rows) and 18 operations, on terms below 1 + max |result|
    roundings = times * torch.finfo(dtype).eps / 2 + 32 * torch.finfo(torch.float32).eps / 2
    return roundings * (1 + exact.abs().max().item())
