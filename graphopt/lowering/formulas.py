"""The arithmetic that rewritten graphs are made of, in plain torch: traced into a graph, and run as the reference.

Statistics and sums are kept in the compute dtype: float32 for half precision, otherwise the input's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 16  # values in one packed word
WORDS = {1: torch.int16, 2: torch.int32}  # bits a value -> dtype of a word


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def norm(
    x: Tensor, ndim: int, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool, z_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """y, z, rstd of LayerNorm (centred) or RMSNorm over the last `ndim` dims.

    z = (x - mean) * rstd, y = weight * z + bias. y has x's dtype and is computed before z is rounded to `z_dtype`;
    rstd is in the compute dtype, dims kept.
    """
    dims = tuple(range(-ndim, 0))
    h = x.to(compute_dtype(x.dtype)).contiguous()  # torch's norms answer a contiguous output, whatever x is
    if centred:
        variance, mean = torch.var_mean(h, dims, correction=0, keepdim=True)
        h = h - mean
    else:
        variance = (h * h).mean(dims, keepdim=True)
    rstd = torch.rsqrt(variance + eps)
    z = h * rstd
    return affine(z, weight, bias, x.dtype), z.to(z_dtype), rstd


def affine(z: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """weight * z + bias in the compute dtype, rounded once to `dtype`."""
    y = z.to(compute_dtype(z.dtype))
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(dtype)


def norm_backward(
    grad: Tensor, z: Tensor, rstd: Tensor, weight: Tensor | None, ndim: int, centred: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (in `dtype`), weight and bias (in weight's dtype) from z alone (MS-BP, LowMemoryBP section 4).

    With dz = weight * grad:
    dx = rstd * (dz - mean(dz) - z * mean(dz * z)),  dweight = sum(grad * z),  dbias = sum(grad).
    """
    inner, outer = tuple(range(-ndim, 0)), tuple(range(grad.dim() - ndim))
    dy, z = grad.to(rstd.dtype).contiguous(), z.to(rstd.dtype)
    dz = dy if weight is None else dy * weight
    dx = dz - z * (dz * z).mean(inner, keepdim=True)
    if centred:
        dx = dx - dz.mean(inner, keepdim=True)
    parameter = dtype if weight is None else weight.dtype
    dweight, dbias = dy * z, dy
    if outer:
        dweight, dbias = dweight.sum(outer), dbias.sum(outer)
    return (dx * rstd).to(dtype), dweight.to(parameter), dbias.to(parameter)


def pack(values: Tensor, bits: int) -> Tensor:
    """bool or int32 of any shape, each below 2^bits -> words [ceil(numel / 16)] of 16 values each, bits 1 or 2.

    Value i lies at bit bits * (i % 16) of word i // 16, in row-major order. A sum of shifted values, not slices or-ed
    together: Inductor fuses a small reduction into the values' producer, and those of one length with each other.
    """
    flat = values.reshape(-1).to(torch.int32)
    padded = torch.nn.functional.pad(flat, (0, -flat.shape[0] % WORD)).view(-1, WORD)
    words = (padded << _shifts(bits, values.device)).sum(-1, dtype=torch.int32)
    if bits == 1:  # as a signed number of 16 bits, so that nothing overflows
        words = (words ^ 0x8000) - 0x8000
    return words.to(WORDS[bits])


def unpack(words: Tensor, shape: list[int], bits: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `pack`: words [ceil(numel / 16)] -> values of `shape` in `dtype`."""
    values = (words.to(torch.int32).unsqueeze(-1) >> _shifts(bits, words.device)) & ((1 << bits) - 1)
    numel = 1
    for size in shape:
        numel = numel * size
    return values.view(-1)[:numel].view(shape).to(dtype)


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, WORD * bits, bits, dtype=torch.int32, device=device)
