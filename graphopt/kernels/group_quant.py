# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, var-annotated"
"""Saved tensors in 8, 4 or 2 bits: groups of consecutive values under one scale.

encode   q = round(y) or floor(y + u),  y = (x - low) / step + centre
decode   x_ = (q - centre) * step + low  or  (q + 1/2 - u - centre) * step + low

x, x_: any shape, read in row-major order; codes: uint8[groups, group * bits / 8]; what a group keeps: bfloat16
[groups, 1], its scale if symmetric, otherwise its lowest value and the step; seed: int64, one element, for the noise u.
Arithmetic and layout are those of `graphopt.lowering.group_quant` in eager mode, bit by bit; what one encodes the other
decodes. Three things are left open there, and here: the codes of a group with inf or NaN, the lowest value of one with
NaN, and the sign of a lowest value of zero.

A program reads its groups once and keeps them in registers: for each code of a byte a tile of groups x bytes. Products
are not fused with sums (`enable_fp_fusion`), for in eager mode they are rounded first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from graphopt.kernels.language import DTYPES, INSTALLED, constexpr, jit, tl, triton
from graphopt.lowering import group_quant

BITS = (8, 4, 2)
GROUPS = tuple(8 << i for i in range(8))

LIMIT, TINY, ROUNDS = constexpr(group_quant.LIMIT), constexpr(group_quant.TINY), constexpr(group_quant.ROUNDS)


def reference_encode(x: Tensor, bits: int, group: int, symmetric: bool, seed: Tensor | None = None) -> list[Tensor]:
    """Codes and what the groups keep; dithered by `seed`, to nearest without."""
    return list(group_quant.encode(x, bits, group, symmetric, None if seed is None else seed.reshape(())))


def reference_decode(
    codes: Tensor, kept: Sequence[Tensor], seed: Tensor | None, bits: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """x_ of `shape` in `dtype`, row-major."""
    return group_quant.decode(codes, kept, None if seed is None else seed.reshape(()), bits, shape, dtype)


def supports(dtype: torch.dtype, groups: int) -> bool:
    # groups are hashed by an index of int32
    return INSTALLED and dtype in DTYPES and groups < 2**31


class Blocks(NamedTuple):
    """How a kernel is launched: a tile of rows (groups) x width (their bytes) to a program, warps to a program."""

    rows: int
    width: int
    warps: int


def blocks(bits: int, group: int, dtype: torch.dtype) -> Blocks:
    # for each code of a byte a thread loads, or stores, 16 bytes of x at once, and so needs 8 or 4 bytes of codes
    width = group * bits // 8
    return Blocks(rows=1024 // width, width=width, warps=2 * dtype.itemsize)


def constants(bits: int, group: int, symmetric: bool, dithered: bool) -> dict[str, int | float]:
    """The arithmetic of one codec, for either kernel.

    FACTOR makes a step of a scale, or of a range; STRIDE is the golden ratio in units of 2^-23, a multiple of `group`.
    """
    last, margin = 2**bits - 1, group_quant.MARGIN if dithered else 0.0
    if not symmetric:
        centre, factor = margin, 1 / (last - 2 * margin)
    elif dithered:
        centre, factor = last / 2, 1 / (last / 2 - margin)
    else:
        centre = 127.0 if bits == 8 else 2.0 ** (bits - 1)
        factor = 1 / centre
    stride = round(group_quant.GOLDEN_RATIO * 2**23 / group) * group
    return {"GROUP": group, "BITS": bits, "CENTRE": centre, "FACTOR": factor, "STRIDE": stride}


@jit
def _ordered(x, ORDER: tl.constexpr):
    # whole numbers in the order of x; NaN is at one of the ends. The order of values is its own inverse
    pattern = x.to(tl.int32, bitcast=True)
    if ORDER == "values":
        ordered = pattern ^ ((pattern >> 31) & 0x7FFFFFFF)
    elif ORDER == "magnitudes":
        ordered = pattern & 0x7FFFFFFF
    else:
        tl.static_assert(ORDER == "magnitudes and signs")
        pattern = x.to(tl.uint32, bitcast=True)
        ordered = (pattern << 1) | (pattern >> 31)
    return ordered


@jit
def _highest(planes, ORDER: tl.constexpr):
    found = _ordered(planes[0], ORDER)
    for plane in tl.static_range(1, len(planes)):
        found = tl.maximum(found, _ordered(planes[plane], ORDER))
    return tl.max(found, axis=1)


@jit
def _lowest(planes, ORDER: tl.constexpr):
    found = _ordered(planes[0], ORDER)
    for plane in tl.static_range(1, len(planes)):
        found = tl.minimum(found, _ordered(planes[plane], ORDER))
    return tl.min(found, axis=1)


@jit
def _round_up(value):
    # to the next bfloat16; finite for inf
    pattern = tl.minimum(value.to(tl.int32, bitcast=True), 0x7F7F0000)
    return (tl.where(pattern < 0, pattern, pattern + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True)


@jit
def _scale(magnitude):
    magnitude = magnitude.to(tl.float32, bitcast=True)
    return tl.where(magnitude < TINY, 0.0, tl.where(magnitude <= LIMIT, _round_up(magnitude), float("nan")))


@jit
def _to_bfloat16(value):
    # by its bits, as it has no more of them: Triton's interpreter has no bfloat16 below the normal ones
    return (value.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@jit
def _from_bfloat16(value):
    return (value.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)


@jit
def _start(seed_ptr, group, GROUP: tl.constexpr):
    # a Feistel network over the group's number; where its noise begins, in units of 2^-23
    seed = tl.load(seed_ptr)
    index = group.to(tl.int32)
    left, right = (index >> 16) & 0xFFFF, index & 0xFFFF
    for i in tl.static_range(4):
        key = ((seed >> (16 * i)) & 0xFFFF).to(tl.int32)
        product = (right ^ key) * ROUNDS[i]
        left, right = right, (left ^ product ^ (product >> 13)) & 0xFFFF
    return (((left << 8) ^ right) & (2**23 // GROUP - 1)) * GROUP


@jit
def _turn(start, place, STRIDE: tl.constexpr):
    # 23 bits as the fraction of a number in [1, 2); what overflows is whole turns
    return (((start + place * STRIDE) & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0


@jit
def encode_kernel(
    x_ptr, codes_ptr, scale_ptr, low_ptr, seed_ptr, numel,
    GROUP: tl.constexpr, BITS: tl.constexpr, CENTRE: tl.constexpr, FACTOR: tl.constexpr, STRIDE: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = group[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    planes = ()
    for plane in tl.static_range(8 // BITS):
        at = row * GROUP + plane * WIDTH + column
        planes += (tl.load(x_ptr + at, mask=at < numel, other=0).to(tl.float32),)
    inside = group * GROUP < numel
    LAST: tl.constexpr = 2**BITS - 1
    SIGNED: tl.constexpr = low_ptr is None and seed_ptr is None and BITS < 8
    if SIGNED:
        # minus the largest magnitude where no negative value has it
        top = _highest(planes, "magnitudes and signs")
        scale = _scale(top >> 1)
        scale = tl.where((top > 0) & ((top & 1) == 0), -scale, scale)
        step = scale * FACTOR
    elif low_ptr is None:
        scale = _scale(_highest(planes, "magnitudes"))
        step = scale * FACTOR
    else:
        lowest = _ordered(_lowest(planes, "values"), "values").to(tl.float32, bitcast=True)
        highest = _ordered(_highest(planes, "values"), "values").to(tl.float32, bitcast=True)
        low = -_round_up(-lowest)
        extent = tl.where(lowest == lowest, highest - lowest, lowest)
        # of a group at the lower end of float32, low is no number of bfloat16 but the least
        scale = _round_up(tl.maximum(highest - low, 0.0) * FACTOR)
        scale = tl.where(extent <= LIMIT, scale, float("nan"))
        step = scale
        tl.store(low_ptr + group, _to_bfloat16(low), mask=inside)
    tl.store(scale_ptr + group, _to_bfloat16(scale), mask=inside)
    inverse = tl.where(tl.abs(step) < 2.0**-126, 0.0, tl.div_rn(1.0, step))
    packed = tl.zeros((ROWS, WIDTH), tl.int32)
    if seed_ptr is not None:
        start = _start(seed_ptr, group, GROUP)[:, None]
    for plane in tl.static_range(8 // BITS):
        y = planes[plane]
        if low_ptr is not None:
            y = y - low[:, None]
        y = y * inverse[:, None]
        if seed_ptr is None:
            y = y + CENTRE
            if SIGNED:
                y = tl.minimum(y, LAST)
            # 1.5 * 2^23 leaves no bits for a fraction: y is rounded to even, and is the lowest bits
            code = (y + 12582912.0).to(tl.int32, bitcast=True) & LAST
        else:
            # no negative number, of which the whole part is the floor
            turn = _turn(start, plane * WIDTH + column, STRIDE)
            code = (y + turn + (CENTRE + GROUP * 2.0**-24)).to(tl.int32)
        packed += code << (BITS * plane)
    tl.store(codes_ptr + row * WIDTH + column, packed.to(tl.uint8), mask=inside[:, None])


@jit
def decode_kernel(
    codes_ptr, scale_ptr, low_ptr, seed_ptr, x_ptr, numel,
    GROUP: tl.constexpr, BITS: tl.constexpr, CENTRE: tl.constexpr, FACTOR: tl.constexpr, STRIDE: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = group[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = group * GROUP < numel
    packed = tl.load(codes_ptr + row * WIDTH + column, mask=inside[:, None], other=0).to(tl.int32)
    # loaded with a dim for the width, a scale would be loaded once for each code of a thread
    step = _from_bfloat16(tl.load(scale_ptr + group, mask=inside, other=0))[:, None]
    if low_ptr is None:
        step = step * FACTOR
    else:
        low = _from_bfloat16(tl.load(low_ptr + group, mask=inside, other=0))[:, None]
    if seed_ptr is not None:
        start = _start(seed_ptr, group, GROUP)[:, None]
    for plane in tl.static_range(8 // BITS):
        # the lowest bits of a number past 2^23
        code = (packed >> (BITS * plane)) & (2**BITS - 1)
        number = (code | 0x4B000000).to(tl.float32, bitcast=True)
        if seed_ptr is None:
            y = number - (8388608.0 + CENTRE)
        else:
            turn = _turn(start, plane * WIDTH + column, STRIDE)
            y = number - 8388608.0 - turn + (0.5 - GROUP * 2.0**-24 - CENTRE)
        y = y * step
        if low_ptr is not None:
            y = y + low
        if x_ptr.dtype.element_ty == tl.float16:
            y = tl.maximum(y, -65504.0, propagate_nan=tl.PropagateNan.ALL)
            y = tl.minimum(y, 65504.0, propagate_nan=tl.PropagateNan.ALL)
        at = row * GROUP + plane * WIDTH + column
        tl.store(x_ptr + at, y.to(x_ptr.dtype.element_ty), mask=at < numel)


def encode(x: Tensor, bits: int, group: int, symmetric: bool, seed: Tensor | None = None) -> list[Tensor]:
    """As `reference_encode`."""
    x = x.contiguous()
    codes, *kept = parts = empty_encode(x, bits, group, symmetric)
    if x.numel():
        launched = blocks(bits, group, x.dtype)
        with torch.cuda.device_of(x):
            encode_kernel[(triton.cdiv(codes.shape[0], launched.rows),)](
                x, codes, kept[-1], None if symmetric else kept[0], seed, x.numel(),
                **constants(bits, group, symmetric, seed is not None), ROWS=launched.rows, WIDTH=launched.width,
                num_warps=launched.warps, enable_fp_fusion=False,
            )  # fmt: skip
    return parts


def decode(
    codes: Tensor, kept: Sequence[Tensor], seed: Tensor | None, bits: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """As `reference_decode`."""
    codes, kept = codes.contiguous(), [each.contiguous() for each in kept]
    x, group, symmetric = codes.new_empty(shape, dtype=dtype), codes.shape[1] * 8 // bits, len(kept) == 1
    if x.numel():
        launched = blocks(bits, group, x.dtype)
        with torch.cuda.device_of(x):
            decode_kernel[(triton.cdiv(codes.shape[0], launched.rows),)](
                codes, kept[-1], None if symmetric else kept[0], seed, x, x.numel(),
                **constants(bits, group, symmetric, seed is not None), ROWS=launched.rows, WIDTH=launched.width,
                num_warps=launched.warps, enable_fp_fusion=False,
            )  # fmt: skip
    return x


def empty_encode(x: Tensor, bits: int, group: int, symmetric: bool) -> list[Tensor]:
    """What `encode` makes of `x`, not yet written."""
    groups = (x.numel() + group - 1) // group
    codes = x.new_empty((groups, group * bits // 8), dtype=torch.uint8)
    return [codes, *(x.new_empty((groups, 1), dtype=torch.bfloat16) for _ in range(1 if symmetric else 2))]
