"""What holds of a step in any way to compile it."""

import math

import torch
from steps import eager, float64, steps
from training import distance

from graphopt import Options
from graphopt.verdict import LOSS_FLOAT32, limit

# two orders of the same float32 roundings: neither is nearer to the exact gradient than the other by more than a
# factor. Stock's may be, as its decompositions round where eager's kernels do not: the further of the two counts
ORDER = 3
EPS = torch.finfo(torch.float32).eps
WRONG = EPS**0.5  # half of the digits: a gradient of one parameter that is wrong is off by far more


def check(found, expected, rounded, allowed=0.0):
    """A step's loss and gradients against float64's: off by as much as steps of torch's own, `rounded`, and `allowed`.

    Where a gradient is a small difference of large terms, codecs' errors count for more, by as much as roundings do:
    eager's and stock's show it.
    """
    apart = max(abs(each.loss - expected.loss) for each in rounded)
    assert abs(found.loss - expected.loss) <= ORDER * apart + LOSS_FLOAT32 * abs(expected.loss)
    rounding = max(distance(each.gradients, expected.gradients) for each in rounded)
    error = distance(found.gradients, expected.gradients)
    assert error <= ORDER * rounding + allowed * max(1.0, rounding / (ORDER * EPS))


def check_each(found, expected, rounded):
    """No parameter's gradient is wrong; those below rounding of all others aside."""
    whole = math.sqrt(sum(g.double().square().sum().item() for g in expected.gradients.values()))
    for name, gradient in expected.gradients.items():
        if gradient.norm() > WRONG * whole:
            error, *roundings = (distance({name: each.gradients[name]}, {name: gradient}) for each in (found, *rounded))
            assert error <= max(WRONG, ORDER * max(roundings)), name


def check_step(built):
    """Eager's loss and gradients exactly, and in 8 bits within their limit; no more bytes than stock's cut saves."""
    expected, in_eager = eager(float64(built)), eager(built)
    stock, exact, compressed = steps(built, ("stock", "exact", "compressed"))
    rounded = in_eager, stock
    check(exact, expected, rounded)
    check_each(exact, expected, rounded)
    check(compressed, expected, rounded, limit(Options()))
    assert compressed.saved <= exact.saved <= stock.saved
