"""How far gradients may be from the reference: a method that is further off is not timed."""

import math

import torch
from methods import options

from graphopt.options import parse
from graphopt.verdict import CODECS, limit

# a step is at the most so many times as far from float32 as stock is: the same roundings at other places
STOCKS = 2
FP8 = torch.finfo(torch.float8_e4m3fn).eps


def allowed_error(method: str, stock_error: float | None, dtype: torch.dtype) -> float:
    """The largest |g - g0| / |g0| over all parameters that `method` may have beside stock's own, computed in `dtype`.

    Without `stock_error` g0 is stock's gradient, and nobody knows how much rounding both have: half of the digits may
    differ, as in graphopt.check.
    """
    eps = torch.finfo(dtype).eps
    # one rounding more than stock has; where stock's own error is tiny it is all there is
    rounding = eps**0.5 if stock_error is None else STOCKS * stock_error + rounded(eps)
    return approximation(method) + rounding


def approximation(method: str) -> float:
    """What the codecs and codes of a method may add to the error of rounding; 0 of one that is said to be exact."""
    if method == "fp8":
        return CODECS * rounded(FP8)
    if method.startswith("lowmem"):
        # that of one parameter's gradient in graphopt.check, and so of all together
        return limit(parse(options(method) or None)[0])
    return 0.0


def rounded(eps: float) -> float:
    """The relative error of values rounded to nearest, root mean square: even over half of eps to either side."""
    return eps / math.sqrt(12)
