"""The cut: what is cheap is made anew in backward, what is not never runs twice."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from networkx.algorithms.flow import maxflow, preflow_push
from torch import fx, nn
from torch._functorch import partitioners
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from training import EXACT, distance, step

import graphopt
from graphopt import backend, partition
from graphopt.crossing import crossing_of
from graphopt.graph import copy, storage_bytes
from graphopt.options import PRESETS

EXPENSIVE = ("mm", "convolution", "scaled_dot_product", "rand", "bernoulli", "sort", "cumsum", "embedding")


@pytest.fixture
def halves(monkeypatch):
    """The forward and backward graphs of what is compiled, as the partitioner hands them on."""
    found: list[tuple[fx.GraphModule, fx.GraphModule]] = []
    original = backend.Partitioner.__call__

    def recording(self, *args, **kwargs):
        found.append(original(self, *args, **kwargs))
        return found[-1]

    monkeypatch.setattr(backend.Partitioner, "__call__", recording)
    return found


def expensive(gm: fx.GraphModule) -> Counter:
    targets = [node.target for node in gm.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    names = [str(target).split(".")[1] for target in targets]
    return Counter(name for name in names if any(part in name for part in EXPENSIVE) and "backward" not in name)


class Attention(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.norm, self.qkv, self.out, self.dropout = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32), dropout

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).view(2, 16, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 16, 32)
        return x + F.dropout(self.out(out), self.dropout)


class MLP(nn.Module):
    def __init__(self, gate: str | None = None, dropout: float = 0.0):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.gate, self.activation = nn.Linear(32, 64) if gate else None, gate or "gelu"
        self.dropout = dropout

    def forward(self, x):
        h = getattr(F, self.activation)((self.gate or self.up)(x))
        return self.down(F.dropout(h * self.up(x) if self.gate else h, self.dropout))


@pytest.mark.parametrize("preset", ["compressed", "exact", "paper"])
def test_no_matmul_and_no_attention_runs_twice(halves, preset):
    model = nn.Sequential(nn.Linear(32, 32), Attention(), MLP(), MLP("silu"))
    step(model, (torch.randn(2, 16, 32),), options={"preset": preset, "time_slack": 10})
    forward, backward = halves[0]
    linears = sum(isinstance(module, nn.Linear) for module in model.modules())
    matmuls = Counter(name for name in expensive(backward).elements() if name in ("mm", "addmm", "bmm"))
    # a gradient of the weight for each linear, of the input for each but the first
    assert matmuls == Counter(mm=2 * linears - 1)
    assert not set(expensive(backward)) - {"mm"}
    assert any("scaled_dot_product" in name for name in expensive(forward))


@pytest.mark.parametrize("gate", ["silu", "gelu"])
def test_a_gated_activation_keeps_its_two_factors_and_nothing_else(halves, gate):
    model = nn.Sequential(nn.Linear(32, 32), MLP(gate))
    step(model, (torch.randn(2, 16, 32),))
    tokens = 2 * 16
    shapes = Counter(tuple(node.meta["val"].shape) for node in crossing_of(halves[0], 1).saved)
    assert shapes == Counter({(tokens, 32): 1, (tokens, 64): 2})


@pytest.mark.parametrize("activation", ["gelu", "silu", "tanh", "mish", "softplus", "leaky_relu", "elu"])
def test_an_activation_keeps_one_tensor(halves, activation):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x):
            return self.c(getattr(F, activation)(self.b(self.a(x))))

    step(Net(), (torch.randn(32, 32),))
    assert storage_bytes(node.meta["val"] for node in crossing_of(halves[0], 1).saved) == 4 * 32 * (32 + 64)


@pytest.mark.parametrize("preset", PRESETS)
def test_random_numbers_are_drawn_in_forward_only(halves, preset):
    model = nn.Sequential(nn.Linear(32, 32), Attention(0.2), MLP(dropout=0.2), nn.Dropout(0.3))
    step(model, (torch.randn(2, 16, 32),), options={"preset": preset, "time_slack": 10})
    assert not any("rand" in name or "bernoulli" in name for name in expensive(halves[0][1]))


class Masks(nn.Module):
    """An activation before dropout: below a memory budget of 1 stock Inductor draws the mask again."""

    def forward(self, x):
        return F.dropout(F.gelu(x * 2), 0.5)


def masks_agree(backend: str, **settings: object) -> bool:
    """Whether the elements that forward dropped are those whose gradient is zero."""
    x = torch.rand(64, 128, requires_grad=True)  # positive, so that neither gelu nor its derivative is zero by itself
    y = torch.compile(Masks(), backend=backend, **settings)(x)
    y.sum().backward()
    return torch.equal(x.grad != 0, y != 0)


BUDGETS = [("lowmem_eager", budget) for budget in (1.0, 0.9, 0.5, 0.1, 0.0)]
BUDGETS += [pytest.param("lowmem", budget, marks=pytest.mark.slow) for budget in (1.0, 0.1)]


@pytest.mark.parametrize("backend, budget", BUDGETS)
def test_dropout_masks_agree(backend, budget):
    with torch._functorch.config.patch(activation_memory_budget=budget):
        assert masks_agree(backend, options=EXACT)


@pytest.mark.parametrize("preset", PRESETS)
def test_dropout_masks_agree_under_every_preset(preset):
    assert masks_agree("lowmem_eager", options={"preset": preset, "time_slack": 10})


@pytest.mark.slow
@pytest.mark.parametrize("knob", [{"activation_memory_budget": 0.5}, {"aggressive_recomputation": True}], ids=str)
def test_the_test_above_catches_masks_that_disagree(knob):
    with torch._functorch.config.patch(knob):
        assert not masks_agree("inductor")
        torch._dynamo.reset()
        assert masks_agree("lowmem_eager", options=EXACT)


def test_a_checkpointed_region_saves_its_inputs_only():
    from torch.utils.checkpoint import checkpoint

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.block, self.last = nn.Linear(32, 32), nn.Sequential(Attention(), MLP()), nn.Linear(32, 8)

        def forward(self, x):
            return self.last(checkpoint(self.block, self.first(x), use_reentrant=False))

    model, x = Net(), torch.randn(2, 16, 32)
    _, expected, _ = step(model, (x,), backend=None)
    _, _, kept = step(model, (x,), backend="aot_eager_decomp_partition")
    _, gradients, saved = step(model, (x,))
    assert distance(gradients, expected) < 1e-6
    assert saved <= kept
    state = torch.get_rng_state().numel()  # attention counts as random, so its generator's state is kept
    assert saved <= x.numel() * 4 + state


@pytest.mark.parametrize(
    "function", [lambda y: y.amax(-1), lambda y: y.norm(p=float("inf"), dim=-1), lambda y: y.max()]
)
def test_what_backward_compares_for_equality_is_not_made_anew(halves, function):
    linear, x = nn.Linear(32, 32), torch.randn(48, 32)
    compiled = torch.compile(lambda x: function(F.gelu(linear(x))), backend="lowmem_eager", options=EXACT)
    compiled(x).sum().backward()
    for node in halves[0][1].graph.find_nodes(op="call_function", target=torch.ops.aten.eq.Tensor):
        compared = [each for each in node.all_input_nodes if each.op != "placeholder"]
        exact = (torch.ops.aten.abs.default,)  # and views round nothing
        assert all(each.target.is_view or each.target in exact for each in compared)


@pytest.mark.parametrize("preset", ["compressed", "smallest", "exact"])
def test_never_more_bytes_than_stock(preset):
    """A norm in front of kernels that save its output by themselves, and other shapes where rewriting gains nothing."""
    norm, heads = nn.LayerNorm(32), nn.Linear(32, 32)
    functions = [
        lambda x: F.rms_norm(norm(heads(x)), (32,)),
        lambda x: (lambda y: (y @ y.transpose(1, 2)).softmax(-1) @ y)(norm(heads(x))),
        lambda x: F.scaled_dot_product_attention(*[norm(heads(x))[:, None]] * 3),
        lambda x: norm(x).transpose(1, 2).contiguous().sin(),
    ]
    for function in functions:
        capture = graphopt.capture(function, torch.randn(4, 64, 32, requires_grad=True))
        saved = capture.lowmem(graphopt.Options(preset))[0]
        assert sum(each.bytes for each in saved) <= sum(each.bytes for each in capture.saved)


def test_the_cut_does_not_depend_on_how_a_maximum_flow_is_found(halves, monkeypatch):
    model, x = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), Attention(0.1), MLP()), torch.randn(2, 16, 32)
    step(model, (x,))
    assert maxflow.default_flow_func is preflow_push
    monkeypatch.setattr("graphopt.partition.quick_flow", nullcontext())
    torch._dynamo.reset()
    step(model, (x,))
    quick, own = halves
    assert [node.name for node in crossing_of(quick, 1).saved] == [node.name for node in crossing_of(own, 1).saved]


class Counting(torch.autograd.Function):
    """Backward adds to a buffer, which no gradient shows."""

    @staticmethod
    def forward(ctx, x, total):
        ctx.save_for_backward(x)
        ctx.total = total
        return x.relu()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        ctx.total.add_(x.exp().sum(0))
        return gradient * (x > 0), None


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.register_buffer("total", torch.zeros(16, 32))

    def forward(self, x):
        return Counting.apply(self.linear(x), self.total)


class Mixed(nn.Module):
    """A checkpointed region that draws random numbers, and values that backward compares."""

    def __init__(self):
        super().__init__()
        self.part = nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.3), nn.GELU())

    def forward(self, x):
        y = checkpoint(self.part, x, use_reentrant=False).sin().exp()
        return y * (y == y.amax(-1, keepdim=True)) + y.relu() + y.amax(0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_a_cut_saves_is_known_without_making_its_graphs(monkeypatch, dynamic):
    different = []

    def choose(gm, inputs, heuristics, **kwargs):
        found = partition.choose(gm, inputs, heuristics, **kwargs)
        made = crossing_of(partition.cut(copy(gm), inputs, heuristics, **kwargs), kwargs["num_fwd_outputs"])
        names = [[node.name for node in each.saved] for each in (found, made)]
        different.append(names[0] != names[1] or found.bytes != made.bytes or found.in_backward != made.in_backward)
        return found

    monkeypatch.setattr("graphopt.split.choose", choose)
    for model in (Attention(0.1), nn.Sequential(MLP("silu", 0.1), nn.BatchNorm1d(16)), Counted(), Mixed()):
        step(model, (torch.randn(2, 16, 32, requires_grad=True),), dynamic=dynamic)
    assert len(different) >= 8 and not any(different)  # stock and another way for each, at least


def test_choosing_makes_no_graphs(monkeypatch):
    def choose(*args, **kwargs):
        with monkeypatch.context() as patched:
            patched.setattr(partitioners, "_extract_fwd_bwd_modules", None)
            return partition.choose(*args, **kwargs)

    monkeypatch.setattr("graphopt.split.choose", choose)
    step(Attention(0.1), (torch.randn(2, 16, 32, requires_grad=True),))


def test_never_more_bytes_than_without_a_rewrite():
    """Under autocast the norm's input is made anew from the model's own, which costs nothing to keep."""
    first, norm, second = nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 32)

    def function(x):
        with torch.autocast("cpu", torch.bfloat16):
            x = x + first(x)
            return x + second(norm(x))

    capture = graphopt.capture(function, torch.randn(4, 64, 32))
    kept = {
        disable: sum(each.bytes for each in capture.lowmem(graphopt.Options("exact", disable=disable))[0])
        for disable in ((), ("share_norm",))
    }
    assert kept[()] <= kept[("share_norm",)]


def test_what_is_encoded_is_a_node_in_forward_and_one_in_backward(halves):
    """Cuts, passes and Inductor go through every node, of every tensor that is encoded."""
    layers = [nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64), nn.Tanh()) for _ in range(3)]
    step(nn.Sequential(*layers), (torch.randn(512, 64),), options={"preset": "compressed", "time_slack": 10})
    step(nn.Sequential(*layers), (torch.randn(512, 64),))
    encoded, exact = halves
    ops = torch.ops.graphopt.encode.default, torch.ops.graphopt.decode.default
    counts = [len(half.graph.find_nodes(op="call_function", target=op)) for half, op in zip(encoded, ops, strict=True)]
    assert counts[0] == counts[1] >= 3
    for half, without in zip(encoded, exact, strict=True):
        assert len(half.graph.nodes) <= len(without.graph.nodes) + 8 * counts[0]


def test_no_parameter_is_copied_into_the_saved_set(halves):
    model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), MLP("silu")).to(torch.bfloat16)
    step(model, (torch.randn(48, 32, dtype=torch.bfloat16),))
    assert all(node.meta["val"].shape[0] == 48 for node in crossing_of(halves[0], 1).saved)


@pytest.mark.parametrize("backend", ["lowmem_eager", pytest.param("lowmem", marks=pytest.mark.slow)])
def test_backward_reads_a_buffer_as_forward_did_when_it_is_written_over(backend):
    """Stock Inductor 2.13 computes the new value from the buffer once more, after it was overwritten."""

    class Halved(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16)
            self.register_buffer("scale", torch.full((16,), 2.0))

        def forward(self, x):
            self.scale.mul_(0.5).add_(0.25)
            return self.linear(x).sin() * self.scale

    model, x = Halved(), torch.randn(4, 16)
    _, expected, _ = step(model, (x,), backend=None)
    _, found, _ = step(model, (x,), backend=backend)
    assert distance(found, expected) < 1e-6  # a few roundings of 2^-24
