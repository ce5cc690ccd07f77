"""check: what lowmem does well it calls well, and what is wrong it names, with what to do."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt.errors import CaptureError, OptionsError
from graphopt.verdict import Gradient

WIDTH = 64


class Block(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.first, self.norm, self.batch_norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.BatchNorm1d(WIDTH)
        self.up, self.down, self.dropout = nn.Linear(WIDTH, 128), nn.Linear(128, WIDTH), nn.Dropout(dropout)

    def forward(self, x, target=None):
        h = self.batch_norm(self.first(x))
        y = h + self.dropout(self.down(F.gelu(self.up(self.norm(h)))))
        return y if target is None else {"loss": F.mse_loss(y, target), "y": y}


GOOD = graphopt.Check(
    options=graphopt.Options(), stock_loss=2.0, loss=2.0,
    gradients=(Gradient("up.weight", 0.02, 0.9998, 0.03), Gradient("first.weight", 0.01, 0.9999, 0.03)),
    error=0.0044, cosine=0.99999, float32=(0.0041, 0.0044), stock_bytes=1000, bytes=300, step_ratio=1.02,
    precision=torch.finfo(torch.bfloat16).eps,
)  # fmt: skip


def but(**changes):
    return dataclasses.replace(GOOD, **changes)


def test_as_near_to_float32_as_stock():
    assert GOOD.ok and not GOOD.problems
    assert "same loss" in GOOD.verdict and "70% fewer bytes" in GOOD.verdict and "0.0044 against 0.0041" in GOOD.verdict


def test_further_from_float32_than_stock_is_told_by_the_distance_from_stock():
    assert "float32" not in but(float32=(0.0041, 0.1), error=0.09).verdict.split("\n")[-1]
    assert "0.09" in but(float32=None, error=0.09).verdict


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": 2.1}, ["loss is 2.1", "disable"]),
        ({"loss": float("nan")}, ["loss is nan"]),
        (
            {"gradients": (Gradient("up.weight", 0.5, 0.87, 0.03), *GOOD.gradients)},
            ["1 of 3", "up.weight", "plan"],
        ),
        ({"gradients": (Gradient("up.weight", float("nan"), 0.0, 0.03),)}, ["1 of 1", "up.weight by nan"]),
        ({"bytes": 1000}, ["No bytes are saved", "explain", "preset 'smallest'"]),
        ({"bytes": 1000, "options": graphopt.Options(preset="smallest")}, ["a memory_budget"]),
        ({"step_ratio": 2.0}, ["2.00 times as long", "time_slack"]),
    ],
    ids=["loss", "nan loss", "gradient", "nan gradient", "bytes", "bytes of smallest", "time"],
)
def test_what_is_wrong_is_named_with_what_to_do(changes, said):
    found = but(**changes)
    assert not found.ok and len(found.problems) == 1
    assert all(each in found.verdict for each in said) and found.verdict in str(found)


def test_a_gradient_that_an_exact_preset_gets_wrong_is_a_bug():
    found = but(options=graphopt.Options(preset="exact"), gradients=(Gradient("up.weight", 0.5, 0.87, 0.03),))
    assert "a bug" in found.verdict and "calibrate" not in found.verdict


def test_everything_wrong_is_named():
    found = but(loss=3.0, bytes=2000, step_ratio=9.0)
    assert len(found.problems) == 3 and all(each in found.verdict for each in found.problems)


def test_the_five_worst_parameters_are_shown():
    rows = tuple(Gradient(f"layers.{i}.weight", 0.01, 0.9999, 0.03) for i in range(9))
    text = str(but(gradients=rows))
    assert text.count("layers.") == 5 and max(map(len, text.split("\n")[:-1])) <= 80


def states(model):
    values = {name: value.clone() for name, value in model.state_dict().items()}
    return values, {name: p.grad.clone() for name, p in model.named_parameters()}, torch.get_rng_state()


@pytest.mark.slow
def test_a_step_with_dropout_has_the_same_loss_and_leaves_the_model_as_it_was():
    model, x, target = Block(0.1), torch.randn(256, WIDTH), torch.randn(256, WIDTH)
    model(x).square().mean().backward()
    before = states(model)
    found = graphopt.check(model, x, target=target, preset="exact", steps=3)
    for was, now in zip(before[:2], states(model)[:2], strict=True):
        assert was.keys() == now.keys() and all(torch.equal(was[name], now[name]) for name in was)
    assert torch.equal(torch.get_rng_state(), before[2]) and model.training
    assert found.float32 is None and found.bytes < found.stock_bytes
    assert not [each for each in found.problems if "times as long" not in each]
    assert {each.parameter for each in found.gradients} == {name for name, _ in model.named_parameters()}


@pytest.mark.slow
def test_eight_bits_move_gradients_by_what_the_preset_allows():
    model, x = Block(), torch.randn(256, WIDTH)
    found = graphopt.check(model, x, preset="compressed", options={"time_slack": 100}, steps=1)
    assert found.float32 and found.float32[0] < 1e-5 < found.float32[1] < 0.01  # the codec's own error is 0.006
    assert not [each for each in found.problems if "times as long" not in each]
    assert found.loss == pytest.approx(found.stock_loss, rel=1e-5)


def test_several_graphs_are_refused():
    class Broken(Block):
        def forward(self, x):
            y = super().forward(x)
            torch._dynamo.graph_break()
            return y * 2

    with pytest.raises(CaptureError, match="one graph"):
        graphopt.check(Broken(), torch.randn(8, WIDTH))


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, None, "3"])
def test_steps_that_cannot_be_taken_are_refused(steps):
    with pytest.raises(OptionsError, match="steps"):
        graphopt.check(nn.Linear(4, 4), torch.randn(2, 4), steps=steps)


def test_what_is_not_a_module_is_refused():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        graphopt.check(lambda x: x.square().sum(), torch.randn(2, 4, requires_grad=True))


def test_options_that_are_not_allowed_are_refused():
    with pytest.raises(OptionsError, match="smallest"):
        graphopt.check(Block(), torch.randn(8, WIDTH), preset="smalest")
    with pytest.raises(OptionsError, match="steps"):
        graphopt.check(Block(), torch.randn(8, WIDTH), steps=0)


@pytest.mark.slow
def test_a_parameter_is_measured_by_itself_not_by_all_of_them():
    class Apart(nn.Module):
        """A deep chain, whose gradients have many roundings, beside a layer whose gradients are far larger."""

        def __init__(self):
            super().__init__()
            layers = (layer for _ in range(8) for layer in (nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.GELU()))
            self.chain, self.beside = nn.Sequential(*layers), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.chain(x).square().mean() + 1e3 * self.beside(x).square().mean()

    torch.manual_seed(0)
    found = graphopt.check(Apart(), torch.randn(256, WIDTH), preset="exact", steps=1)
    assert all(each.ok for each in found.gradients)
    # three roundings of float32 are what any gradient may be off; the chain's own are more
    floor = 3 * torch.finfo(torch.float32).eps
    assert max(each.allowed for each in found.gradients if each.parameter.startswith("chain.0")) > 1.5 * floor
