"""Derivative codes: an activation's slope in two bits, for a backward that reads dx = dy * f'(x).

    slope(x) = levels[code(x)],  code(x) in {0, 1, 2, 3}

    relu3      code(x) = how many of the thresholds lie below x: the step function that is the derivative of a sum of
               three ReLUs near f (ReGELU2 and ReSiLU2 of LowMemoryBP, arXiv 2406.16282, section 3.2)
    lloyd      code(x) = how many of the thresholds lie below f'(x): the nearest level (Lloyd 1982)
    unbiased   code(x) = one of the two levels around f'(x), drawn so that the mean of the slope is f'(x)

The rows are in `code_tables.py`; `scripts/fit_codes.py` finds them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

SCHEMES = ("relu3", "unbiased", "lloyd")
BITS = 2
LIMIT = 1e4  # past it every f' has reached its limit; at infinity the formulas give inf * 0


class Code(NamedTuple):
    """One row: four slopes, and three thresholds of x (relu3), of f'(x) (lloyd), or none (unbiased)."""

    levels: tuple[float, float, float, float]
    thresholds: tuple[float, float, float] | None = None


def encode(
    x: Tensor, derivative: Callable[[Tensor], Tensor], scheme: str, row: Code, noise: Callable[[], Tensor]
) -> Tensor:
    """int32 of x's shape: the code of every element under one scheme; 0 for NaN.

    `derivative` gives f' of x; `noise` is called where the scheme draws and gives uniform numbers in [0, 1), of x's
    shape.
    """
    if scheme == "relu3" and row.thresholds is not None:
        return count(x, row.thresholds)
    # some formulas give a slope for NaN
    slopes = torch.where(x.isnan(), x, derivative(x.clamp(-LIMIT, LIMIT)))
    return draw(slopes, row.levels, noise()) if row.thresholds is None else count(slopes, row.thresholds)


def count(value: Tensor, thresholds: tuple[float, float, float]) -> Tensor:
    """int32 of value's shape: how many thresholds lie strictly below; 0 for NaN."""
    low, middle, high = thresholds
    return (value > low).to(torch.int32) + (value > middle).to(torch.int32) + (value > high).to(torch.int32)


def draw(derivative: Tensor, levels: tuple[float, float, float, float], noise: Tensor) -> Tensor:
    """int32 of derivative's shape: one of the two levels around it, with mean slope `derivative` over uniform noise.

    `noise` is uniform in [0, 1). A derivative outside the levels takes the nearest; NaN takes code 0.
    """
    place = torch.zeros_like(derivative)
    for low, high in pairwise(levels):
        place = place + ((derivative - low) * (1 / (high - low))).clamp(0, 1)
    place = torch.where(derivative.isnan(), 0.0, place)
    return (place + noise).to(torch.int32).clamp(max=3)  # 3 + noise may round to 4


def slope(code: Tensor, levels: tuple[float, float, float, float], dtype: torch.dtype) -> Tensor:
    """levels[code] in `dtype`, of code's shape."""
    zero, one, two, three = (torch.full((), level, dtype=dtype, device=code.device) for level in levels)
    return torch.where(code < 2, torch.where(code < 1, zero, one), torch.where(code < 3, two, three))
