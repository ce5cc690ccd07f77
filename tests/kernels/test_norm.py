"""Norm kernels against `formulas` in float64."""

import math

import pytest
import torch
from rounding import UNIT, rounding, within

from graphopt.kernels import norm

# numpy speaks up where the interpreter subtracts infinities as the GPU does
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# one element, a row to few threads, no multiple of 16, past a power of two, two kernels in backward
WIDTHS = (1, 15, 16, 17, 64, 767, 1025, 4100)
EPS = 1e-5


def sample(*shape, dtype=torch.float32, device="cpu"):
    return (torch.randn(*shape) * 2 + 0.5).to(device, dtype)


def affine(shape, dtype, device, weight=True, bias=True):
    return (sample(*shape, dtype=dtype, device=device) if wanted else None for wanted in (weight, bias))


def wide(*tensors):
    return (None if each is None else each.double() for each in tensors)


def check_forward(x, shape, weight, bias, centred, z_dtype):
    y, z, rstd = norm.forward(x, shape, weight, bias, EPS, centred, z_dtype)
    expected = norm.reference_forward(*wide(x), shape, *wide(weight, bias), EPS, centred, torch.float64)
    for found, model in zip((y, z, rstd), norm.reference_forward(x, shape, weight, bias, EPS, centred, z_dtype)):
        assert (found.shape, found.stride(), found.dtype) == (model.shape, model.stride(), model.dtype)
    # means of n terms by a tree of log2(n) roundings, then about eight operations; what cancels in x - mean is rounded
    # relative to x
    inner = tuple(range(-len(shape), 0))
    steps = 8 + math.prod(shape).bit_length()
    largest = x.double().abs().amax(inner, keepdim=True) * expected[2]
    error = steps * UNIT * (1 + largest)
    within(z, expected[1], error.expand(z.shape), z_dtype)
    slope = 1.0 if weight is None else weight.double().abs()
    within(y, expected[0], error * slope + 4 * UNIT * expected[0].abs() + 4 * UNIT, x.dtype)
    # an error of mean is one of the variance as well
    within(rstd, expected[2], error * expected[2], torch.float32)
    return z, rstd


def check_backward(grad, z, rstd, weight, ndim, centred, dtype, mask=(True, True)):
    found = norm.backward(grad, z, rstd, weight, ndim, centred, dtype, mask)
    expected = norm.reference_backward(*wide(grad, z, rstd, weight), ndim, centred, torch.float64, mask)
    models = norm.reference_backward(grad, z, rstd, weight, ndim, centred, dtype, mask)
    for each, model in zip(found, models):
        assert (each.shape, each.stride(), each.dtype) == (model.shape, model.stride(), model.dtype)
    inner, outer = tuple(range(-ndim, 0)), tuple(range(grad.dim() - ndim))
    dy, zs = grad.double(), z.double()
    dz = dy if weight is None else dy * weight.double()
    terms = dz.abs() + zs.abs() * (dz * zs).abs().mean(inner, keepdim=True) + dz.abs().mean(inner, keepdim=True)
    within(found[0], expected[0], 24 * UNIT * terms * rstd.double(), dtype)
    rows = grad.numel() // max(1, grad[(0,) * len(outer)].numel())
    for each, model, terms, wanted in zip(found[1:], expected[1:], (dy * zs, dy), mask):
        if wanted:
            # float32 sums over the rows, in any order
            within(each, model, (rows + 4) * UNIT * terms.abs().sum(outer), each.dtype)
        else:
            assert each.numel() == 0
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("width", WIDTHS)
def test_any_width(width, centred, dtype, device):
    x, (weight, bias) = sample(3, 2, width, dtype=dtype, device=device), affine((width,), dtype, device)
    z, rstd = check_forward(x, (width,), weight, bias, centred, dtype)
    check_backward(sample(3, 2, width, dtype=dtype, device=device), z, rstd, weight, 1, centred, dtype)


@pytest.mark.parametrize("rows, width", [(1, 48), (2, 48), (31, 48), (700, 48), (40, 1040), (40, 4100)])
def test_any_number_of_rows(rows, width, device):
    # several rows to a program, and several rounds of every program where the device has few
    x, (weight, bias) = sample(rows, width, device=device), affine((width,), torch.float32, device)
    z, rstd = check_forward(x, (width,), weight, bias, True, torch.float32)
    check_backward(sample(rows, width, device=device), z, rstd, weight, 1, True, torch.float32)


def test_a_wide_row_is_read_in_chunks(device):
    assert not norm.fused(8208) and norm.supports(8208)
    x, (weight, bias) = sample(2, 8208, device=device), affine((8208,), torch.float32, device)
    z, rstd = check_forward(x, (8208,), weight, bias, True, torch.bfloat16)
    check_backward(sample(2, 8208, device=device), z, rstd, weight, 1, True, torch.float32)


@pytest.mark.parametrize("parameters", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("mask", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("width", [40, 4100])
def test_parameters_that_are_missing_or_frozen(width, mask, parameters, device):
    x, (weight, bias) = sample(5, width, device=device), affine((width,), torch.float32, device, *parameters)
    z, rstd = check_forward(x, (width,), weight, bias, True, torch.float32)
    check_backward(sample(5, width, device=device), z, rstd, weight, 1, True, torch.float32, mask)


@pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])
def test_mixed_dtypes(centred, device):
    # as autocast has it: x and the parameters float32, z in the dtype of the next linear
    x, (weight, bias) = sample(6, 96, dtype=torch.bfloat16, device=device), affine((96,), torch.float32, device)
    z, rstd = check_forward(x, (96,), weight, bias, centred, torch.float16)
    check_backward(sample(6, 96, dtype=torch.float32, device=device), z, rstd, weight, 1, centred, torch.bfloat16)


@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 5, 7)])
def test_several_normalised_dims(shape, device):
    x, (weight, bias) = sample(3, 5, 7, device=device), affine(shape, torch.float32, device)
    z, rstd = check_forward(x, shape, weight, bias, True, torch.float32)
    check_backward(sample(3, 5, 7, device=device), z, rstd, weight, len(shape), True, torch.float32)


LAYOUTS = {
    "rows apart": lambda x: x[..., :33],
    "offset": lambda x: x[1:, :, 3:],
    "every second row": lambda x: x[:, ::2],
    "every second column": lambda x: x[..., ::2],
    "transposed rows": lambda x: x.transpose(0, 1),
    "transposed columns": lambda x: x.transpose(1, 2),
    "expanded rows": lambda x: x[:1, :1].expand(4, 6, -1),
    "expanded columns": lambda x: x[..., :1].expand(-1, -1, 40),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, device):
    x, grad = (LAYOUTS[layout](sample(4, 6, 48, device=device)) for _ in range(2))
    width = x.shape[-1]
    weight, bias = (each[::2] for each in affine((2 * width,), torch.float32, device))
    z, rstd = check_forward(x, (width,), weight, bias, True, torch.float32)
    z = LAYOUTS[layout](torch.zeros(4, 6, 48, device=device).normal_())
    check_backward(grad, z, rstd, weight, 1, True, torch.float32)


def test_no_rows(device):
    weight, bias = affine((9,), torch.float32, device)
    y, z, rstd = norm.forward(sample(0, 4, 9, device=device), (9,), weight, bias, EPS, True, torch.bfloat16)
    assert (y.shape, z.shape, rstd.shape) == ((0, 4, 9), (0, 4, 9), (0, 4, 1))
    dx, dweight, dbias = norm.backward(y, z, rstd, weight, 1, True, torch.float32, (True, True))
    assert dx.shape == (0, 4, 9) and not dweight.any() and not dbias.any()


def test_nan_stays_in_its_row(device):
    x, (weight, bias) = sample(20, 33, device=device), affine((33,), torch.float32, device)
    y0, z0, rstd0 = norm.forward(x, (33,), weight, bias, EPS, True, torch.float32)
    x[3, 5], x[7, 2] = float("nan"), float("inf")
    y, z, rstd = norm.forward(x, (33,), weight, bias, EPS, True, torch.float32)
    others = [row for row in range(20) if row not in (3, 7)]
    assert torch.equal(y[others], y0[others]) and torch.equal(rstd[others], rstd0[others])
    assert y[[3, 7]].isnan().all() and z[[3, 7]].isnan().all()
    assert torch.equal(z[others], z0[others])


def test_a_constant_row_is_normalised_to_the_bias(device):
    weight, bias = affine((100,), torch.float32, device)
    y, z, rstd = norm.forward(torch.full((2, 100), 3.0, device=device), (100,), weight, bias, EPS, True, torch.float32)
    # the mean of equal numbers is off by log2(100) roundings at most
    bound = 8 * 3 * UNIT * EPS**-0.5
    assert z.abs().max() <= bound
    torch.testing.assert_close(y, bias.expand(2, -1), rtol=0, atol=bound * weight.abs().max().item())
    torch.testing.assert_close(rstd, torch.full_like(rstd, EPS**-0.5))


def test_gradients_are_the_same_on_every_run(device):
    grad, z, rstd = sample(300, 64, device=device), sample(300, 64, device=device), sample(300, 1, device=device)
    first, second = (norm.backward(grad, z, rstd, None, 1, True, torch.float32, (True, True)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second))


def test_z_is_rounded_from_what_y_is_made_of(device):
    x = sample(8, 64, device=device)
    y, z, _ = norm.forward(x, (64,), None, None, EPS, True, torch.bfloat16)
    assert ((y - z.float()).abs() <= rounding(torch.bfloat16, device) * y.abs()).all()
    assert not torch.equal(y, z.float())


def test_what_is_not_supported():
    assert not norm.supports(64, torch.float64) and not norm.supports(0) and not norm.supports(32784)
    assert not norm.supports(8193) and norm.supports(8192) and norm.supports(32768, torch.float16, None)


@pytest.mark.parametrize("rows, stride", [(2, 2**31 + 16), (4, 2**30 + 16)])
def test_rows_further_apart_than_int32(rows, stride, device):
    # gigabytes that are mapped but, but for a few rows, never touched; the second stride itself fits into int32
    torch.utils.deterministic.fill_uninitialized_memory = False
    width = 40
    x = torch.empty((rows - 1) * stride + width, dtype=torch.bfloat16, device=device)
    x = x.as_strided((rows, width), (stride, 1)).copy_(sample(rows, width, dtype=torch.bfloat16, device=device))
    weight, bias = affine((width,), torch.float32, device)
    z, rstd = check_forward(x, (width,), weight, bias, True, torch.float32)
    check_backward(x, z, rstd, weight, 1, True, torch.bfloat16)
    check_backward(z, x, rstd, weight, 1, False, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="more than 2^31 elements take 17 GB of GPU memory")
def test_more_than_int32_elements(device):
    torch.utils.deterministic.fill_uninitialized_memory = False
    width = 4096
    x = torch.empty(2**19 + 8, width, dtype=torch.bfloat16, device=device)
    x.normal_()
    y, z, rstd = norm.forward(x, (width,), None, None, EPS, True, torch.bfloat16)
    expected, _, _ = norm.reference_forward(x[-8:].double(), (width,), None, None, EPS, True, torch.float64)
    within(y[-8:], expected, torch.full_like(expected, 64 * UNIT), torch.bfloat16)
    dx, *_ = norm.backward(x, z, rstd, None, 1, True, torch.bfloat16, (False, False))
    expected, *_ = norm.reference_backward(x[-8:].double(), z[-8:].double(), rstd[-8:].double(), None, 1, True,
                                           torch.float64, (False, False))  # fmt: skip
    within(dx[-8:], expected, torch.full_like(expected, 64 * UNIT), torch.bfloat16)
