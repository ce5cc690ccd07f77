"""calibrate: what matters is found to matter, the plan follows, lowmem takes it, and the model is as before."""

import copy
import warnings

import models
import pytest
import torch
from torch import nn
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor.compile_fx import compile_fx
from torch.nn import functional as F
from training import distance, step

import graphopt
from graphopt import passes
from graphopt.backend import Partitioner
from graphopt.codecs import CODECS
from graphopt.errors import CaptureError, OptionsError, PlanError
from graphopt.lowering.decompose import tracing_table
from graphopt.options import Options

WIDTH, TOKENS = 64, 256
# two equal float32 tensors: one in 8 bits and one in 4
ENCODED = {"memory_budget": 0.2, "recompute": "pointwise"}


def node_by_node(gm, example_inputs, options=None):
    """lowmem with the graphs that Inductor is given run as they stand."""
    gm = passes.canonicalize(gm, example_inputs)
    patches = {"custom_partitioner_fn": Partitioner(Options(**options))}
    with torch._functorch.config.patch(enable_autograd_cache=False):
        return compile_fx(
            gm, example_inputs, lambda graph, *_, **__: make_boxed_func(graph.forward), patches, tracing_table()
        )


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.dropout = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Dropout(0.1)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        h = self.first(x)
        return h + self.dropout(self.down(F.gelu(self.up(self.norm(h)))))


class Branches(nn.Module):
    """Two equal branches, of which the gradient of one is far larger."""

    def __init__(self, left=30.0, right=1.0):
        super().__init__()
        self.scales = left, right
        self.left, self.right = (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(2))

    def forward(self, x):
        return self.scales[0] * self.left(x) + self.scales[1] * self.right(x)


class Recorder(nn.Module):
    """Changes everything that a forward can change."""

    def __init__(self):
        super().__init__()
        self.block, self.norm = Block(), nn.BatchNorm1d(WIDTH)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return self.norm(self.block(x))


def x():
    return torch.randn(TOKENS, WIDTH)


def sensitivity(choice):
    return (choice.error / CODECS[choice.decision].error) ** 2


def encoded(plan):
    return {each.module: each for each in plan.choices if each.decision in CODECS}


def test_what_hardly_reaches_the_output_is_hardly_sensitive():
    plan = graphopt.calibrate(Branches(1.0, 1e-3), x(), options=ENCODED)
    found = {module: sensitivity(each) for module, each in encoded(plan).items()}
    # the gradient of one linear of two; the other branch has a millionth of it, squared
    assert 0.05 < found["left.0"] < 1
    assert found["right.0"] < 1e-5


def test_bytes_go_where_they_lessen_the_error():
    plan = graphopt.calibrate(Branches(), x(), options=ENCODED)
    found = encoded(plan)
    assert found["left.0"].bytes_now > found["right.0"].bytes_now
    assert plan.bytes <= 0.2 * plan.stock


def test_a_calibrated_plan_moves_the_gradient_less_than_one_of_the_same_budget_that_was_not():
    before, after = [], []
    for scales in ((30.0, 1.0), (1.0, 30.0)):  # without measurement the branches are alike: one order is the wrong one
        model, inputs = Branches(*scales), (x(),)
        plan = graphopt.calibrate(model, *inputs, options=ENCODED)
        _, expected, _ = step(model, inputs, backend=None)
        for errors, options in ((before, ENCODED), (after, {"plan": plan})):
            torch._dynamo.reset()
            _, found, saved = step(model, inputs, backend=node_by_node, options=options)
            assert saved <= 0.2 * plan.stock
            errors.append(distance(found, expected))
    # 8 bits instead of 4, at a sixteenth of the error
    assert max(after) < max(before) / 8


def test_the_error_that_a_plan_predicts_is_the_one_that_is_made():
    model, inputs = Block().eval(), (x(),)
    plan = graphopt.calibrate(model, *inputs, options={"memory_budget": 0.1})
    _, expected, _ = step(model, inputs, backend=None)
    _, found, _ = step(model, inputs, backend=node_by_node, options={"plan": plan})
    # both are roots of sums over thousands of independent errors; the codecs' are those of normal numbers, which
    # activations are not quite
    assert plan.error / 1.5 < distance(found, expected) < 1.5 * plan.error


BACKENDS = [node_by_node, pytest.param("lowmem", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS, ids=["node by node", "lowmem"])
def test_the_same_model_is_trained_under_the_plan_and_saves_its_bytes(backend, tmp_path):
    model, inputs = Block().bfloat16(), (x().bfloat16(),)
    plan = graphopt.calibrate(model, *inputs, options={"memory_budget": 0.2})
    plan.save(tmp_path / "plan.json")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="plan .* is for another graph")
        _, _, saved = step(model, inputs, backend=backend, options={"plan": str(tmp_path / "plan.json")})
    assert saved == plan.bytes <= 0.2 * plan.stock


@pytest.mark.slow
def test_options_of_inductor_make_one_graph_for_all():
    """Random numbers of Inductor's own, or those of eager mode, are other operators in the joint graph."""
    model, options = Block(), {"memory_budget": 0.2, "fallback_random": True}
    explained = graphopt.explain(model, x(), options=options)
    plan = graphopt.calibrate(model, x(), options=options)
    assert explained.plan.graph == plan.graph != graphopt.explain(model, x(), options={"memory_budget": 0.2}).plan.graph
    assert {each.graph for each in explained.frontier().plans} == {plan.graph}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="plan .* is for another graph")
        *_, saved = step(model, (x(),), backend="lowmem", options={**options, "preset": "compressed", "plan": plan})
    assert saved == plan.bytes


def test_transformers_with_a_loss():
    model, inputs = models.build("llama")
    options = {"memory_budget": 0.5}
    plan = graphopt.calibrate(model, options=options, use_cache=False, **inputs)
    assert encoded(plan) and all(each.error > 0 for each in encoded(plan).values())
    assert plan.bytes <= 0.5 * plan.stock
    expected = gradients(model, model, inputs)
    compiled = torch.compile(model, backend=node_by_node, options={"plan": plan})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="plan .* is for another graph")
        found = gradients(model, compiled, inputs)
    assert distance(found, expected) < 2 * plan.error


def gradients(model, function, inputs):
    parameters = dict(model.named_parameters())
    loss = models.loss(function, inputs)
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def states(model):
    return copy.deepcopy(model.state_dict()), [p.grad for p in model.parameters()], torch.get_rng_state()


def same(found, expected):
    return (
        all(torch.equal(a, b) for a, b in zip(found[0].values(), expected[0].values(), strict=True))
        and all(a is b for a, b in zip(found[1], expected[1], strict=True))
        and torch.equal(found[2], expected[2])
    )


def test_the_model_is_as_before():
    model = Recorder()
    F.mse_loss(model(x()), x()).backward()
    values, before = [p.grad.clone() for p in model.parameters()], states(model)
    graphopt.calibrate(model, x_ := torch.ones(TOKENS, WIDTH), options={"memory_budget": 0.5})
    assert same(states(model), before) and model.training and torch.equal(x_, torch.ones(TOKENS, WIDTH))
    assert all(torch.equal(p.grad, value) for p, value in zip(model.parameters(), values, strict=True))


@pytest.mark.parametrize(
    ("output", "budget", "error"),
    [(lambda y: y.detach(), 0.5, CaptureError), (lambda y: y, 1e-9, PlanError)],
    ids=["no gradient", "no such plan"],
)
def test_the_model_is_as_before_where_it_raises(output, budget, error):
    class Model(Recorder):
        def forward(self, x):
            return output(super().forward(x))

    model, inputs = Model(), x()
    before = states(model)
    with pytest.raises(error):
        graphopt.calibrate(model, inputs, options={"memory_budget": budget})
    assert same(states(model), before)


def test_hooks_of_training_do_not_run():
    model, ran = Block(), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(ran.append)
    graphopt.calibrate(model, x(), options={"memory_budget": 0.2})
    assert not ran and all(parameter.grad is None for parameter in model.parameters())


def test_several_graphs_are_refused():
    def broken(x):
        y = x.sin()
        torch._dynamo.graph_break()
        return y.cos()

    with pytest.raises(CaptureError, match="one graph"):
        graphopt.calibrate(broken, x().requires_grad_(), options={"memory_budget": 0.5})


def test_options_without_a_plan_are_refused():
    with pytest.raises(OptionsError, match="exact"):
        graphopt.calibrate(Block(), x(), preset="exact")
    plan = graphopt.calibrate(Block(), x(), options={"memory_budget": 0.2})
    with pytest.raises(OptionsError, match="takes none"):
        graphopt.calibrate(Block(), x(), options={"plan": plan})
