"""The activations that have derivative codes: f and f', by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

aten = torch.ops.aten
SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805


class Activation(NamedTuple):
    """f, and f' by torch's own backward; both of x, elementwise, in x's dtype."""

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


ACTIVATIONS = {
    "gelu": Activation(F.gelu, lambda x: aten.gelu_backward(torch.ones_like(x), x)),
    "gelu_tanh": Activation(
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: aten.gelu_backward(torch.ones_like(x), x, approximate="tanh"),
    ),
    "silu": Activation(F.silu, lambda x: aten.silu_backward(torch.ones_like(x), x)),
    "mish": Activation(F.mish, lambda x: aten.mish_backward(torch.ones_like(x), x)),
    "softplus": Activation(F.softplus, lambda x: aten.softplus_backward(torch.ones_like(x), x, 1, 20)),
    "elu": Activation(F.elu, lambda x: aten.elu_backward(torch.ones_like(x), 1, 1, 1, False, x)),
    "selu": Activation(F.selu, lambda x: aten.elu_backward(torch.ones_like(x), SELU_ALPHA, SELU_SCALE, 1, False, x)),
    "hardswish": Activation(F.hardswish, lambda x: aten.hardswish_backward(torch.ones_like(x), x)),
    "tanh": Activation(torch.tanh, lambda x: aten.tanh_backward(torch.ones_like(x), x.tanh())),
    "sigmoid": Activation(torch.sigmoid, lambda x: aten.sigmoid_backward(torch.ones_like(x), x.sigmoid())),
}
