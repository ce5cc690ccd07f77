"""Plans in trained models: what a softmax is taken of is known well enough for its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from plan_blocks import WIDTH, batch, build
from torch import Tensor, nn
from torch.nn import functional as F
from training import distance, step

import graphopt
from graphopt.codecs import named

COMPRESSED = {"preset": "compressed", "time_slack": 10}
SMALLEST = {"preset": "smallest", "time_slack": 10, "recompute": "pointwise"}


class Attention(nn.Module):
    """Attention written out."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).mT / math.sqrt(WIDTH)
        return scores.softmax(-1) @ self.v(x)


class Classifier(nn.Module):
    """Cross entropy of logits that are `sure`: each token's largest is right, by that much."""

    def __init__(self, sure: float) -> None:
        super().__init__()
        self.first, self.head, self.sure = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 128), sure

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.first(x)).flatten(0, 1)
        y = torch.arange(len(logits)) % 128
        logits = logits + self.sure * F.one_hot(y, 128)
        # tests/training.py takes the mean of squares
        return F.cross_entropy(logits, y).sqrt()


def error(model: nn.Module, options: dict[str, object]) -> float:
    x = batch()
    _, exact, _ = step(model, [x])
    _, found, _ = step(model, [x], options=options)
    return distance(found, exact)


def sharpen(model: nn.Module, factor: float) -> nn.Module:
    """Queries and keys that are so many times as large, as those of a trained model are."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.split(".")[-2] in ("q", "k"):
                parameter.mul_(factor)
    return model


@pytest.mark.parametrize("factor", [1, 5])
def test_smallest_keeps_the_gradient_of_an_attention_that_is_sure(factor):
    # queries and keys err by 0.006 each in 8 bits, scores by that times their size, which is 25 times as large as at
    # first: the root of 2, 25 and 0.006 make 0.2. What is in 4 bits errs by 0.1, four such tensors by 0.2. With
    # all in 4 bits it was 3
    assert error(sharpen(build("llama"), factor), SMALLEST) < 0.5


def test_smallest_keeps_the_gradient_of_an_attention_written_out():
    torch.manual_seed(0)
    assert error(sharpen(nn.Sequential(nn.Linear(WIDTH, WIDTH), Attention()), 5), SMALLEST) < 0.5


@pytest.mark.parametrize("sure", [0, 8])
def test_smallest_keeps_the_gradient_of_a_cross_entropy_that_is_sure(sure):
    torch.manual_seed(0)
    # in 8 bits each of 64 probabilities errs by 1 / (127 sqrt(12)) of the largest, 0.018 of them all; less one they are
    # 127 / e^8 = 0.04. In 4 bits it was 10
    assert error(Classifier(sure), SMALLEST) < 0.5


@pytest.mark.parametrize("sure, least, most", [(3.6, 0.0, 0.01), (7.1, 0.1, 0.2), (8, 0.2, 0.33)])
def test_the_surer_a_cross_entropy_the_more_eight_bits_err_as_the_limits_say(sure, least, most):
    torch.manual_seed(0)
    assert least < error(Classifier(sure), COMPRESSED) < most


def test_queries_keys_and_probabilities_of_a_loss_cross_in_eight_bits():
    model = nn.Sequential(build("llama"), Classifier(0))
    plan = graphopt.explain(model, batch(), options=SMALLEST).plan
    bits = {choice.node: named(choice.decision).bits for choice in plan.choices if choice.decision.startswith("int")}
    assert set(bits.values()) == {4, 8}
    classes = [choice for choice in plan.choices if choice.node in bits and choice.shape[-1] == 128]
    assert classes
    assert all(bits[choice.node] == 8 for choice in classes)


def test_scores_that_are_scaled_or_masked_are_found_in_the_graph_that_inductor_has():
    # Inductor scales after it has subtracted the largest score, and reads the probabilities in an operator of its own
    plan = graphopt.explain(nn.Sequential(nn.Linear(WIDTH, WIDTH), Attention()), batch(), options=SMALLEST).plan
    decisions = {choice.module: choice.decision for choice in plan.choices}
    assert {decisions["1.q"], decisions["1.k"], decisions["1.v"]} == {"int8-unbiased"}
    scores = [choice for choice in plan.choices if choice.shape == (4, 32, 32)]
    assert [choice.decision for choice in scores] == ["int8-unbiased"]


def test_where_only_four_bits_are_allowed_they_stay_as_they_are():
    plan = graphopt.explain(build("llama"), batch(), options={"codecs": ["int4"], "time_slack": 10}).plan
    assert {choice.decision for choice in plan.choices} >= {"keep", "int4"}
    assert any("softmax" in choice.why for choice in plan.choices if choice.decision == "keep")


class Probabilities(nn.Module):
    """Logits of `classes`, and a loss."""

    def __init__(self, classes: int, loss: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.head, self.loss = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, classes), loss

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self.head(self.first(x)))


@pytest.mark.parametrize("classes", [2, 4, 128])
def test_probabilities_of_however_many_classes_are_dithered_and_draw_nothing(classes):
    model = Probabilities(classes, lambda logits: F.log_softmax(logits.float(), -1)[..., 0].mean())
    plan = graphopt.explain(model, torch.randn(64, 32, WIDTH), options={"time_slack": 10}).plan
    last = [choice for choice in plan.choices if choice.shape[-1:] == (classes,) and choice.decision != "keep"]
    assert last and all(choice.decision == "int8-hashed" for choice in last)
    assert "int8" in {choice.decision for choice in plan.choices}


def test_probabilities_of_an_attention_written_out_are_dithered():
    plan = graphopt.explain(nn.Sequential(nn.Linear(WIDTH, WIDTH), Attention()), batch(), options=COMPRESSED).plan
    assert [choice.decision for choice in plan.choices if choice.shape == (4, 32, 32)] == ["int8-hashed"]


def yes_and_no(options: dict[str, object]) -> list[tuple[str, str]]:
    loss = F.binary_cross_entropy_with_logits
    model = Probabilities(128, lambda logits: loss(logits, torch.ones_like(logits)))
    plan = graphopt.explain(model, batch(), options=options).plan
    return [(choice.operator, choice.decision) for choice in plan.choices]


def test_logits_of_yes_and_no_are_made_of_eight_bits():
    assert ("addmm", "int8-unbiased") in yes_and_no(SMALLEST)
    assert ("addmm", "int4-unbiased") not in yes_and_no(SMALLEST)


def test_probabilities_of_yes_less_what_was_right_are_dithered():
    assert ("sub", "int8-hashed") in yes_and_no(COMPRESSED)


def test_the_sum_of_small_probabilities_survives():
    """A head's bias has the sum of probabilities as its gradient, and no token is of any class but the first.

    255 others have 0.02 in sum, 1e-4 each where the first has 0.98: to nearest, in steps of 0.98 / 127, they are zero.
    Hashed each errs by 1 / 255 sqrt(12) of the largest in its group, the mean of 256 tokens by a sixteenth of that:
    7e-5 for each class in the first group, 63 of them, far less in the others.
    """
    torch.manual_seed(0)
    model = Probabilities(256, lambda logits: F.cross_entropy(logits.flatten(0, 1), torch.zeros(256).long()).sqrt())
    with torch.no_grad():
        model.head.bias[0] = 9.4
    x = torch.randn(4, 64, WIDTH)
    exact, found = (step(model, [x], options=each)[1]["head.bias"][1:64] for each in ({}, COMPRESSED))
    assert exact.sum() == pytest.approx(0.02 * 63 / 255, rel=0.3)
    # golden-ratio turns spread evenly in a group: their sum errs by less than that of independent ones
    assert abs(found.sum() - exact.sum()) < 3 * 7e-5 * 63**0.5


def entropy(logits: Tensor) -> Tensor:
    logs = F.log_softmax(logits, -1)
    kept = logs.isfinite()
    return (logs.exp() * torch.where(kept, -logs, 0)).sum(-1).mean()


MASKS = {
    "masked_fill": lambda s, bad: s.masked_fill(bad, -1e9),
    "a small constant": lambda s, bad: s.masked_fill(bad, -100.0),
    "infinity": lambda s, bad: s.masked_fill(bad, -math.inf),
    "a factor": lambda s, bad: s + bad * torch.finfo(s.dtype).min,
    "an input": lambda s, bad: s + torch.where(bad, -math.inf, 0.0),
    "twice": lambda s, bad: (s + bad * -1e4).masked_fill(bad.roll(1), -1e4),
}


class Masked(nn.Module):
    """A softmax of masked scores, and something of it that wants their logarithms too."""

    def __init__(self, mask: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.mask = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 128), mask

    def forward(self, x: Tensor) -> Tensor:
        return entropy(self.mask(self.second(F.gelu(self.first(x))), torch.arange(128) >= 77)).sqrt()


@pytest.mark.parametrize("preset", ["compressed", "smallest"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_masked_scores_are_not_encoded_with_their_mask(mask, preset):
    torch.manual_seed(0)
    # 0.01 in 8 bits, as anywhere; 0.1 a tensor in 4. Beside a mask of -1e9 in its group it was 600, and NaN of infinity
    assert error(Masked(mask), {"preset": preset, "time_slack": 10}) < {"compressed": 0.02, "smallest": 0.4}[preset]


def test_zeros_of_a_softmax_give_no_gradient():
    """Values at keys that are masked: nothing reads them, and Adam would make steps of noise."""

    class Padded(Attention):
        def forward(self, x: Tensor, values: Tensor) -> Tensor:
            scores = self.q(x) @ self.k(x).mT + torch.where(torch.arange(x.shape[1]) < 20, 0.0, -math.inf)
            return scores.softmax(-1) @ values

    torch.manual_seed(0)
    inputs = [batch(), batch().requires_grad_()]
    values = step(Padded(), inputs, options=COMPRESSED)[1]["input 1"]
    assert (values[:, 20:] == 0).all()
    assert values[:, :20].abs().mean() > 1e-4


SOFTMAXES = {
    "softmax": lambda s: s.softmax(-1),
    "exp2": lambda s: (e := torch.exp2((s - s.amax(-1, keepdim=True)) * 1.442695)) / e.sum(-1, keepdim=True),
    "no maximum": lambda s: (e := s.exp()) / e.sum(-1, keepdim=True),
    "logsumexp": lambda s: (s - s.logsumexp(-1, keepdim=True)).exp(),
}


@pytest.mark.parametrize("softmax", SOFTMAXES.values(), ids=SOFTMAXES.keys())
def test_a_softmax_is_known_however_it_is_written(softmax):
    class Written(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return softmax(self.q(x) @ self.k(x).mT / math.sqrt(WIDTH)) @ self.v(x)

    torch.manual_seed(0)
    model = sharpen(nn.Sequential(nn.Linear(WIDTH, WIDTH), Written()), 5)
    # scores of up to 13 err by 0.006 of that; without a maximum it was 1.5 and 30, exponentials over their sum, twice
    assert error(model, COMPRESSED) < 0.1
    assert error(model, SMALLEST) < 0.2


def test_a_long_chain_of_scales_before_an_exponential_is_walked_once():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            kept = x > 0
            for i in range(40):  # each reads the one before twice
                x = torch.where(kept, x * (0.9 + i / 100), x * 0.95)
            return x.softmax(-1)

    assert graphopt.explain(Scaled(), batch()).bytes_before


def test_the_exponential_in_a_slope_that_is_coded_is_no_softmax():
    frozen = [nn.Linear(WIDTH, 4 * WIDTH).requires_grad_(False), nn.Linear(4 * WIDTH, WIDTH).requires_grad_(False)]
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), frozen[0], nn.GELU(), frozen[1])
    plan = graphopt.explain(model, batch(), options=SMALLEST).plan
    assert {choice.decision for choice in plan.choices} >= {"int4-unbiased"}
    assert "int8-unbiased" not in {choice.decision for choice in plan.choices}
