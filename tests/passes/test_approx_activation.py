"""approx_activation: the slope comes from two bits where that saves bytes, and the forward does not change."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from training import EXACT, distance, step

import graphopt
from graphopt.lowering.code_tables import CODES
from graphopt.lowering.codes import SCHEMES
from graphopt.options import Options
from graphopt.passes import approx_activation, decompose
from graphopt.pipeline import bind

FUNCTIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "elu": F.elu,
    "selu": F.selu,
    "hardswish": F.hardswish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
WIDTH = 48


class Net(nn.Module):
    """An activation between two linears; the second is frozen, so that its input is kept for nobody."""

    def __init__(self, function=F.gelu, train_second=False):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        nn.init.eye_(self.first.weight)  # what the activation reads is the input itself, exactly, in every dtype
        self.second.requires_grad_(train_second)
        self.function = function

    def forward(self, x):
        return self.second(self.function(self.first(x)))


class Steps(torch.autograd.Function):
    """f(x), with levels[number of thresholds below what `of` makes of x] for f'(x); float64."""

    @staticmethod
    def forward(ctx, x, function, of, thresholds, levels):
        ctx.save_for_backward(x)
        ctx.rest = of, thresholds, torch.tensor(levels, dtype=x.dtype)
        return function(x)

    @staticmethod
    def backward(ctx, dy):
        of, thresholds, levels = ctx.rest
        return dy * levels[torch.bucketize(of(*ctx.saved_tensors), thresholds)], None, None, None, None


def derivative(function):
    def of(x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(function(x).sum(), x)[0]

    return of


# backward reads what these give, so a code is one of f(x) as it was rounded; f is monotone, so thresholds carry over
OF_OUTPUT = {"tanh": lambda y: 1 - y * y, "sigmoid": lambda y: y * (1 - y)}


def step_function(name, scheme, dtype):
    """Forward and backward of an activation under a scheme without noise, by the definition and in float64."""
    function, row = FUNCTIONS[name], CODES[name][scheme]
    thresholds = torch.tensor(row.thresholds, dtype=torch.float64)
    of = derivative(function) if scheme == "lloyd" else lambda x: x
    if name in OF_OUTPUT:
        rounded = lambda x: function(x).to(dtype).double()  # noqa: E731
        of = (lambda x: OF_OUTPUT[name](rounded(x))) if scheme == "lloyd" else rounded
        thresholds = thresholds if scheme == "lloyd" else function(thresholds)
    return lambda x: Steps.apply(x, function, of, thresholds, row.levels)


def records(model, *inputs, **options):
    saved, found, _ = graphopt.capture(model, *inputs).lowmem(Options(**EXACT | options))
    return saved, next(record for record in found if record.name == "approx_activation")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", ["relu3", "lloyd"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_gradient_is_that_of_the_step_function(name, scheme, dtype):
    model, x = Net(FUNCTIONS[name]).to(dtype), torch.randn(64, WIDTH).to(dtype)
    _, gradients, saved = step(model, (x,), options={"approx_activation": scheme})
    assert saved == x.numel() // 4  # two bits an element and nothing else

    exact = Net(step_function(name, scheme, dtype)).double()
    exact.load_state_dict(model.state_dict())
    _, expected, _ = step(exact, (x.double(),), backend=None)
    # y, dy and dx are rounded once each, and so is every weight gradient, a sum in float32: the errors of single
    # elements are at most eps / 2 and largely independent, so the norm's is less than 2 eps. In float32 the matrix
    # products' own sums of 48 and 64 terms add as much again and more. x is exact, so no slope is on another side of
    # its threshold; an f' computed in float32 is, with a chance of about 1e-6 an element.
    assert distance(gradients, expected) < (2 if dtype.itemsize == 2 else 16) * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["gelu", "silu", "tanh", "selu"])
def test_drawn_slopes_are_unbiased(name):
    """The error of the mean over K draws falls as 1 / sqrt(K)."""
    model, x, draws = Net(FUNCTIONS[name]), torch.randn(256, WIDTH), 64
    _, exact, _ = step(model, (x,))
    compiled = torch.compile(model, backend="lowmem_eager", options=EXACT | {"approx_activation": "unbiased"})
    drawn = []
    for _ in range(draws):
        model.zero_grad()
        compiled(x).square().mean().backward()
        drawn.append(model.first.weight.grad)
    error = {k: distance({"first.weight": sum(drawn[:k]) / k}, exact) for k in (1, 4, 16, draws)}
    # a squared error sums 2304 nearly independent ones, so it scatters by sqrt(2 / 2304) = 3 %, the error by half of
    # it; the bound is five times that for each side of the ratio. A bias of b would leave an error of b.
    for k in (4, 16, draws):
        assert error[k] * math.sqrt(k) == pytest.approx(error[1], rel=0.15)
    assert error[1] > 0.01


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("backend", ["lowmem_eager", pytest.param("lowmem", marks=pytest.mark.slow)])
def test_forward_is_bit_equal_to_exact(backend, scheme):
    # run node by node, random numbers come in the order of the nodes, and codes draw some between dropout's
    dropout = nn.Dropout(0.1 if backend == "lowmem" else 0.0)
    model = nn.Sequential(nn.LayerNorm(WIDTH), Net(), dropout, nn.RMSNorm(WIDTH), Net(F.silu), dropout).bfloat16()
    x = torch.randn(64, WIDTH).bfloat16()
    exact, _, kept = step(model, (x,), backend=backend)
    coded, _, saved = step(model, (x,), backend=backend, options={"approx_activation": scheme})
    assert saved < kept
    assert torch.equal(exact, coded)


def test_a_code_that_comes_on_top_is_not_made():
    """The next linear is trained: backward keeps x to make f(x) anew, and has the slope from it for nothing."""
    for scheme in SCHEMES:
        saved, record = records(Net(train_second=True), torch.randn(64, WIDTH), approx_activation=scheme)
        assert not record.fired and "kept anyway" in record.left_alone[0].text
        assert all(each.dtype == torch.float32 for each in saved)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32).requires_grad_(False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("preset", ["exact", "paper"])
def test_a_gate_factor_stays_exact(preset):
    _, record = records(Gated(), torch.randn(64, 32), preset=preset, approx_activation="relu3")
    assert not record.fired and record.left_alone


def test_each_activation_is_decided_alone():
    model = nn.Sequential(Net(), Net(train_second=True), Net(F.silu))
    _, record = records(model, torch.randn(64, WIDTH), approx_activation="relu3")
    assert {event.module for event in record.fired} == {"0", "2"}
    assert [event.module for event in record.left_alone] == ["1"]


def test_two_activations_of_one_tensor_pay_together():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 32).requires_grad_(False)

        def forward(self, x):
            h = self.first(x)
            return self.second(F.gelu(h) + F.silu(h))

    saved, record = records(Both(), torch.randn(64, 32), approx_activation="relu3")
    assert len(record.fired) == 2
    assert sum(each.bytes for each in saved) == 2 * 64 * 64 // 4


def test_paper_shares_norms_and_codes_without_recomputing_more_than_stock():
    model = nn.Sequential(nn.Linear(32, WIDTH), nn.LayerNorm(WIDTH), Net(train_second=True))
    capture = graphopt.capture(model, torch.randn(64, 32))
    saved, found, _ = capture.lowmem(Options("paper"))
    assert all(record.fired for record in found if record.name in ("share_norm", "approx_activation"))
    # stock keeps the norm's input and output, what the activation reads and what it gives; paper one of the first two,
    # and two bits for the third; beside them the norm's statistics
    assert sum(each.bytes for each in capture.saved) == 64 * (4 * WIDTH * 4 + 2 * 4)
    assert sum(each.bytes for each in saved) == 64 * (2 * WIDTH * 4 + WIDTH // 4 + 4)


def test_a_checkpointed_region_is_left_alone():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.block = nn.Linear(WIDTH, WIDTH), Net()

        def forward(self, x):
            return checkpoint(self.block, self.first(x), use_reentrant=False)

    model, x = Checkpointed(), torch.randn(64, WIDTH)
    _, record = records(model, x, approx_activation="relu3")
    assert not record.fired and "checkpointed" in record.left_alone[0].text
    _, gradients, _ = step(model, (x,), options={"approx_activation": "relu3"})
    _, expected, _ = step(model, (x,), backend=None)
    assert distance(gradients, expected) < 1e-6  # float32: a matrix product's rounding


@pytest.mark.parametrize("model", [Net(lambda x: F.elu(x, 0.5)), Net(lambda x: F.softplus(x, 1, 5))])
def test_settings_without_a_row_are_left_alone(model):
    x = torch.randn(64, WIDTH)
    _, record = records(model, x, approx_activation="relu3")
    assert not record.fired and "no code is known" in record.left_alone[0].text


def test_a_sharper_softplus_has_the_code_of_what_it_is_a_scaled_copy_of():
    """softplus(x, beta) = softplus(beta x) / beta."""
    model, x = Net(), torch.randn(64, WIDTH)
    for scheme in ("relu3", "lloyd"):
        model.function = lambda x: F.softplus(x, 4)
        _, sharp, _ = step(model, (x,), options={"approx_activation": scheme})
        model.function = lambda x: F.softplus(x * 4) / 4
        _, scaled, _ = step(model, (x,), options={"approx_activation": scheme})
        assert distance(sharp, scaled) < 1e-6  # float32: a matrix product's rounding


@pytest.mark.parametrize("scheme", ["relu3", "lloyd"])
@pytest.mark.parametrize("tokens", [1, 3, 15, 17, 31])
def test_sizes_that_are_no_multiple_of_a_word(tokens, scheme):
    model, x = Net(), torch.randn(tokens, WIDTH + 1)
    model.first, model.second = nn.Linear(WIDTH + 1, 7), nn.Linear(7, 3).requires_grad_(False)
    _, gradients, saved = step(model, (x,), options={"approx_activation": scheme})
    assert saved == -(-tokens * 7 // 16) * 4
    model.function = step_function("gelu", scheme, torch.float32)
    _, expected, _ = step(model.double(), (x.double(),), backend=None)
    assert distance(gradients, expected) < 1e-6  # float32: matrix products of 49 terms


@pytest.mark.parametrize("scheme", ["relu3", "lloyd"])
def test_a_code_comes_back_with_the_strides_of_what_it_codes(scheme):
    """Attention heads and channels-last images: a view of dx follows, which other strides would break."""
    function = step_function("silu", scheme, torch.float32)

    class Permuted(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.function = nn.Linear(16, 48), F.silu

        def forward(self, x):
            return self.function(self.qkv(x).view(2, 8, 3, 4, 4).permute(2, 0, 3, 1, 4)).sum(0)

    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.function = nn.Conv2d(3, 8, 3), F.silu

        def forward(self, x):
            return self.function(self.first(x)).mean(1)

    images = torch.randn(2, 3, 9, 9).contiguous(memory_format=torch.channels_last)
    for model, x in ((Permuted(), torch.randn(2, 8, 16)), (Images(), images)):
        _, gradients, saved = step(model, (x,), options={"approx_activation": scheme})
        assert saved < 2 * x.numel()
        model.function = function
        _, expected, _ = step(model.double(), (x.double(),), backend=None)
        assert distance(gradients, expected) < 1e-6  # float32: sums of at most 200 terms


def test_dynamic_shapes():
    model = Net()
    options = EXACT | {"approx_activation": "relu3"}
    compiled = torch.compile(model, backend="lowmem_eager", dynamic=True, options=options)
    fixed = torch.compile(model, backend="lowmem_eager", dynamic=False, options=options)
    for tokens in (64, 33, 7):
        x, found = torch.randn(tokens, WIDTH), []
        for function in (compiled, fixed):
            model.zero_grad()
            function(x).square().mean().backward()
            found.append({"first": model.first.weight.grad.clone()})
        assert distance(*found) < 1e-6  # the same operations, float32


def test_autocast():
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.net(x)

    x = torch.randn(64, WIDTH)
    _, _, exact = step(Cast(), (x,))
    _, gradients, saved = step(Cast(), (x,), options={"approx_activation": "relu3"})
    assert exact - saved == x.numel() * 2 - x.numel() // 4
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())


@pytest.mark.parametrize("fallback", [False, True])
def test_drawn_codes_follow_the_seed(fallback):
    model, x = Net(), torch.randn(64, WIDTH)
    with torch._inductor.config.patch(fallback_random=fallback):
        one, two, other = (step(model, (x,), options={"approx_activation": "unbiased"}, seed=s)[1] for s in (7, 7, 8))
    assert distance(one, two) == 0
    assert distance(one, other) > 0.01


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "mish", "softplus", "elu", "selu", "hardswish"])
def test_infinite_inputs_have_the_slope_of_the_limit(name, scheme):
    """Where the exact formulas give inf * 0; what is no number has one of the levels."""
    x = torch.tensor([float("inf"), float("-inf"), float("nan")]).repeat_interleave(64)
    function, levels = FUNCTIONS[name], CODES[name][scheme].levels
    capture = graphopt.capture(function, x.clone().requires_grad_())
    joint, _ = capture.rewritten(bind(approx_activation, scheme=scheme), decompose)
    y, slope = joint(x, torch.ones_like(x))
    exact, _ = capture.rewritten(decompose)[0](x, torch.ones_like(x))
    torch.testing.assert_close(y, exact, rtol=0, atol=0, equal_nan=True)
    high, low, unknown = slope.view(3, 64)
    limits = [derivative(function)(torch.tensor(limit).double()) for limit in (100.0, -100.0)]
    for found, limit in zip((high, low), limits):
        around = sorted(levels, key=lambda level: abs(level - limit))[: 2 if scheme == "unbiased" else 1]
        assert set(found.tolist()) <= set(torch.tensor(around).tolist())
    assert set(unknown.tolist()) <= set(torch.tensor(levels).tolist())


@pytest.mark.parametrize("name", ["gelu", "tanh", "sigmoid"])
def test_a_derivative_that_is_part_of_forward_stays_exact(name):
    """As in networks that give the gradient of an energy."""
    weight, scale, x = torch.randn(16, 64), nn.Parameter(torch.randn(64)), torch.randn(32, 16)

    def function(x):
        return torch.func.grad(lambda h: (FUNCTIONS[name](h) * scale).sum())(x @ weight)

    compiled = torch.compile(function, backend="lowmem_eager", options=EXACT | {"approx_activation": "unbiased"})
    torch.testing.assert_close(compiled(x), function(x))


def test_a_gradient_that_is_the_input_itself():
    """dy = h for f(h): what a code would replace is read as the gradient too."""
    first = nn.Linear(32, 64)

    def function(x):
        h = first(x)
        return (F.gelu(h) * h.detach()).sum() + F.gelu(first(x + 1)).sum()

    x = torch.randn(64, 32)
    compiled = torch.compile(function, backend="lowmem_eager", options=EXACT | {"approx_activation": "relu3"})
    compiled(x).backward()
    found, first.weight.grad = first.weight.grad, None
    h = first(x)
    exact = torch.autograd.grad((F.gelu(h) * h.detach()).sum(), first.weight)[0]
    (coded,) = torch.autograd.grad(
        step_function("gelu", "relu3", torch.float32)(first(x + 1).double()).sum(), first.weight
    )
    assert distance({"": found}, {"": exact + coded}) < 1e-6  # float32: products of 64 terms


def test_an_unknown_scheme_is_named():
    joint = graphopt.capture(Net(), torch.randn(64, WIDTH)).joint
    with pytest.raises(graphopt.OptionsError, match=r"relu4.*relu3"):
        approx_activation(joint, scheme="relu4")


def test_no_code_beside_an_activation_that_keeps_its_input():
    """ELU with another alpha has no row, so what both read stays; the second GELU's code must not hide that."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(32, 256), nn.Linear(256, 32).requires_grad_(False)
            self.c, self.d = nn.Linear(32, 64), nn.Linear(64, 32).requires_grad_(False)

        def forward(self, x):
            h = self.a(x)
            return self.d(F.gelu(self.c(self.b(F.gelu(h) + F.elu(h, 0.5)))))

    _, record = records(Net(), torch.randn(64, 32), approx_activation="relu3")
    assert len(record.fired) == 1 and "self.c" in record.fired[0].source
    assert any("kept anyway" in event.text for event in record.left_alone)


@pytest.mark.parametrize("function", [torch.sigmoid, torch.tanh])
def test_what_the_model_returns_is_kept_anyway(function):
    model = nn.Sequential(nn.Linear(32, 64), Activation(function))
    for preset in ("exact", "paper"):
        _, record = records(model, torch.randn(64, 32), preset=preset, approx_activation="lloyd")
        assert not record.fired


class Activation(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_codes_that_pay_only_together_are_made_together():
    """One activation after another of one tensor, and two halves of one."""

    class Net(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.first, self.second = nn.Linear(32, 64), nn.LazyLinear(32)
            self.function = function
            self(torch.randn(1, 32))
            self.second.requires_grad_(False)

        def forward(self, x):
            return self.second(self.function(self.first(x)))

    def halves(h):
        a, b = h.chunk(2, -1)
        return F.gelu(a) + F.gelu(b)

    for function in (lambda h: F.gelu(h) + torch.tanh(h), lambda h: torch.tanh(F.gelu(h)), halves):
        saved, record = records(Net(function), torch.randn(64, 32), approx_activation="relu3")
        assert len(record.fired) == 2
        assert sum(each.bytes for each in saved) <= 2 * 64 * 64 // 4


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_gradient_has_the_strides_that_the_exact_one_has(name):
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 32).requires_grad_(False)

        def forward(self, x):
            return self.b(FUNCTIONS[name](self.a(x.view(4, -1, 32)).transpose(0, 1))).contiguous()

    x = torch.randn(60, 32)
    for scheme in SCHEMES:
        _, gradients, _ = step(Transposed(), (x,), options={"approx_activation": scheme})
        assert all(gradient.isfinite().all() for gradient in gradients.values())
