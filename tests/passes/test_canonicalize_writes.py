"""canonicalize: a tensor written between the cast that reads it and the formula's end is not read anew."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from formulas import D
from recorder import compiled
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@torch.library.custom_op("test_canonicalize::bump", mutates_args={"x"})
def bump(x: Tensor) -> None:
    x.add_(1)


bump.register_fake(lambda x: None)


def set_data(x: Tensor) -> None:
    x.data = x + 1


WRITES = {
    "method": lambda x: x.add_(1),
    "dunder": lambda x: x.__iadd__(1),
    "shift": lambda x: x.view(torch.int16).__ilshift__(1),
    "item": lambda x: x.__setitem__((0, 0, 0), 5),
    "view": lambda x: x[:, 0].add_(1),
    "data": lambda x: x.data.add_(1),
    "set data": set_data,
    "out": lambda x: torch.add(x, 1, out=x),
    "foreach": lambda x: torch._foreach_add_([x], 1),
    "inplace": lambda x: F.relu(x, inplace=True),
    "inplace by position": lambda x: F.relu(x, True),
    "aten": lambda x: torch.ops.aten.add_(x, 1),
    "aten overload": lambda x: torch.ops.aten.add_.Tensor(x, 1),
    "aten out": lambda x: torch.ops.aten.mul.out(x, x, out=x),
    "custom op": lambda x: bump(x),
    "custom op packet": lambda x: torch.ops.test_canonicalize.bump(x),
    "checkpoint": lambda x: checkpoint(lambda y: y.add_(1), x, use_reentrant=False),
    "renorm": lambda x: F.embedding(torch.tensor([0]), x[0].data, max_norm=0.1),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_the_source_of_a_cast_written_in_place_keeps_the_cast_where_it_is(write: Callable[[Tensor], object]) -> None:
    def formula(x: Tensor) -> Tensor:
        h = x.float()
        write(x)
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)

    x = torch.randn(2, 3, D).bfloat16()
    function, recorder = compiled(formula)
    assert torch.equal(function(x.clone()), formula(x.clone()))
    assert not recorder.fired and "changes a tensor" in recorder.left[0]


def test_an_operator_that_writes_nothing_may_stand_inside() -> None:
    def formula(x: Tensor, y: Tensor) -> Tensor:
        h = x.float()
        y = torch.ops.aten.mul.Tensor(y, y)
        return torch.sigmoid(h) * h + y

    x = torch.randn(2, D).bfloat16()
    function, recorder = compiled(formula)
    torch.testing.assert_close(function(x, x), formula(x, x))
    assert len(recorder.fired) == 1
