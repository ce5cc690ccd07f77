"""Derivative codes: the rows are what their objectives say, and codes turn into slopes without loss or bias."""

import importlib.util
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from graphopt.lowering import code_tables
from graphopt.lowering.code_tables import CODES
from graphopt.lowering.codes import SCHEMES, count, draw, slope

SCRIPT = Path(__file__).parents[2] / "scripts" / "fit_codes.py"
spec = importlib.util.spec_from_file_location("fit_codes", SCRIPT)
fit_codes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fit_codes)

every_activation = pytest.mark.parametrize("name", CODES)
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def normal(name):
    """(weight, f'(x)) of x ~ N(0, 1) on steps of 1.5e-5: no step has more mass than 6e-6."""
    x = (torch.arange(1_200_000, dtype=torch.float64) + 0.5) * 1.5e-5 - 9
    weight = torch.exp(-(x**2) / 2)
    return weight / weight.sum(), fit_codes.derivative(fit_codes.ACTIVATIONS[name].function, x)


@every_activation
def test_rows_are_in_order(name):
    assert tuple(CODES[name]) == SCHEMES
    assert CODES[name]["unbiased"].thresholds is None
    rising = [CODES[name]["unbiased"].levels, *CODES[name]["lloyd"], CODES[name]["relu3"].thresholds]
    assert all(low < high for numbers in rising for low, high in pairwise(numbers))


PUBLISHED = {
    "gelu": (
        (-0.04922261145617846, 1.0979632065417297, -0.048740595085551286),
        (-3.1858810036855245, -0.001178821281161997, 3.190832613414926),
    ),
    "silu": (
        (-0.04060357190528599, 1.080925428529668, -0.040321856624382146),
        (-6.3050461001646445, -0.0008684942046214787, 6.325815242089708),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_constants_are_verbatim(name):
    a, c = PUBLISHED[name]
    row = CODES[name]["relu3"]
    assert row.levels == (0.0, a[0], 1.0 - a[2], 1.0) and row.thresholds == c
    steps = [high - low for low, high in pairwise(row.levels)]
    # a few roundings of numbers below two
    assert steps == pytest.approx(a, abs=1e-15)
    assert abs(sum(steps) - 1) < 1e-12 and abs(sum(step * at for step, at in zip(steps, c))) < 1e-12


@pytest.mark.parametrize("name, integral", [("gelu", 0.0095093), ("silu", 0.039944)])
def test_a_fit_finds_the_published_constants(name, integral):
    fit = fit_codes.Relu3(name)
    row, published = fit.row(), CODES[name]["relu3"]
    least, theirs = fit.objective(fit.knots(row)), fit.objective(fit.knots(published))
    assert theirs.item() == pytest.approx(integral, rel=2e-5)  # five digits are known
    # annealing stops short of the minimum: here by 2.5e-4 and 6e-5 of it
    assert least < theirs < least * (1 + 1e-3)
    assert row.levels == pytest.approx(published.levels, abs=1e-3)
    # along c1 and c3 the integral has curvatures of 3e-3: 2.5e-4 of 0.0095 moves them by sqrt(2 * 2.4e-6 / 3e-3) = 0.04
    assert row.thresholds == pytest.approx(published.thresholds, abs=0.04)
    room = fit.slack(fit.knots(row), 1e-3)
    apart = torch.cat(fit.constants(fit.knots(row))) - torch.cat(fit.constants(fit.knots(published)))
    assert (apart.abs() < room).all()


@every_activation
def test_the_table_is_what_the_script_finds(name):
    slopes = fit_codes.Slopes(name)
    found = fit_codes.rows(slopes)
    assert list(fit_codes.apart(name, found)) == []
    assert fit_codes.figures(slopes, found) in code_tables.__doc__


@every_activation
def test_relu3_slopes_integrate_to_the_activation(name):
    levels, thresholds = CODES[name]["relu3"]
    left, right = fit_codes.ACTIVATIONS[name].function(torch.tensor([-60.0, 60.0], dtype=torch.float64)).tolist()
    edges = (-60.0, *thresholds, 60.0)
    total = sum(level * (high - low) for level, (low, high) in zip(levels, pairwise(edges)))
    # levels are rounded to 5e-10 on at most 9, thresholds to 5e-9 where the slope steps by at most 1.2
    assert total == pytest.approx(right - left, abs=2 * 9 * 5e-10 + 3 * 1.2 * 5e-9)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_threshold_belongs_to_the_code_below(dtype):
    thresholds = (-1.5, 0.25, 2.0)  # exact in every dtype
    at = torch.tensor(thresholds, dtype=dtype)
    up, down = torch.full_like(at, float("inf")), torch.full_like(at, float("-inf"))
    assert count(at, thresholds).tolist() == [0, 1, 2]
    assert count(at.nextafter(up), thresholds).tolist() == [1, 2, 3]
    assert count(at.nextafter(down), thresholds).tolist() == [0, 1, 2]
    codes = count(torch.tensor([float("nan"), float("-inf"), float("inf")], dtype=dtype), thresholds)
    assert codes.tolist() == [0, 0, 3] and codes.dtype == torch.int32


@every_activation
@pytest.mark.parametrize("noise", ["even", "random"])
def test_drawn_slopes_have_the_derivative_as_their_mean(name, noise):
    levels = CODES[name]["unbiased"].levels
    derivative = torch.linspace(levels[0], levels[-1], 67)
    draws = 2**16
    uniform = {"even": (torch.arange(draws) + 0.5) / draws, "random": torch.rand(draws)}[noise]
    drawn = slope(draw(derivative.expand(draws, 67), levels, uniform[:, None]), levels, torch.float64)

    exact, bounds = derivative.double(), torch.tensor(levels, dtype=torch.float64)
    above = torch.searchsorted(bounds, exact).clamp(1, 3)
    low, high = bounds[above - 1], bounds[above]
    error = (drawn.mean(0) - exact).abs()
    # even noise is off by one draw at most, random noise by its standard error; either by roundings of numbers up to 4
    allowed = (
        (high - low) / draws
        if noise == "even"
        else 5 * ((exact - low) * (high - exact)).clamp(min=0).sqrt() / draws**0.5
    )
    rounding = 4 * 2**-23 * (levels[-1] - levels[0])
    assert (error <= allowed + rounding).all()
    # at a level itself a rounding takes the one beyond, in about 1e-7 of the draws
    inside = (drawn >= low - 1e-9) & (drawn <= high + 1e-9)
    assert inside.double().mean() > 1 - 1e-4


@every_activation
def test_levels_span_the_derivative(name):
    # the kinks of selu and hardswish hold their largest slopes
    x = torch.cat([torch.linspace(-30, 30, 100_001), torch.tensor([-3.0, 0.0, 3.0])])
    slopes = fit_codes.derivative(fit_codes.ACTIVATIONS[name].function, x.double())
    low, *_, high = torch.tensor(CODES[name]["unbiased"].levels, dtype=torch.float32).double()
    assert low <= slopes.min() and slopes.max() <= high
    # steps of 6e-4 miss an extreme by |f'''| * (3e-4)^2 / 2 < 5e-8 |f'''|, and float32 near one has steps of 1.2e-7
    assert slopes.min() - low < 5e-7 and high - slopes.max() < 5e-7


@pytest.mark.parametrize("dtype", FLOATS)
def test_noise_that_rounds_up_stays_a_code(dtype):
    one = torch.ones((), dtype=dtype)
    noise = one.nextafter(torch.zeros_like(one))
    assert 3 + noise == 4
    levels = (0.0, 1.0, 2.0, 3.0)
    derivative = torch.tensor([3.0, 7.0, float("inf"), -7.0, float("-inf"), float("nan")], dtype=dtype)
    assert draw(derivative, levels, noise).tolist() == [3, 3, 3, 0, 0, 0]
    assert draw(derivative, levels, torch.zeros_like(noise)).tolist() == [3, 3, 3, 0, 0, 0]


@every_activation
def test_no_moved_level_lowers_the_variance_of_a_draw(name):
    weight, derivative = normal(name)

    def variance(levels):
        bounds = torch.tensor(levels, dtype=torch.float64)
        above = torch.bucketize(derivative, bounds).clamp(1, 3)
        return (weight * (derivative - bounds[above - 1]) * (bounds[above] - derivative)).sum()

    low, one, two, high = CODES[name]["unbiased"].levels
    best = variance((low, one, two, high))
    # a level known to 2e-6 cannot hide behind a move of 1e-3: the variance is convex along each level
    for move in (-1e-3, 1e-3):
        assert variance((low, one + move, two, high)) > best
        assert variance((low, one, two + move, high)) > best


@every_activation
def test_lloyd_is_stationary(name):
    levels, thresholds = CODES[name]["lloyd"]
    middles = [(low + high) / 2 for low, high in pairwise(levels)]
    assert thresholds == pytest.approx(middles, abs=1e-8)  # they are written to 5e-9
    weight, derivative = normal(name)
    codes = count(derivative, thresholds)
    mass = torch.zeros(4, dtype=torch.float64).index_add_(0, codes, weight)
    mean = torch.zeros(4, dtype=torch.float64).index_add_(0, codes, weight * derivative) / mass
    # a step on the wrong side of a threshold moves a mean by its mass times half a gap; a cell has at most four such
    gap = max(high - low for low, high in pairwise(levels))
    allowed = 4 * 6e-6 * gap / 2 / mass + 5e-8
    assert ((mean - torch.tensor(levels, dtype=torch.float64)).abs() < allowed).all()


@pytest.mark.parametrize("dtype", FLOATS)
@every_activation
def test_slope_reads_back_every_level(name, dtype):
    codes = torch.arange(4, dtype=torch.int32).repeat(3, 1)
    for row in CODES[name].values():
        assert torch.equal(slope(codes, row.levels, dtype), torch.tensor(row.levels, dtype=dtype).expand(3, 4))
