"""Saved tensors in few bits: groups of consecutive values under one scale, in plain torch, to be traced into a graph.

    nearest    q = round(y),      x_ = (q - centre) * step + low         y = (x - low) / step + centre
    dithered   q = floor(y + u),  x_ = (q + 1/2 - u - centre) * step + low,   u uniform in [0, 1)

Symmetric, a group keeps its largest magnitude, and low is 0. To nearest in 4 and 2 bits that is signed: minus the value
of largest magnitude, which so has code 0 whichever its sign is; zero is a level too, and no code is left over (Q4_0 of
llama.cpp). Asymmetric, a group keeps its lowest value and the step. Dithered, decode makes the same u anew from a seed,
so that the error is uniform in half a step each way, whatever x is: unbiased, at half the variance of stochastic
rounding (subtractive dither: Schuchman 1964; Gray and Stockham 1993).

Hashed codes have levels and decode of those to nearest, and q = floor(y + u), u being made from the bits of the group's
scale: stochastic rounding, unbiased too. Its variance is y (1 - y) for y in [0, 1], of a step: nothing for zero, and
less than that of subtractive dither below a tenth.

Written for what Inductor makes of it. Scales are rounded by their bits: it elides a cast to bfloat16 and back within a
kernel, and encode would then use another scale than decode. Its C++ has no vectors of int16, so that scales are made
one by one between the two loops over their group; made 16 at a time, they would take two passes over memory. Codes are
packed, and noise is made, in floats: it is slow on vectors of integers. Of a group's n bytes, byte j has codes j, j +
n, ...: slices of a group are read whole.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = torch.finfo(FLOAT8).max
LIMIT = torch.finfo(torch.bfloat16).max / 2  # past it a decoded value could overflow float32
TINY = 2.0**-118  # below it one over a step could
NAN = 0x7FC0  # the bits of a NaN of bfloat16
MARGIN = 2.0**-10  # of a step, left free at either end of the levels: rounding errors cannot carry a code past them

ROUNDS = (0x6A5D, 0x5BD1, 0x7A35, 0x4E6D)  # odd, of 15 bits: one of them times 16 bits stays below 2^31
GOLDEN_RATIO = 0.6180339887498949


def encode(
    x: Tensor, bits: int, group: int, symmetric: bool, seed: Tensor | None, hashed: bool = False
) -> tuple[Tensor, ...]:
    """Codes, uint8 [groups, group * bits / 8], and what the group keeps, bfloat16 [groups, 1] once or twice.

    Codes are the nearest without a seed, dithered with one (int64, no dims), or `hashed`, which is for 8 bits. The last
    group is filled with zeros. A group with inf or NaN, or a range past LIMIT, keeps NaN.
    """
    planes = _planes(_groups(x, group), bits)
    dithered = seed is not None
    signed = symmetric and not dithered and bits < 8
    if signed:
        low, high = _lowest(planes), _highest(planes)
        magnitude = _scale(torch.maximum(high, -low))
        kept = [torch.where(high > -low, -magnitude, magnitude)]
    elif symmetric:
        kept = [_scale(_highest([plane.abs() for plane in planes]))]
    else:
        lowest, high = _lowest(planes), _highest(planes)
        low, last = -_round_up(-lowest), 2**bits - 1 - (2 * MARGIN if dithered else 0)
        # of a group at the lower end of float32, low is no number of bfloat16 but the least
        step = _round_up((high - low.float()).clamp(min=0) * (1 / last))
        kept = [low, torch.where(high - lowest <= LIMIT, step, torch.nan)]
    # read from what is saved, which Inductor's C++ has in memory by then: scales are not made anew for every code
    centre, step, offset = _levels(kept, bits, dithered)
    small = (step.abs() if signed else step) < torch.finfo(torch.float32).tiny
    inverse = torch.where(small, 0.0, step.reciprocal())
    codes = [(plane if offset is None else plane - offset) * inverse for plane in planes]
    if dithered or hashed:
        turns = _turns(seed, kept, group, planes[0].shape[1])
        codes = [(code + turn + (centre + _unit(group) / 2)).floor() for code, turn in zip(codes, turns)]
    else:
        codes = [(code + centre).round() for code in codes]
    if signed or hashed:  # what lies past the last level, opposite to code 0; or what rounding errors carry there
        codes = [code.clamp(max=2**bits - 1) for code in codes]
    return _pack(codes, bits), *kept


def decode(
    codes: Tensor, kept: Sequence[Tensor], seed: Tensor | None, bits: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """What `encode` made the codes of, up to its error, of `shape` in `dtype`."""
    centre, step, offset = _levels(kept, bits, dithered=seed is not None)
    group, whole = codes.shape[1] * 8 // bits, bits == 8 or not sliced(codes.device)
    turns = [] if seed is None else _turns(seed, kept, group, group if whole else codes.shape[1])
    if whole:  # all in the shape of the value, so that codes are read by one number, however the reader's loops run
        planes = [_ungroup(_unpack_whole(codes, bits), shape).float()]
        turns = [_ungroup(turn, shape) for turn in turns]
        step = _spread(step, group, shape)
        offset = None if offset is None else _spread(offset, group, shape)
    else:
        planes = _unpack(codes, bits)
    if seed is None:
        planes = [code - centre for code in planes]
    else:
        planes = [code - turn + (0.5 - _unit(group) / 2 - centre) for code, turn in zip(planes, turns)]
    planes = [code * step for code in planes]
    if offset is not None:
        planes = [code + offset for code in planes]
    planes = [_cast(code, dtype) for code in planes]
    return planes[0] if whole else _ungroup(torch.cat(planes, 1), shape)


def sliced(device: torch.device) -> bool:
    """Whether decode writes a group slice by slice.

    Inductor's C++ then runs along whole vectors; its Triton code would run as a kernel apart from what reads it.
    """
    return device.type == "cpu"


def encode_float8(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn [groups, group], and bfloat16 [groups, 1]: the largest magnitude, which is float8's largest."""
    values = _groups(x, group).float()
    magnitude = _scale(values.abs().amax(1, keepdim=True))
    inverse = torch.where(magnitude == 0, 0.0, FLOAT8_MAX / magnitude.float())
    return (values * inverse).to(FLOAT8), magnitude


def decode_float8(codes: Tensor, magnitude: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The inverse of `encode_float8`, up to its error, of `shape` in `dtype`."""
    step = magnitude.float() * (1 / FLOAT8_MAX)
    return _cast(_ungroup(codes, shape).float() * _spread(step, codes.shape[1], shape), dtype)


def _groups(x: Tensor, group: int) -> Tensor:
    """x of any shape -> [groups, group], the last filled with zeros."""
    if statically_known_true(x.numel() % group == 0):
        return x.reshape(-1, group)
    return F.pad(x.reshape(-1), (0, -x.numel() % group)).view(-1, group)


def _ungroup(values: Tensor, shape: Sequence[int]) -> Tensor:
    """[groups, group] -> the values of `shape`, without what the last group was filled with."""
    numel = math.prod(shape)
    whole = statically_known_true(numel % values.shape[1] == 0)
    return (values if whole else values.reshape(-1).narrow(0, 0, numel)).reshape(shape)


def _spread(kept: Tensor, group: int, shape: Sequence[int]) -> Tensor:
    """[groups, 1] -> for each value of `shape` what its group keeps."""
    return _ungroup(kept.expand(-1, group), shape)


def _scale(magnitude: Tensor) -> Tensor:
    """The float32 magnitudes of groups, rounded up to bfloat16: 0 below TINY, NaN past LIMIT and of NaN."""
    pattern = torch.where(magnitude <= LIMIT, _ceil(magnitude.view(torch.int32)), NAN)
    return _from_bits(torch.where(magnitude < TINY, 0, pattern))


def _cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 -> dtype; float16's range is the only one that half a step can lead out of."""
    if dtype == torch.float16:
        values = values.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return values.to(dtype)


def _round_up(value: Tensor) -> Tensor:
    """The least number of bfloat16 that is not below each float32; finite for inf and NaN."""
    pattern = value.view(torch.int32).clamp(max=0x7F7F0000)
    return _from_bits(torch.where(pattern < 0, pattern >> 16, _ceil(pattern)))


def _ceil(pattern: Tensor) -> Tensor:
    """The upper 16 bits of int32, one more where the lower are not all zero: of a positive float32, rounded up."""
    return -(-pattern >> 16)


def _from_bits(pattern: Tensor) -> Tensor:
    """int32 -> the numbers of bfloat16 that have those 16 bits."""
    return pattern.to(torch.int16).view(torch.bfloat16)


def _levels(kept: Sequence[Tensor], bits: int, dithered: bool) -> tuple[float, Tensor, Tensor | None]:
    """centre, step and low (none if symmetric) of what groups keep."""
    if len(kept) == 2:
        return MARGIN if dithered else 0.0, kept[1].float(), kept[0].float()
    if dithered:
        last = 2**bits - 1
        return last / 2, kept[0].float() * (1 / (last / 2 - MARGIN)), None
    centre = 127.0 if bits == 8 else 2.0 ** (bits - 1)
    return centre, kept[0].float() * (1 / centre), None


def _planes(values: Tensor, bits: int) -> list[Tensor]:
    """[groups, group] -> as many slices of a group, in float32, as a byte has codes."""
    planes = [values] if bits == 8 else torch.split(values, values.shape[1] * bits // 8, 1)
    return [plane.float() for plane in planes]


def _highest(planes: Sequence[Tensor]) -> Tensor:
    """[groups, 1]; over planes first, so that all loops over a group have one length."""
    return functools.reduce(torch.maximum, planes).amax(1, keepdim=True)


def _lowest(planes: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.minimum, planes).amin(1, keepdim=True)


def _pack(planes: Sequence[Tensor], bits: int) -> Tensor:
    """Whole numbers below 2^bits -> bytes, the first plane in the lowest bits."""
    packed = planes[0]
    for index, plane in enumerate(planes[1:], 1):
        packed = packed + plane * 2.0 ** (bits * index)
    return packed.to(torch.uint8)


def _unpack(codes: Tensor, bits: int) -> list[Tensor]:
    """The inverse of `_pack`, in float32."""
    planes, rest = [], codes.float()
    for _ in range(8 // bits - 1):
        above = (rest * 0.5**bits).floor()
        planes.append(rest - above * 2.0**bits)
        rest = above
    return [*planes, rest]


def _unpack_whole(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `_pack`, the planes side by side, in integers."""
    if bits == 8:
        return codes
    shifts = torch.arange(0, 8, bits, dtype=torch.int32, device=codes.device).unsqueeze(1)
    values: Tensor = (codes.to(torch.int32).unsqueeze(1) >> shifts) & (2**bits - 1)
    return values.view(codes.shape[0], codes.shape[1] * 8 // bits)


def _unit(group: int) -> float:
    """What a turn is a multiple of: as fine as float32 has the sums of `_turns` exact.

    So encode and decode agree, whatever is fused or contracted.
    """
    return 2.0 ** -(23 - math.ceil(math.log2(group)))


def _turns(seed: Tensor | None, kept: Sequence[Tensor], group: int, width: int) -> list[Tensor]:
    """u - unit / 2 in [0, 1) for the groups that keep `kept`, in slices of `width`.

    From a hash of the group on in steps of the golden ratio. Each value is uniform, which is all that an unbiased code
    takes; across groups they are independent, within one spread out evenly.
    """
    unit, count = _unit(group), kept[0].shape[0]
    start = (_hash(_keys(seed, kept), count, kept[0].device) & int(1 / unit - 1)).float() * unit
    start = _realized(start).unsqueeze(1)  # otherwise Inductor hashes anew for every value, and splits kernels
    place = torch.arange(group, dtype=torch.float32, device=kept[0].device) * (round(GOLDEN_RATIO / unit) * unit)
    sums = [start + each for each in torch.split(place, width)]
    return [each - each.floor() for each in sums]


def _keys(seed: Tensor | None, kept: Sequence[Tensor]) -> list[Tensor]:
    """A key of 16 bits, int32, for each round of `_hash`: of a seed, or for each group the bits of its scale."""
    if seed is not None:
        return [((seed >> (16 * i)) & 0xFFFF).to(torch.int32) for i in range(len(ROUNDS))]
    return [(kept[-1].float().view(torch.int32) >> 16).view(-1) & 0xFFFF] * len(ROUNDS)


def _hash(keys: Sequence[Tensor], count: int, device: torch.device) -> Tensor:
    """int32 [count], 24 bits: a Feistel network over the index with a key for each round; nothing overflows."""
    index = torch.arange(count, dtype=torch.int32, device=device)
    left, right = (index >> 16) & 0xFFFF, index & 0xFFFF
    for key, factor in zip(keys, ROUNDS):
        product = (right ^ key) * factor
        left, right = right, _realized((left ^ product ^ (product >> 13)) & 0xFFFF)
    return (left << 8) ^ right


def _realized(x: Tensor) -> Tensor:
    """x [n] as it is; Inductor writes down what has strides of its own, in place of all of it again for every use."""
    return x.as_strided(x.shape, (1,))
