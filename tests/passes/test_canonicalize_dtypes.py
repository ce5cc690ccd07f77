"""canonicalize: dtypes are the formula's own, whatever is known of them, and nothing overflows that did not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from formulas import MATHS, NORMS, D, prepared
from recorder import compiled, operations
from torch import Tensor, fx
from transformers import activations

from graphopt.passes import canonicalize


@pytest.mark.parametrize(("make", "op"), [pytest.param(m, op, id=name) for name, m, op in NORMS])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_output_dtype_is_the_formulas_own(make: Any, op: str, dtypes: Any, autocast: bool) -> None:
    module, x = prepared(make, dtypes[1]), torch.randn(2, 3, D).to(dtypes[0])
    function, recorder = compiled(module)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        wanted, got = module(x), function(x)
    assert op in recorder.after and got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("name", ["LlamaRMSNorm", "Gemma3RMSNorm", "rms power", "layer norm float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_any_shapes_the_weight_gives_the_size_and_dtypes_hold(name: str, dtype: torch.dtype) -> None:
    module = prepared(next(make for other, make, _ in NORMS if other == name), torch.float32)
    gm = canonicalize(fx.symbolic_trace(module))
    assert not MATHS & set(operations(gm))
    x = torch.randn(2, 3, D).to(dtype)
    assert gm(x).dtype == module(x).dtype
    torch.testing.assert_close(gm(x), module(x), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64], ids=str)
def test_other_dtypes_keep_their_values(dtype: torch.dtype) -> None:
    def formula(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    x = torch.arange(1, 9).to(dtype)
    torch.testing.assert_close(compiled(formula)[0](x), formula(x))


def test_quick_gelu_holds_at_the_end_of_float16() -> None:
    x = torch.tensor([-65504.0, -1.0, 40000.0, 65504.0], dtype=torch.float16)
    module = activations.QuickGELUActivation()
    torch.testing.assert_close(compiled(module)[0](x), module(x), rtol=2**-9, atol=0)
