"""Plans in trained models: what a softmax is taken of is known well enough for its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from plan_blocks import WIDTH, batch, build
from torch import Tensor, nn
from torch.nn import functional as F
from training import distance, step

import graphopt
from graphopt.codecs import named

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
    assert (decisions["1.q"], decisions["1.k"], decisions["1.v"]) == ("int8-unbiased", "int8-unbiased", "int4-unbiased")
    scores = [choice for choice in plan.choices if choice.shape == (4, 32, 32)]
    assert [choice.decision for choice in scores] == ["int8-unbiased"]


def test_where_only_four_bits_are_allowed_they_stay_as_they_are():
    plan = graphopt.explain(build("llama"), batch(), options={"codecs": ["int4"], "time_slack": 10}).plan
    assert {choice.decision for choice in plan.choices} >= {"keep", "int4"}
    assert any("softmax" in choice.why for choice in plan.choices if choice.decision == "keep")
