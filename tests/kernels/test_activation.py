"""Activation kernels against their references in float64."""

import math

import pytest
import torch
from rounding import UNIT, within

from graphopt.kernels import activation
from graphopt.kernels.activation import (
    backward,
    forward,
    noise,
    reference_backward,
    reference_forward,
)
from graphopt.lowering.activations import ACTIVATIONS
from graphopt.lowering.code_tables import CODES
from graphopt.lowering.codes import LIMIT, SCHEMES, slope
from graphopt.lowering.formulas import unpack

# numpy speaks up where the interpreter overflows as the GPU does
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# about ten operations in float32 on terms up to 1 + |x|, exp at |x| being off by |x| units itself: for f and for f'
OPERATIONS = 16
SIZES = (0, 1, 15, 16, 17, 2047, 2048, 2049)


def sample(*shape, dtype=torch.float32, device="cpu", scale=4.0):
    return (torch.randn(shape) * scale).to(device, dtype)


def seeded(device, seed=-(2**40) - 3):
    return torch.tensor(seed, device=device)


def codes(words, x):
    """int32 of x's shape, the code of every element."""
    order = sorted(range(x.dim()), key=lambda dim: -x.stride(dim))
    back = [order.index(dim) for dim in range(x.dim())]
    return unpack(words, [x.shape[dim] for dim in order], 2, torch.int32).permute(back)


def check_codes(words, x, name, scheme, seed):
    """The codes are those of float64 but where rounding decides; the padding of the last word is zero."""
    found, row, wide = codes(words, x), CODES[name][scheme], x.double()
    error = OPERATIONS * UNIT * (1 + wide.abs().clamp(max=LIMIT))
    if scheme == "relu3":
        # x is exact, and the thresholds as float32 has them
        edges = torch.tensor(row.thresholds, dtype=torch.float32, device=x.device).double()
        place, error = (wide.unsqueeze(-1) > edges).sum(-1).double() + 0.5, torch.zeros_like(error)
    else:
        of_x = ACTIVATIONS[name][1](wide.clamp(-LIMIT, LIMIT))
        if scheme == "lloyd":
            edges = torch.tensor(row.thresholds, dtype=torch.float64, device=x.device)
            place = (of_x.unsqueeze(-1) > edges).sum(-1).double() + 0.5
            near = (of_x.unsqueeze(-1) - edges).abs().amin(-1)
            place = torch.where(near < error, torch.nan, place)
        else:
            gaps = [high - low for low, high in zip(row.levels, row.levels[1:])]
            place = sum(((of_x - low) / gap).clamp(0, 1) for low, gap in zip(row.levels, gaps))
            place = place + noise(seed, x.numel()).view(x.shape).double()
            # the sum of place and noise is below 4 and rounded twice
            error = error / min(gaps) + 4 * UNIT
            place = torch.where((place - place.round()).abs() < error, torch.nan, place)
    known = ~place.isnan()
    assert (found[known] == place[known].int()).all()
    assert known.double().mean() > 0.99 or x.numel() < 100
    if x.numel() % 16:
        assert (words[-1].item() & 0xFFFFFFFF) >> (2 * (x.numel() % 16)) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_forward_equals_float64(name, scheme, dtype, device):
    x, seed = sample(5, 229, dtype=dtype, device=device), seeded(device)
    y, words = forward(x, name, scheme, seed)
    within(y, ACTIVATIONS[name][0](x.double()), OPERATIONS * UNIT * (1 + x.double().abs()), dtype)
    check_codes(words, x, name, scheme, seed)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_threshold_belongs_to_the_code_below(name, device):
    edges = torch.tensor(CODES[name]["relu3"].thresholds, dtype=torch.float32, device=device)
    x = torch.stack([edges, edges.nextafter(torch.full_like(edges, math.inf))])
    expected = (x.unsqueeze(-1) > edges).sum(-1).int()
    assert torch.equal(codes(forward(x, name, "relu3")[1], x), expected)
    assert (expected[1] == torch.arange(1, 4, device=device)).all()


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name not in ("softplus", "sigmoid")])
def test_small_inputs_keep_their_digits(name, device):
    x = torch.logspace(-30, -1, 333, device=device)
    x = torch.cat([x, -x])
    expected = ACTIVATIONS[name][0](x.double())
    within(forward(x, name, "relu3")[0], expected, OPERATIONS * UNIT * expected.abs(), torch.float32)


@pytest.mark.parametrize("size", [*SIZES, (197, 767)])
def test_any_size_round_trips(size, device):
    x = sample(*(size if isinstance(size, tuple) else (size,)), dtype=torch.bfloat16, device=device)
    y, words = forward(x, "gelu", "relu3")
    expected, reference = reference_forward(x, "gelu", "relu3")
    if size:
        within(y, torch.nn.functional.gelu(x.double()), OPERATIONS * UNIT * (1 + x.double().abs()), x.dtype)
    assert y.shape == expected.shape and torch.equal(words, reference)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_backward_multiplies_by_the_level(scheme, dtype, device):
    for shape in ((3, 5, 77), (16,), (1,), (0, 4), ()):
        grad, code = sample(*shape, dtype=dtype, device=device), torch.randint(0, 4, shape, device=device)
        words = activation.pack(code, 2)
        dx = backward(grad, words, "silu", scheme)
        expected = grad.double() * slope(code, CODES["silu"][scheme].levels, torch.float64)
        if grad.numel():
            # the level and the product are rounded to float32
            within(dx, expected, 2 * UNIT * expected.abs(), dtype)
        assert dx.shape == reference_backward(grad, words, "silu", scheme).shape


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1),
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(2, 0, 3, 1),
    "sliced": lambda x: x[:, :, 1:, ::2],
    "offset": lambda x: x[1:],
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "one dim of one": lambda x: x[:, :1].transpose(1, 3),
    "scalar": lambda x: x[0, 0, 0, 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, device):
    x = LAYOUTS[layout](sample(3, 5, 7, 11, device=device))
    y, words = forward(x, "silu", "lloyd")
    expected, reference = reference_forward(x, "silu", "lloyd")
    assert y.stride() == expected.stride() and torch.equal(words, reference)
    torch.testing.assert_close(y, torch.nn.functional.silu(x))
    dense = x.permute(order := sorted(range(x.dim()), key=lambda dim: -x.stride(dim))).is_contiguous()
    assert y.permute(order).is_contiguous() if dense else y.is_contiguous()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_and_infinity(name, scheme, device):
    x = torch.tensor([math.nan, math.inf, -math.inf, 3e38, -3e38, LIMIT, -LIMIT] * 40, device=device)
    y, words = forward(x, name, scheme, seeded(device))
    _, reference = reference_forward(x, name, scheme, seeded(device))
    assert torch.equal(words, reference)
    found = codes(words, x).view(-1, 7)
    assert (found[:, 0] == 0).all()
    if scheme != "unbiased":
        assert (found[:, [1, 3]] == found[:, [5]]).all() and (found[:, [2, 4]] == found[:, [6]]).all()
    # by the formulas; torch's vectorised gelu on the CPU answers NaN at +inf as well
    at_inf = 1.0 if name in ("tanh", "sigmoid") else math.inf
    at_minus_inf = {"softplus": 0.0, "elu": -1.0, "selu": -1.7580993, "tanh": -1.0, "sigmoid": 0.0}.get(name, math.nan)
    torch.testing.assert_close(y[:3].cpu(), torch.tensor([math.nan, at_inf, at_minus_inf]), equal_nan=True)
    torch.testing.assert_close(
        y[3:5].cpu().double(), ACTIVATIONS[name][0](x[3:5].cpu().double()), atol=1e-30, rtol=1e-6
    )


@pytest.mark.parametrize("name", ["gelu", "sigmoid", "selu"])
def test_drawn_slopes_have_the_derivative_as_mean(name, device):
    points = torch.linspace(-3, 3, 31, device=device)
    draws = 4096
    levels = torch.tensor(CODES[name]["unbiased"].levels, dtype=torch.float64, device=device)
    _, words = forward(points.expand(draws, -1), name, "unbiased", seeded(device, 11))
    drawn = levels[codes(words, points.expand(draws, -1).contiguous()).long()]
    expected = ACTIVATIONS[name][1](points.double())
    above = torch.searchsorted(levels, expected).clamp(1, 3)
    # two values, low and high with mean d, have variance (high - d)(d - low)
    deviation = ((levels[above] - expected) * (expected - levels[above - 1])).clamp(min=0).sqrt()
    assert ((drawn.mean(0) - expected).abs() <= 5 * deviation / math.sqrt(draws) + 1e-6).all()
    assert (drawn.unique().numel()) == 4


def test_a_seed_fixes_the_codes(device):
    x = sample(64, 33, device=device)
    first, same, other, upper = (
        forward(x, "gelu", "unbiased", seeded(device, seed))[1] for seed in (5, 5, 6, 5 + 2**33)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other) and not torch.equal(first, upper)
    assert torch.equal(first, reference_forward(x, "gelu", "unbiased", seeded(device, 5))[1])


def test_noise_is_uniform(device):
    drawn = noise(seeded(device), 100_001).double()
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = drawn.mul(16).long().bincount(minlength=16)
    # chi-squared with 15 degrees of freedom exceeds 45 once in 10^4
    assert ((counts - 100_001 / 16).square() / (100_001 / 16)).sum() < 45


def test_references_take_float64(device):
    x = sample(33, device=device).double()
    y, words = reference_forward(x, "gelu", "lloyd")
    assert y.dtype == torch.float64 and not activation.supports(torch.float64)
    assert reference_backward(x, words, "gelu", "lloyd").dtype == torch.float64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="more than 2^31 elements take 13 GB of GPU memory")
@pytest.mark.parametrize("scheme", ["relu3", "unbiased"])
def test_more_than_int32_elements(scheme, device):
    torch.use_deterministic_algorithms(False)
    x = torch.empty(2**31 + 16 * 1000 + 5, dtype=torch.bfloat16, device=device)
    tail = sample(16 * 500 + 5, dtype=torch.bfloat16, device=device)
    x[-tail.numel() :] = tail
    y, words = forward(x, "gelu", scheme, seeded(device))
    within(
        y[-tail.numel() :],
        torch.nn.functional.gelu(tail.double()),
        OPERATIONS * UNIT * (1 + tail.double().abs()),
        x.dtype,
    )
    found = codes(words[-501:], tail)
    if scheme == "relu3":
        assert torch.equal(found, codes(reference_forward(tail, "gelu", scheme)[1], tail))
    del y
    dx = backward(x, words, "gelu", scheme)
    expected = tail.double() * slope(found, CODES["gelu"][scheme].levels, torch.float64)
    within(dx[-tail.numel() :], expected, 2 * UNIT * expected.abs(), x.dtype)
