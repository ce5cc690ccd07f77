"""docs/limits.md, row by row: what is unusual compiles as under Inductor, or says what is wrong."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from training import EXACT

BACKENDS = ["lowmem_eager", pytest.param("lowmem", marks=pytest.mark.slow)]


def network(width=64):
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Doubled(torch.autograd.Function):
    """A derivative of the user's own: twice that of a sine."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0].cos()


def complex_numbers(model):
    first = nn.Linear(64, 64, dtype=torch.complex64)
    x = torch.randn(8, 64, dtype=torch.complex64)
    return lambda: model((first(x) * torch.fft.fft(x)).abs())


def quantised_input(model):
    x = torch.quantize_per_tensor(torch.randn(64, 64), 0.05, 0, torch.qint8)
    return lambda: model(x.dequantize())


def eight_bit_floats(model):
    x = torch.randn(64, 64)
    return lambda: model(x.to(torch.float8_e4m3fn).float())


def sparse_gradient(model):
    table = nn.Embedding(100, 64, sparse=True)
    rows = torch.randint(0, 100, (8, 16))
    return lambda: model(table(rows))


def sparse_input(model):
    x = torch.eye(64).to_sparse()
    return lambda: model(torch.sparse.mm(x, model[1].weight[:64]))


def ragged_batch(model):
    x = torch.nested.nested_tensor([torch.randn(30, 64), torch.randn(50, 64)], layout=torch.jagged)
    return lambda: model(x).values()


def no_tokens(model):
    x = torch.randn(0, 64)
    return lambda: model(x)


def nan_in_the_input(model):
    x = torch.randn(64, 64)
    x[0, 0] = torch.nan
    return lambda: model(x).nan_to_num()


def own_derivative(model):
    x = torch.randn(64, 64)
    return lambda: Doubled.apply(model(x))


def vectorised(model):
    x = torch.randn(4, 16, 64)
    return lambda: torch.vmap(model)(x)


def permuted_in_memory(model):
    x = torch.randn(64, 16, 8).permute(2, 1, 0)
    return lambda: model(x)


def written_in_place(model):
    x = torch.randn(64, 64)
    return lambda: F.relu_(model(x.clone().mul_(2)).add_(1))


UNUSUAL = [
    complex_numbers, quantised_input, eight_bit_floats, sparse_gradient, sparse_input, ragged_batch, no_tokens,
    nan_in_the_input, own_derivative, vectorised, permuted_in_memory, written_in_place,
]  # fmt: skip


WITH_INDUCTOR = [sparse_gradient, written_in_place]


@pytest.mark.parametrize(
    "case, backend",
    [(case, "lowmem_eager") for case in UNUSUAL]
    + [pytest.param(case, "lowmem", marks=pytest.mark.slow) for case in WITH_INDUCTOR],
    ids=lambda each: getattr(each, "__name__", each),
)
def test_what_is_unusual_has_eager_gradients(case, backend):
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        forward = case(model)
        found = torch.compile(forward, backend=backend, options=EXACT, dynamic=False)()
        mine = torch.autograd.grad(found.square().sum(), model[1].weight)[0]
        eager = torch.autograd.grad(forward().square().sum(), model[1].weight)[0]
    # float32, sums of up to 128 products in another order
    torch.testing.assert_close(
        mine, eager, rtol=1e-4, atol=1e-5 * float(eager.abs().nan_to_num().max()), equal_nan=True
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("preset", ["exact", "compressed", "smallest"])
def test_every_floating_dtype_trains(dtype, preset):
    model, x = network().to(dtype), torch.randn(64, 64, dtype=dtype)
    eager = torch.autograd.grad(model(x).double().square().mean(), model[1].weight)[0].double()
    compiled = torch.compile(model, backend="lowmem_eager", options={"preset": preset})
    found = torch.autograd.grad(compiled(x).double().square().mean(), model[1].weight)[0].double()
    # a rounding or two of the dtype, and what the preset's codecs may change, as in tests/test_check.py
    allowed = 4 * torch.finfo(dtype).eps + {"exact": 0.0, "compressed": 0.02, "smallest": 0.3}[preset]
    assert (found - eager).norm() < allowed * eager.norm()


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_without_contents_stay_so(backend):
    """The meta device: a device that nothing is known about, too."""
    model = network().to("meta")
    torch.compile(model, backend=backend)(torch.randn(64, 64, device="meta")).sum().backward()
    assert model[1].weight.grad.device.type == "meta"


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_is_refused_in_torchs_words(backend):
    model, x = network(), torch.randn(8, 64, requires_grad=True)
    y = torch.compile(model, backend=backend)(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_may_be_kept_for_a_second_backward(backend):
    model, x = network(), torch.randn(64, 64)
    loss = torch.compile(model, backend=backend)(x).square().sum()
    loss.backward(retain_graph=True)
    once = model[1].weight.grad.clone()
    loss.backward()
    assert torch.equal(model[1].weight.grad, 2 * once)


def test_hooks_of_the_user_run():
    model, seen = network(), []
    model[1].register_full_backward_hook(lambda *each: seen.append("module"))
    model[1].weight.register_hook(lambda gradient: gradient * 2)
    x = torch.randn(64, 64)
    torch.compile(model, backend="lowmem_eager", options=EXACT)(x).square().sum().backward()
    found = model[1].weight.grad.clone()
    model.zero_grad()
    model(x).square().sum().backward()
    assert seen == ["module", "module"]
    torch.testing.assert_close(found, model[1].weight.grad, rtol=1e-4, atol=1e-3)


def test_what_is_saved_may_be_moved_to_the_host():
    model, x = network(), torch.randn(64, 64)
    expected = torch.autograd.grad(model(x).square().sum(), model[1].weight)[0]
    with torch.autograd.graph.save_on_cpu():
        loss = torch.compile(model, backend="lowmem_eager", options=EXACT)(x).square().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, model[1].weight)[0], expected, rtol=1e-4, atol=1e-3)


def test_gradients_of_gradients_by_torch_func_are_compiled():
    """torch.func makes them within one forward graph, which is not rewritten."""
    model, x = network(), torch.randn(8, 64)
    parameters = {name: each.detach() for name, each in model.named_parameters()}

    def loss(parameters, row):
        return torch.func.functional_call(model, parameters, (row,)).square().sum()

    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))
    found = torch.compile(per_sample, backend="lowmem_eager")(parameters, x)
    torch.testing.assert_close(found, per_sample(parameters, x), rtol=1e-4, atol=1e-4)
