"""The operators with kernels: torch's own checks, shapes and strides on fake tensors, gradients in eager mode."""

import subprocess
import sys

import pytest
import torch
from rounding import UNIT, within
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.library import opcheck

import graphopt.kernels  # noqa: F401  (registers the operators)
from graphopt.lowering.activations import ACTIVATIONS
from graphopt.lowering.code_tables import CODES
from graphopt.lowering.codes import SCHEMES, slope
from graphopt.lowering.formulas import unpack
from graphopt.memory import saved_bytes

own = torch.ops.graphopt
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 2),
    "sliced": lambda x: x[..., ::2],
    "expanded": lambda x: x[:1].expand(4, -1, -1, -1),
}


def sample(*shape, device, dtype=torch.float32):
    return torch.randn(shape).to(device, dtype)


def activation_arguments(x, name, scheme):
    return x, name, scheme, torch.tensor(5, device=x.device) if scheme == "unbiased" else None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_opcheck_activation(scheme, layout, device):
    x = LAYOUTS[layout](sample(2, 3, 4, 6, device=device))
    opcheck(own.activation_forward, activation_arguments(x.detach().requires_grad_(), "gelu", scheme))
    y, code = own.activation_forward(*activation_arguments(x, "gelu", scheme))
    opcheck(own.activation_backward, (torch.randn_like(y), code, "gelu", scheme))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("ndim", [1, 2, 4])
def test_opcheck_norm(ndim, affine, layout, device):
    x = LAYOUTS[layout](sample(2, 3, 4, 6, device=device))
    shape = x.shape[-ndim:]
    weight, bias = (sample(*shape, device=device) for _ in range(2)) if affine else (None, None)
    for z_dtype in (torch.float32, torch.bfloat16):
        arguments = (x, shape, weight, bias, 1e-5, True, z_dtype)
        _, z, rstd = own.norm_forward(*arguments)
        opcheck(
            own.norm_forward, [each.detach().requires_grad_() if torch.is_tensor(each) else each for each in arguments]
        )
        opcheck(own.norm_backward, (torch.randn_like(x), z, rstd, weight, ndim, True, torch.float32, [affine, True]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_opcheck_groups(symmetric, layout, device):
    x = LAYOUTS[layout](sample(2, 3, 4, 6, device=device))
    for seed in (None, torch.tensor(5, device=device)):
        opcheck(own.group_encode, (x.detach().requires_grad_(), 4, 32, symmetric, seed))
        codes, *kept = own.group_encode(x, 4, 32, symmetric, seed)
        opcheck(own.group_decode, (codes, kept, seed, 4, x.shape, torch.bfloat16))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("symbolic", [False, True])
def test_fake_tensors_have_the_real_strides(symbolic, layout, device):
    x = LAYOUTS[layout](sample(4, 3, 5, 8, device=device))
    weight = sample(x.shape[-1], device=device)
    y, code = own.activation_forward(x, "silu", "relu3", None)
    normed = own.norm_forward(x, x.shape[-1:], weight, None, 1e-5, True, torch.bfloat16)
    real = (y, code, own.activation_backward(x, code, "silu", "relu3"), *normed)
    real += own.norm_backward(x, *normed[1:], weight, 1, True, torch.float16, [True, False])
    codes, *kept = own.group_encode(x, 2, 16, False, None)
    real += (codes, *kept, own.group_decode(codes, kept, None, 2, x.shape, torch.float16))
    mode = FakeTensorMode(shape_env=ShapeEnv() if symbolic else None)
    with mode:
        x, weight = (mode.from_tensor(each, static_shapes=not symbolic) for each in (x, weight))
        y, code = own.activation_forward(x, "silu", "relu3", None)
        normed = own.norm_forward(x, x.shape[-1:], weight, None, 1e-5, True, torch.bfloat16)
        fake = (y, code, own.activation_backward(x, code, "silu", "relu3"), *normed)
        fake += own.norm_backward(x, *normed[1:], weight, 1, True, torch.float16, [True, False])
        codes, *kept = own.group_encode(x, 2, 16, False, None)
        fake += (codes, *kept, own.group_decode(codes, kept, None, 2, x.shape, torch.float16))
        for found, expected in zip(fake, real):
            assert (
                tuple(map(int, found.shape)) == expected.shape and tuple(map(int, found.stride())) == expected.stride()
            )
            assert (found.dtype, found.device) == (expected.dtype, expected.device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name, scheme", [("gelu", "relu3"), ("mish", "lloyd"), ("sigmoid", "unbiased")])
def test_activation_trains_with_the_step_function(name, scheme, dtype, layout, device):
    x = LAYOUTS[layout](sample(4, 3, 5, 8, device=device, dtype=dtype)).detach().requires_grad_()
    y, words = own.activation_forward(*activation_arguments(x, name, scheme))
    # a gradient laid out in another way than y
    grad = sample(*reversed(x.shape), device=device, dtype=dtype).permute(3, 2, 1, 0)
    y.backward(grad)
    order = sorted(range(y.dim()), key=lambda dim: -y.stride(dim))
    code = unpack(words, [y.shape[dim] for dim in order], 2, torch.int32).permute(
        [order.index(dim) for dim in range(4)]
    )
    expected = grad.double() * slope(code, CODES[name][scheme].levels, torch.float64)
    within(x.grad, expected, 2 * UNIT * expected.abs(), dtype)
    within(y.detach(), ACTIVATIONS[name][0](x.detach().double()), 16 * UNIT * (1 + x.detach().double().abs()), dtype)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_activation_saves_its_code_alone(scheme, device):
    x = sample(64, 100, device=device).requires_grad_()
    kept = saved_bytes(lambda: own.activation_forward(*activation_arguments(x, "gelu", scheme)), [x])
    assert kept == 64 * 100 * 2 // 8


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("z_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("centred", [True, False])
def test_norm_trains_from_z(centred, z_dtype, affine, device):
    x = sample(6, 5, 32, device=device).requires_grad_()
    weight, bias = (sample(32, device=device).requires_grad_() if affine else None for _ in range(2))
    outputs = []
    forward = lambda: outputs.append(own.norm_forward(x, (32,), weight, bias, 1e-5, centred, z_dtype))  # noqa: E731
    assert saved_bytes(forward, [x] + [weight] * affine) == 6 * 5 * (32 * z_dtype.itemsize + 4)
    y, z, rstd = outputs[0]
    assert not z.requires_grad and not rstd.requires_grad
    grad = sample(6, 5, 32, device=device)
    y.backward(grad)

    wide = [None if each is None else each.detach().double().requires_grad_() for each in (x, weight, bias)]
    h = wide[0] - wide[0].mean(-1, keepdim=True) if centred else wide[0]
    expected = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5)
    expected = expected * wide[1] + wide[2] if affine else expected
    expected.backward(grad.double())
    # z is kept rounded; each gradient is a sum of products with z and of at most 32 terms
    error = 64 * (torch.finfo(z_dtype).eps if z_dtype == torch.bfloat16 else UNIT)
    for found, model in zip((x, weight, bias) if affine else (x,), wide):
        torch.testing.assert_close(found.grad.double(), model.grad, rtol=0, atol=error * model.grad.abs().max().item())


def test_a_norm_without_parameters_keeps_its_output(device):
    # what reads y, as the next linear does, keeps the same memory
    x, kept = sample(4, 8, device=device).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each.data_ptr()) or each, lambda each: each):
        y, _, rstd = own.norm_forward(x, (8,), None, None, 1e-5, True, torch.float32)
    assert kept == [y.data_ptr(), rstd.data_ptr()]


def test_frozen_parameters_get_no_gradient(device):
    x, weight, bias = sample(4, 8, device=device).requires_grad_(), *(sample(8, device=device) for _ in range(2))
    y, _, _ = own.norm_forward(x, (8,), weight, bias.requires_grad_(), 1e-5, True, torch.float32)
    y.sum().backward()
    assert weight.grad is None and torch.equal(bias.grad, torch.full_like(bias, 4))


def test_hooks_save_codes(device):
    x, weight = (sample(64, 64, device=device).requires_grad_() for _ in range(2))

    def encode(saved):
        codes, *kept = own.group_encode(saved, 4, 64, True, None)
        assert not any(each.requires_grad for each in (codes, *kept))
        return codes, kept

    def decode(parts):
        return own.group_decode(*parts, None, 4, (64, 64), torch.float32)

    def run():
        with torch.autograd.graph.saved_tensors_hooks(encode, decode):
            return x * weight

    run().sum().backward()
    assert torch.equal(x.grad, decode(encode(weight))) and torch.equal(weight.grad, decode(encode(x)))


def test_errors_name_what_was_given(device):
    x = sample(4, 6, device=device)
    for name, scheme, seed, error, message in (
        ("gleu", "relu3", None, ValueError, "activation 'gleu' is not one of 'gelu'"),
        ("gelu", "relu4", None, ValueError, "scheme 'relu4' is not one of 'relu3'"),
        ("gelu", "unbiased", None, RuntimeError, "one int64 on .*, not None"),
        ("gelu", "unbiased", x, RuntimeError, "one int64 on .*, not torch.float32"),
    ):
        with pytest.raises(error, match=message):
            own.activation_forward(x, name, scheme, seed)
    with pytest.raises(RuntimeError, match=r"code is torch.int32 \(1,\) on .*, not int32 \(2,\)"):
        own.activation_backward(x, torch.zeros(1, dtype=torch.int32, device=device), "gelu", "relu3")
    with pytest.raises(RuntimeError, match=r"normalized_shape \(4,\) is not the end of x's shape \(4, 6\)"):
        own.norm_forward(x, (4,), None, None, 1e-5, True, torch.float32)
    with pytest.raises(RuntimeError, match=r"weight is torch.float32 \(4,\) on .*, not \(6,\)"):
        own.norm_forward(x, (6,), x[:, 0], None, 1e-5, True, torch.float32)
    with pytest.raises(RuntimeError, match=r"rstd is torch.float32 \(4,\) on .*, not \(4, 1\)"):
        own.norm_backward(x, x, x[:, 0], None, 1, True, torch.float32, [True, True])


def test_errors_of_groups_name_what_was_given(device):
    x = sample(4, 64, device=device)
    codes, *kept = own.group_encode(x, 4, 64, True, None)
    for arguments, error, message in (
        ((x, 3, 64, True, None), ValueError, "bits 3 is not one of 8, 4, 2"),
        ((x, 4, 48, True, None), ValueError, "group 48 is not one of 8, 16"),
        ((x.int(), 4, 64, True, None), RuntimeError, "x is torch.int32, not floating point"),
        ((x, 4, 64, True, x), RuntimeError, "one int64 on .*, not torch.float32"),
    ):
        with pytest.raises(error, match=message):
            own.group_encode(*arguments)
    for arguments, message in (
        ((codes.int(), kept, None, 4, x.shape, x.dtype), r"codes are torch.int32 \(4, 32\)"),
        ((codes, kept, None, 4, (5, 64), x.dtype), r"4 groups of 64 are not those of shape \(5, 64\)"),
        ((codes, [], None, 4, x.shape, x.dtype), "one number or two, not 0"),
        ((codes, [kept[0][:2]], None, 4, x.shape, x.dtype), r"\(2, 1\) on .*, not \(4, 1\)"),
        ((codes, [kept[0].float()], None, 4, x.shape, x.dtype), "torch.float32.*, not bfloat16"),
        ((codes, kept, x, 4, x.shape, x.dtype), "one int64 on .*, not torch.float32"),
        ((codes, kept, None, 4, x.shape, torch.int32), "dtype is torch.int32, not floating point"),
    ):
        with pytest.raises(RuntimeError, match=message):
            own.group_decode(*arguments)


def test_references_run_where_triton_is_missing():
    script = """
import sys
sys.modules["triton"] = None
import torch
import graphopt.lowering.ops
from graphopt.kernels import activation, group_quant, norm
assert not activation.supports(torch.float32) and not norm.supports(64, torch.float32)
assert not group_quant.supports(torch.float32, 1)
torch.ops.graphopt.group_encode(torch.ones(3), 4, 64, True, None)
torch.ops.graphopt.activation_forward(torch.ones(3), "gelu", "relu3", None)
torch.ops.graphopt.norm_forward(torch.ones(3, 4), (4,), None, None, 1e-5, True, torch.float32)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_double_backward_is_refused():
    x = torch.randn(6, 8, dtype=torch.double, requires_grad=True)
    for y in (
        torch.ops.graphopt.norm_forward(x, [8], None, None, 1e-5, True, torch.double)[0],
        torch.ops.graphopt.activation_forward(x, "silu", "lloyd", None)[0],
    ):
        (gradient,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            gradient.pow(2).sum().backward()


def test_integers_are_refused():
    x, code = torch.randn(4, 8), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="z_dtype"):
        torch.ops.graphopt.norm_forward(x, [8], None, None, 1e-5, True, torch.int32)
    with pytest.raises(RuntimeError, match="grad"):
        torch.ops.graphopt.activation_backward(x.long(), code, "gelu", "relu3")
