"""canonicalize: what only looks like an idiom, or whose inside is needed, is left alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from formulas import D, Formula, mean
from recorder import compiled, operations
from torch import Tensor, fx
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from graphopt.passes import canonicalize
from graphopt.pipeline import run

NEAR = {
    "unbiased variance": lambda x, w: (x - mean(x)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5) * w,
    "eps outside": lambda x, w: (x - mean(x)) / (x.var(-1, keepdim=True, unbiased=False).sqrt() + 1e-5) * w,
    "another dim": lambda x, w: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6) * w,
    "sum": lambda x, w: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6) * w,
    "another tensor's mean": lambda x, w: x * torch.rsqrt((x + w).pow(2).mean(-1, keepdim=True) + 1e-6) * w,
    "third power": lambda x, w: x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + 1e-6) * w,
    "not centred": lambda x, w: x / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5) * w,
    "gelu constant": lambda x, w: 0.5 * x * (1 + torch.tanh(0.798 * (x + 0.044715 * x**3))),
    "gelu half": lambda x, w: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "erf of x": lambda x, w: 0.5 * x * (1 + torch.erf(x)),
    "sigmoid of another": lambda x, w: x * torch.sigmoid(w),
    "quick constant": lambda x, w: x * torch.sigmoid(1.7 * x),
    "narrow inside": lambda x, w: x * torch.rsqrt(x.bfloat16().pow(2).mean(-1, keepdim=True) + 1e-6) * w,
    "rounded inside": lambda x, w: x * torch.rsqrt(mean(x.pow(2).bfloat16()) + 1e-6) * w,
    "rounding mean": lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, True, dtype=torch.bfloat16) + 1e-6) * w,
    "over all dims": lambda x, w: x * torch.rsqrt(x.pow(2).mean() + 1e-6) * w,
    "dropped dims": lambda x, w: w * torch.rsqrt(w.pow(2).mean(-1) + 1e-6),
}


def extra_reader(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x * rstd * w, rstd


def changed_in_place(x: Tensor, w: Tensor) -> Tensor:
    h = x * 2
    rstd = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    h.add_(1)
    return h * rstd * w


def statistics_without_grad(x: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():
        rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x * rstd * w


def cast_without_grad(x: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():
        h = x.double()
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * w


WITHOUT_GRAD = (statistics_without_grad, cast_without_grad)
LEFT = {
    "extra reader": (extra_reader, "another reader"),
    "in place": (changed_in_place, "changes a tensor or a mode"),
    "no grad inside": (statistics_without_grad, "changes a tensor or a mode"),
    "no grad at the cast": (cast_without_grad, "changes a tensor or a mode"),
    "unbiased variance": (NEAR["unbiased variance"], "unbiased"),
    "another dim": (NEAR["another dim"], "over the last dims"),
    "rounded inside": (NEAR["rounded inside"], "on purpose"),
    "rounding mean": (NEAR["rounding mean"], "on purpose"),
    "over all dims": (NEAR["over all dims"], "drops the dims"),
    "dropped dims": (NEAR["dropped dims"], "drops the dims"),
}


@pytest.mark.parametrize("formula", [*NEAR.values(), extra_reader, changed_in_place, *WITHOUT_GRAD])
def test_what_only_looks_like_an_idiom_is_left_alone(formula: Callable[..., Any]) -> None:
    x, w = torch.randn(2, 3, D), torch.randn(D)
    function, recorder = compiled(formula)
    torch.testing.assert_close(function(x, w), formula(x, w), rtol=0, atol=0)
    assert recorder.before == recorder.after and not recorder.fired


def test_a_cast_that_moves_to_another_device_is_not_looked_through() -> None:
    def formula(x: Tensor, elsewhere: Tensor) -> Tensor:
        h = x.type_as(elsewhere)
        return h * torch.sigmoid(h)

    function, _ = compiled(formula)
    assert function(torch.randn(2, D), torch.empty(1, device="meta")).device.type == "meta"


@pytest.mark.parametrize(("formula", "reason"), LEFT.values(), ids=LEFT.keys())
def test_a_near_miss_is_reported_once_with_its_reason(formula: Callable[..., Any], reason: str) -> None:
    function, recorder = compiled(formula)
    function(torch.randn(2, 3, D), torch.randn(D))
    assert len(recorder.left) == 1 and reason in recorder.left[0]


def test_a_rounding_inside_stays_and_the_formula_before_it_is_replaced() -> None:
    def formula(x: Tensor, w: Tensor) -> Tensor:
        return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).half() * w

    x, w = torch.randn(2, 3, D), torch.randn(D)
    function, recorder = compiled(formula)
    # either side is within 2**-11 of the same value: they differ by one place of float16
    torch.testing.assert_close(function(x, w), formula(x, w), rtol=2**-10, atol=0)
    assert recorder.after == ["rms_norm.default", "getitem", "to", "mul"]


def test_a_graph_whose_dtypes_are_not_known_is_left_alone_and_says_so() -> None:
    gm = fx.symbolic_trace(Formula(lambda x, w: w * (x * torch.rsqrt(mean(x * x) + 1e-6)), 1))
    before = operations(gm)
    gm, (record,) = run(gm, (), (canonicalize,))
    assert operations(gm) == before and not record.fired
    assert len(record.left_alone) == 1 and "give example inputs" in record.left_alone[0].text


def test_a_float64_input_cast_to_float32_is_left_alone() -> None:
    module, x = LlamaRMSNorm(D).double(), torch.randn(2, 3, D, dtype=torch.float64)
    function, recorder = compiled(module)
    assert torch.equal(function(x), module(x)) and not recorder.fired


def test_an_eps_read_off_a_tensor_is_left_alone() -> None:
    def formula(x: Tensor, eps: Tensor) -> Tensor:
        return x * torch.rsqrt(mean(x * x) + eps.item())

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        function, recorder = compiled(formula)
        x, eps = torch.randn(2, D), torch.tensor(1e-3)
        torch.testing.assert_close(function(x, eps), formula(x, eps))
    assert recorder.before == recorder.after and "read off a tensor" in recorder.left[0]
