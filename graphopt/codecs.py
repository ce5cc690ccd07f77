"""Codecs: in how many bits a saved tensor crosses from forward to backward.

    codec = CODECS["int8"]
    parts = codec.encode(x)                     # what is saved instead of x
    x_ = codec.decode(parts, x.shape, x.dtype)  # what backward reads
    codec.bytes(numel), codec.error             # its price: bytes, and the relative error |x_ - x| / |x|

Both functions are plain torch. In a graph they are an operator each (lowering/codec_ops.py), which Inductor lowers and
fuses into the kernels around it as it would the formula. Tensors are dense and contiguous; any shape, any float dtype.
docs/codecs.md has the figures.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.errors import OptionsError
from graphopt.lowering import group_quant, ops, random  # noqa: F401  (ops registers pack and unpack)
from graphopt.lowering.formulas import WORD, WORDS

BITS = {"int8": 8, "int4": 4, "int2": 2, "fp8": 8}
# how a codec rounds, and how its name says so
ROUNDINGS = {"nearest": "", "stochastic": "unbiased", "hashed": "hashed"}


@dataclass(frozen=True)
class Codec:
    """Groups of `group` consecutive values, `bits` a value, and a scale, or (asymmetric) lowest value and step.

    `error` is the root of the mean square of |x_ - x| over that of |x|, for normally distributed x.

    rounding    "nearest"; small values beside large ones become zero, all in one direction.
                "stochastic" draws: the mean of x_ over draws is x.
                "hashed" rounds up or down by noise made from each group's place and scale: sums over groups keep their
                value, zeros are exact, equal x have equal codes, and no random number is drawn. In 8 bits only.
    """

    name: str
    bits: int
    error: float
    rounding: str = "nearest"
    group: int = 64
    symmetric: bool = True

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8

    @property
    def draws(self) -> bool:
        """Whether it draws a seed, and so has the mean x over draws."""
        return self.rounding == "stochastic"

    def bytes(self, numel: int) -> int:
        """What the encoded parts of `numel` values take."""
        kept = torch.bfloat16.itemsize * (1 if self.symmetric else 2)
        seed = torch.int64.itemsize if self.draws else 0
        return math.ceil(numel / self.group) * (self.group * self.bits // 8 + kept) + seed

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """The parts to save of x, contiguous: codes, what each group keeps, and a seed if one is drawn."""
        if not self.draws:
            return self.parts(x, None)
        seed = random.seed(x.device)
        return *self.parts(x, seed), seed

    def parts(self, x: Tensor, seed: Tensor | None) -> tuple[Tensor, ...]:
        """As `encode`, under a seed that is drawn already (int64, no dims; None where none is), and without it."""
        return group_quant.encode(x, self.bits, self.group, self.symmetric, seed, self.rounding == "hashed")

    def empty_parts(self, x: Tensor) -> list[Tensor]:
        """What `parts` gives for x, without values."""
        groups = (x.numel() + self.group - 1) // self.group
        codes = x.new_empty(groups, self.group * self.bits // 8, dtype=self.code_dtype)
        return [codes, *(x.new_empty(groups, 1, dtype=torch.bfloat16) for _ in range(1 if self.symmetric else 2))]

    def decode(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """What `encode` had, with the codec's error, in `shape` and `dtype`; contiguous."""
        codes, *kept = parts
        seed = kept.pop() if self.draws else None
        return group_quant.decode(codes, kept, seed, self.bits, shape, dtype)

    def hashed(self) -> Codec:
        """The same, hashed if it is of 8 bits to nearest: for values of which the small ones count in sum."""
        if (self.bits, self.rounding) != (8, "nearest"):
            return self
        return codec("int8", self.group, "hashed", self.symmetric)


@dataclass(frozen=True)
class Float8(Codec):
    """Groups of float8_e4m3fn under one scale: the error of each value is relative to itself."""

    @property
    def code_dtype(self) -> torch.dtype:
        return group_quant.FLOAT8

    def parts(self, x: Tensor, seed: Tensor | None) -> tuple[Tensor, ...]:
        return group_quant.encode_float8(x, self.group)

    def decode(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        codes, magnitude = parts
        return group_quant.decode_float8(codes, magnitude, shape, dtype)

    def hashed(self) -> Codec:
        """Itself: small values keep their own precision."""
        return self


@dataclass(frozen=True)
class Bits(Codec):
    """One bit for each bool, 16 to a word: exact."""

    def bytes(self, numel: int) -> int:
        return math.ceil(numel / WORD) * WORDS[1].itemsize

    def parts(self, x: Tensor, seed: Tensor | None) -> tuple[Tensor, ...]:
        return (torch.ops.graphopt.pack(x, 1),)

    def decode(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.ops.graphopt.unpack(parts[0], shape, 1, dtype)  # type: ignore[no-any-return]


MASK = Bits("bits", 1, 0.0, group=WORD)


def codec(name: str, group_size: int = 64, rounding: str = "nearest", symmetric: bool = True) -> Codec:
    """The codec of these options; `name` is int8, int4, int2 or fp8, which rounds to nearest and is symmetric.

    A group is a power of two between 8 and 1024. Raises OptionsError for anything else, and for int4 or int2 hashed.
    """
    if name not in BITS:
        raise OptionsError(f"codec {name!r} is not one of {', '.join(BITS)}")
    if rounding not in ROUNDINGS:
        raise OptionsError(f"rounding {rounding!r} is not one of {', '.join(ROUNDINGS)}")
    if group_size not in (8 << i for i in range(8)):
        raise OptionsError(f"group_size {group_size!r} is not a power of two between 8 and 1024")
    full = _name(name, group_size, rounding, symmetric)
    if name == "fp8":
        if rounding != "nearest" or not symmetric:
            raise OptionsError("fp8 rounds to nearest and is symmetric")
        return Float8(full, 8, 0.025, group=group_size)
    if rounding == "hashed" and name != "int8":
        raise OptionsError(f"codec {name!r} is not hashed, int8 is")
    error = _error(BITS[name], group_size, rounding, symmetric)
    return Codec(full, BITS[name], error, rounding, group_size, symmetric)


def _name(name: str, group: int, rounding: str, symmetric: bool) -> str:
    parts = [name, "" if symmetric else "asymmetric", "" if group == 64 else str(group), ROUNDINGS[rounding]]
    return "-".join(part for part in parts if part)


def _error(bits: int, group: int, rounding: str, symmetric: bool) -> float:
    """step / sqrt(12), the root of its mean square over groups of normal numbers; hashed step / sqrt(6)."""
    last = (1 << bits) - (1 if rounding == "stochastic" or not symmetric else 2 if bits == 8 else 0)
    if symmetric:
        spread = 4 * _moments(lambda r: math.erf(r / math.sqrt(2)) ** group)[1]
    else:  # highest less lowest, nearly independent of each other
        mean, square = _moments(lambda r: (0.5 + 0.5 * math.erf(r / math.sqrt(2))) ** group)
        spread = 2 * square + 2 * mean**2
    return round(math.sqrt(spread / (6 if rounding == "hashed" else 12)) / last, 5)


def _moments(below: Callable[[float], float]) -> tuple[float, float]:
    """Mean and mean square of a positive number whose chance to lie below r is given."""
    width = 0.01
    above = [(r, 1 - below(r)) for r in (width * (i + 0.5) for i in range(1000))]
    return sum(p for _, p in above) * width, sum(2 * r * p for r, p in above) * width


CODECS = {
    each.name: each
    for each in (
        *(codec(name, rounding=how) for name in ("int8", "int4", "int2") for how in ("nearest", "stochastic")),
        codec("int8", rounding="hashed"),
        codec("fp8"),
    )
}


@functools.cache
def named(name: str) -> Codec:
    """The codec whose `name` this is, such as "int4-32-unbiased". Raises OptionsError if it is none's."""
    if name == MASK.name:
        return MASK
    kind, *rest = name.split("-")
    size = next((int(each) for each in rest if each.isdecimal()), 64)
    rounding = next((each for each, suffix in ROUNDINGS.items() if suffix in rest), "nearest")
    found = codec(kind, size, rounding, "asymmetric" not in rest)
    if found.name != name:
        raise OptionsError(f"codec {name!r} is not known (did you mean {found.name!r}?)")
    return found


def is_named(codec: Codec) -> bool:
    """Whether `named` finds it by its name, as it does what `codec` makes."""
    try:
        return named(codec.name) == codec
    except OptionsError:
        return False


def within(tolerance: float, group_size: int = 64, rounding: str = "nearest") -> tuple[Codec, ...]:
    """The integer codecs whose error is within a tolerance, from the finest."""
    found = (codec(name, group_size, rounding) for name in BITS if name != "fp8")
    return tuple(each for each in found if each.error <= tolerance)
