"""The arithmetic that rewritten graphs are made of, in plain torch: traced into a graph, and run as the reference.

Statistics and sums are kept in the compute dtype: float32 for half precision, otherwise the input's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32  # bits in one packed word


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


def pack(mask: Tensor) -> Tensor:
    """bool of any shape -> int32[ceil(numel / 32)]: element i is bit i % 32 of word i // 32.

    A sum of shifted bits, not slices or-ed together: Inductor fuses a small reduction into the mask's producer.
    """
    bits = mask.reshape(-1)
    bits = torch.nn.functional.pad(bits.to(torch.int32), (0, -bits.shape[0] % WORD)).view(-1, WORD)
    return (bits << torch.arange(WORD, dtype=torch.int32, device=mask.device)).sum(-1, dtype=torch.int32)


def unpack(words: Tensor, shape: list[int]) -> Tensor:
    """The inverse of `pack`: int32[ceil(numel / 32)] -> bool of `shape`."""
    bits = (words.unsqueeze(-1) >> torch.arange(WORD, dtype=torch.int32, device=words.device)) & 1
    numel = 1
    for size in shape:
        numel = numel * size
    return bits.view(-1)[:numel].view(shape).to(torch.bool)
