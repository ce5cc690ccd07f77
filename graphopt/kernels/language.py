"""Triton, or what stands in for it where it is not installed: kernels are then plain functions that nothing calls."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

INSTALLED = find_spec("triton") is not None
# what kernels read and write; they compute in float32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

if TYPE_CHECKING:
    triton: Any
    tl: Any
elif INSTALLED:
    import triton
    import triton.language as tl
else:
    triton = tl = None


def jit(function: Any) -> Any:
    return triton.jit(function) if INSTALLED else function


def constexpr(value: Any) -> Any:
    """A constant of a module that its kernels may read."""
    return tl.constexpr(value) if INSTALLED else value
