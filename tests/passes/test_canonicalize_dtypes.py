"""canonicalize: dtypes are the formula's own, constants as exact as they allow, and nothing overflows that did not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from formulas import ACTIVATIONS, NORMS, D, prepared, rounding
from recorder import compiled
from torch import Tensor
from transformers import activations

# these two write sqrt(2 / pi) with ten digits
EXACT = [each for each in ACTIVATIONS if each[0] not in ("FastGELUActivation", "tanh distributed")]


@pytest.mark.parametrize(("make", "op"), [pytest.param(m, op, id=name) for name, m, op in NORMS])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_output_dtype_is_the_formulas_own(make: Any, op: str, dtypes: Any, autocast: bool) -> None:
    module, x = prepared(make, dtypes[1]), torch.randn(2, 3, D).to(dtypes[0])
    function, recorder = compiled(module)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        wanted, got = module(x), function(x)
    assert op in recorder.after and got.dtype == wanted.dtype
    # the op works in float32 and its result is rounded once
    exact = module.double()(x.double())
    assert (got.double() - exact).abs().max().item() <= rounding(got.dtype, 1, exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64], ids=str)
def test_other_dtypes_keep_their_values(dtype: torch.dtype) -> None:
    def formula(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    x = torch.arange(1, 9).to(dtype)
    torch.testing.assert_close(compiled(formula)[0](x), formula(x))


def test_quick_gelu_holds_at_the_end_of_float16() -> None:
    x = torch.tensor([-65504.0, -1.0, 40000.0, 65504.0], dtype=torch.float16)
    module = activations.QuickGELUActivation()
    # half a place of float16, and less than as much again for the roundings in float32
    torch.testing.assert_close(compiled(module)[0](x).double(), module(x.double()), rtol=2**-10, atol=0)


def seven_digits(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(0.7978846 * (x + 0.044715 * x**3)))


def six_digits(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(0.797885 * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(
    ("formula", "dtype"),
    [(activations.FastGELUActivation(), torch.float64), (seven_digits, torch.float64), (six_digits, torch.float32)],
    ids=["ten digits in float64", "seven digits in float64", "six digits in float32"],
)
def test_a_constant_that_differs_beyond_rounding_is_left_alone(formula: Any, dtype: torch.dtype) -> None:
    x = torch.randn(2, D, dtype=dtype)
    function, recorder = compiled(formula)
    assert torch.equal(function(x), formula(x))
    assert not recorder.fired and "constants" in recorder.left[0]


@pytest.mark.parametrize(("make", "op"), [pytest.param(m, op, id=name) for name, m, op in EXACT])
def test_constants_given_in_full_match_in_float64(make: Any, op: str) -> None:
    function, recorder = compiled(make())
    x = torch.randn(2, D, dtype=torch.float64)
    torch.testing.assert_close(function(x), make()(x))
    assert op in recorder.after and len(recorder.fired) == 1
