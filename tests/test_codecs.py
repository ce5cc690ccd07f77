"""Codecs: the error of every value, what it costs, and what becomes of numbers that are no ordinary ones."""

import math
import pickle

import pytest
import torch
import torch._inductor.config as inductor_config
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.codecs import CODECS, Codec, codec
from graphopt.errors import OptionsError

NOT_DRAWN = {name: each for name, each in CODECS.items() if not each.draws}
DRAWN = {name: each for name, each in CODECS.items() if each.draws}
VARIANTS = [
    *CODECS.values(),
    *(codec(name, 64, rounding, False) for name in ("int8", "int4", "int2") for rounding in ("nearest", "stochastic")),
    codec("int4", 16), codec("int4", 128, "stochastic", False), codec("fp8", 32), codec("int2", 1024, "stochastic"),
    codec("int8", 32, "hashed", False),
]  # fmt: skip
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
every_codec = pytest.mark.parametrize("each", VARIANTS, ids=lambda each: each.name)


def through(each: Codec, x: torch.Tensor) -> torch.Tensor:
    return each.decode(each.encode(x), x.shape, x.dtype)


def grouped(each: Codec, x: torch.Tensor) -> torch.Tensor:
    flat = x.reshape(-1).double()
    return torch.nn.functional.pad(flat, (0, -x.numel() % each.group)).view(-1, each.group)


def bound(each: Codec, x: torch.Tensor) -> torch.Tensor:
    """The largest error that each value may have, [groups, group].

    Half a step, hashed a whole one; a group's range is that of its scale, rounded up by at most 2^-7, and by a float32
    rounding or two. Beside it one rounding to the dtype of x, of a value at most half a step larger than x.
    """
    values = grouped(each, x)
    largest = values.abs().amax(1, keepdim=True) * (1 + 2**-7)
    if each.name.startswith("fp8"):
        # 3 bits of mantissa: half of 2^-3 of a value, below the normal range half of 2^-9 of what 448 stands for
        half = torch.maximum(values.abs() * 2**-4, largest / 448 * 2**-10)
    elif not each.symmetric:
        low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
        spread = high - low + 2**-7 * (high.abs() + low.abs())
        half = spread * (1 + 2**-7) / (2**each.bits - 1) / 2
    elif each.draws:
        half = largest / (2**each.bits - 1)
    elif each.bits == 8:
        half = largest / 127 / 2
    else:
        # signed: on the side that code 0 is not on, the last level is one step short of the largest value
        half = largest / 2 ** (each.bits - 1) / 2
        sign = torch.where(values.amax(1, keepdim=True) > -values.amin(1, keepdim=True), 1, -1)
        last = values.abs().amax(1, keepdim=True) * (1 - 2.0 ** (1 - each.bits))
        half = torch.maximum(half, torch.where(values * sign < 0, values.abs() - last, 0))
    half = half * (2 if each.rounding == "hashed" else 1)
    half = half * (1 + 2**-9)  # the dithered step is larger by MARGIN
    return half + torch.finfo(x.dtype).eps * (values.abs() + half) + 2.0**-118


def assert_bounded(each: Codec, x: torch.Tensor) -> None:
    error = (grouped(each, through(each, x)) - grouped(each, x)).abs()
    assert (error <= bound(each, x)).all(), f"{each.name}: {(error / bound(each, x)).max()}"


@every_codec
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("numel", [0, 1, 63, 64, 65, 1000, 4096])
def test_errors_are_below_half_a_step_for_any_size(each, dtype, numel):
    torch.manual_seed(0)
    x = torch.randn(numel).to(dtype)
    parts = each.encode(x)
    x_ = each.decode(parts, x.shape, dtype)
    assert x_.shape == x.shape and x_.dtype == dtype and x_.is_contiguous()
    assert sum(part.nbytes for part in parts) == each.bytes(numel)
    assert_bounded(each, x)


@settings(max_examples=60, deadline=None)
@given(
    each=st.sampled_from(VARIANTS),
    dtype=st.sampled_from(FLOATS),
    shape=st.lists(st.integers(0, 9), max_size=4),
    exponent=st.integers(-14, 12),
    outliers=st.booleans(),
    offset=st.sampled_from([0.0, 1.0, -30.0]),
    seed=st.integers(0, 2**32),
)
def test_errors_are_below_half_a_step_whatever_the_data(each, dtype, shape, exponent, outliers, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) + offset
    if outliers and x.numel():
        x.view(-1)[::7] *= 12
    assert_bounded(each, (x * 2.0**exponent).clamp(-6e4, 6e4).to(dtype))


@pytest.mark.parametrize("each", CODECS.values(), ids=lambda each: each.name)
def test_the_stated_error_is_that_on_normal_data(each):
    """2^20 values: the mean square of 2^14 groups is known to about 1 %. 2 bits leave out what lies past a level."""
    torch.manual_seed(0)
    x = torch.randn(1 << 20)
    error = ((through(each, x) - x).norm() / x.norm()).item()
    assert error == pytest.approx(each.error, rel=0.05 if each.bits == 2 else 0.02)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["int8", "int4", "int2"])
def test_the_mean_of_unbiased_draws_is_exact(name, symmetric):
    """Errors are uniform in half a step each way, so that the mean of K has variance step^2 / (12 K).

    Of 2^12 values, in correlated groups of 64, the mean square over that is 1 +- sqrt(2 / 64) or so: 5 sigma are 0.9. A
    bias of a tenth of a step would give 1 + 0.01 * 12 * K, which is 32.
    """
    each = codec(name, 64, "stochastic", symmetric)
    torch.manual_seed(0)
    x = torch.randn(64, 64) + (0.5 if symmetric else 3.0)
    spread = 2 * x.abs().amax(1, keepdim=True) if symmetric else x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    step = spread / (2**each.bits - 1)
    draws = 256
    mean = torch.stack([through(each, x).double() for _ in range(draws)]).mean(0)
    # a scale in bfloat16 makes a step up to 2^-7 of the values larger
    inexact = 1.3 if symmetric else 1.3 * (1 + 2**-6 * 2**each.bits)
    assert ((((mean - x) / step) ** 2) * 12 * draws).mean() < 1.9 * inexact


def test_errors_of_a_group_do_not_add_up():
    """A sum over a group, and a weight gradient, err as with independent noise: a variance ratio of 1 +- 0.15.

    4096 sums of squares in groups of 64 tokens: sqrt(2 / 4096) = 0.022, and 5 % for the rounding of scales.
    """
    torch.manual_seed(0)
    each = CODECS["int4-unbiased"]
    x, g = torch.randn(512, 256), torch.randn(512, 64)
    step = 2 * x.view(-1, 64).abs().amax(1, keepdim=True) / 15
    independent = (torch.rand(x.numel() // 64, 64) - 0.5) * step
    ratios = []
    for project in (lambda e: g.T @ e.view(x.shape), lambda e: (torch.randn(e.shape) * e).sum(1)):
        drawn = project((through(each, x) - x).view(-1, 64)).square().mean()
        ratios.append((drawn / project(independent).square().mean()).item())
    assert ratios == pytest.approx([1, 1], abs=0.15)


@pytest.mark.parametrize("symmetric", [True, False])
def test_hashed_small_values_keep_their_sum(symmetric):
    """One value of a group decides its step, the others are far below half of it: to nearest all of them are lost.

    Hashed each is a step with a chance p = x / step, of variance p (1 - p) < p: the sum of them all is known to
    step * sqrt(the sum of p) if they are independent; spread evenly in a group they have less; 5 sigma.
    """
    torch.manual_seed(0)
    each = codec("int8", 64, "hashed", symmetric)
    x = torch.rand(4096, 64) * 1e-4
    x[:, 7] = 0.5 + torch.rand(4096)
    small, step = torch.arange(64) != 7, 1.5 / (127 if symmetric else 255)
    wanted = x[:, small].sum()
    noise = 5 * step * (wanted / step).sqrt()
    assert abs(through(each, x)[:, small].sum() - wanted) < noise < wanted / 2
    assert through(codec("int8", 64, "nearest", symmetric), x)[:, small].sum() < wanted / 20


@pytest.mark.parametrize("symmetric", [True, False])
def test_hashed_noise_changes_with_the_scale_and_draws_nothing(symmetric):
    each, x = codec("int8", 64, "hashed", symmetric), torch.randn(1 << 16)
    before = torch.get_rng_state()
    codes, again, other = (each.encode(x * scale)[0] for scale in (1, 1, 1.25))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(codes, again)
    # a value is rounded up in one and down in the other with a chance 2 p (1 - p), which is 1/3 on average
    assert (codes != other).double().mean() == pytest.approx(1 / 3, abs=0.1)


@pytest.mark.parametrize("each", DRAWN.values(), ids=lambda each: each.name)
def test_draws_follow_the_seed_and_differ_between_calls(each):
    x = torch.randn(1000)

    def parts(seed):
        torch.manual_seed(seed)
        return each.encode(x), each.encode(x)

    one, two = parts(5)
    assert all(torch.equal(a, b) for a, b in zip(one, parts(5)[0]))
    assert not torch.equal(one[0], two[0]) and not torch.equal(one[0], parts(6)[0][0])
    assert torch.equal(each.decode(one, x.shape, x.dtype), each.decode(one, x.shape, x.dtype))


def test_draws_follow_the_seed_where_inductor_falls_back_to_torch():
    x = torch.randn(1000)
    with inductor_config.patch(fallback_random=True):
        torch.manual_seed(5)
        first, second = CODECS["int4-unbiased"].encode(x)[-1], CODECS["int4-unbiased"].encode(x)[-1]
        torch.manual_seed(5)
        assert first == torch.randint(0, 2**63 - 1, ()) and first != second


@every_codec
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_zeros_are_exact(each, dtype):
    assert torch.equal(through(each, torch.zeros(200, dtype=dtype)), torch.zeros(200, dtype=dtype))


@pytest.mark.parametrize("each", NOT_DRAWN.values(), ids=lambda each: each.name)
def test_zeros_among_others_are_exact(each):
    torch.manual_seed(0)
    x = torch.randn(4096).relu()
    assert (through(each, x)[x == 0] == 0).all()


CONSTANT = [each for each in VARIANTS if not each.draws or not each.symmetric]


@pytest.mark.parametrize("each", CONSTANT, ids=lambda each: each.name)
@pytest.mark.parametrize("value", [1.0, -3.0, 0.1, 1e-3, -2.7e4])
def test_constants_of_bfloat16_are_exact(each, value):
    x = torch.full((2 * each.group,), value, dtype=torch.bfloat16)
    assert torch.equal(through(each, x), x)


@every_codec
def test_small_numbers_stay_small(each):
    for scale in (1e-30, 1e-36, 1e-38, 1e-40, 1e-44):
        assert_bounded(each, torch.randn(256) * scale)
        assert_bounded(each, (torch.randn(256) * scale).bfloat16())
    assert_bounded(each, torch.full((256,), 6e-8, dtype=torch.float16))


@every_codec
def test_the_largest_finite_numbers_stay_finite(each):
    x = torch.full((256,), 65504.0, dtype=torch.float16) * torch.randn(256).sign()
    assert through(each, x).isfinite().all()
    x = torch.randn(256).clamp(-1, 1).bfloat16() * 8e37
    assert through(each, x).isfinite().all()


@every_codec
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_seen_and_stays_in_its_group(each, dtype, value):
    torch.manual_seed(0)
    x = torch.randn(4 * each.group).to(dtype)
    x[each.group + 3] = value
    x_ = through(each, x).view(4, each.group)
    assert x_[1].isnan().all() and x_[[0, 2, 3]].isfinite().all()
    x[each.group + 3] = 0
    others = bound(each, x)[[0, 2, 3]]
    assert ((x_[[0, 2, 3]] - x.view(4, -1)[[0, 2, 3]]).abs() <= others).all()


@every_codec
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_group_of_nothing_finite_is_seen(each, dtype, value):
    assert through(each, torch.full((each.group,), value, dtype=dtype)).isnan().all()


def test_signed_scales_have_the_lower_error_at_equal_bits():
    """A channel of outliers: with a level at zero the others vanish, where without one each is half a step off."""
    torch.manual_seed(0)
    x = torch.randn(1024, 256)
    x[:, 5] *= 50
    step = 2 * x.view(-1, 64).abs().amax(1, keepdim=True) / 15
    without_zero = ((x.view(-1, 64) / step).floor() + 0.5) * step
    assert (through(CODECS["int4"], x) - x).norm() < 0.5 * (without_zero.view(x.shape) - x).norm()


def test_codecs_can_be_told_apart_and_stored():
    assert len({each.name for each in VARIANTS}) == len({repr(each) for each in VARIANTS}) == len(VARIANTS)
    assert pickle.loads(pickle.dumps(VARIANTS)) == VARIANTS
    assert all(codec("int4") == CODECS["int4"] for _ in range(2)) and codec("int4", symmetric=False).error < 0.0912
    assert "0x" not in repr(CODECS)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"name": "int3"}, "int3"), ({"name": "int4", "group_size": 48}, "48"),
        ({"name": "int4", "rounding": "up"}, "up"), ({"name": "fp8", "rounding": "stochastic"}, "fp8"),
    ],
)  # fmt: skip
def test_options_that_are_not_allowed_are_named(options, named):
    with pytest.raises(OptionsError, match=named):
        codec(**options)
