"""PyTorch's own operator database: each differentiable operator with its samples, as functions to be compiled."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo

OPERATORS: dict[str, tuple[OpInfo, Callable[..., Any]]] = {}
for _op in sorted(op_db, key=lambda op: op.formatted_name):
    if _op.supports_autograd and torch.float32 in _op.supported_backward_dtypes("cpu"):
        OPERATORS[_op.formatted_name] = _op, _op.op
        if _op.inplace_variant is not None and _op.supports_inplace_autograd:
            OPERATORS[f"{_op.formatted_name}-in-place"] = _op, _op.inplace_variant


def spread(count: int) -> list[str]:
    """`count` names of operators, evenly over the alphabet."""
    names = list(OPERATORS)
    return [names[place * len(names) // count] for place in range(min(count, len(names)))]


@torch.library.custom_op("graphopt_tests::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    """x, from an operator whose price nobody knows: what it gives is saved rather than made anew."""
    return x.clone()


opaque.register_fake(lambda x: x.clone())
opaque.register_autograd(lambda ctx, grad: grad.clone())


@dataclass(frozen=True)
class Sample:
    """A call of an operator: `function(one, *tensors)`, where `one` is 1 and unknown to a compiler.

    What the operator reads is multiplied by it, or `saved` behind an opaque operator, and what it gives is multiplied,
    so that both are neither inputs of the graph nor outputs, and a plan has to say what becomes of them.
    """

    function: Callable[..., Any]
    tensors: tuple[Tensor, ...]

    def run(self, function: Callable[..., Any], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Outputs of `function`, then gradients of the tensors, for a fixed weighted sum of the outputs."""
        torch.manual_seed(1)
        leaves = [_converted(each, dtype) for each in self.tensors]
        outputs = _differentiable(function(torch.ones((), dtype=dtype), *leaves))
        torch.manual_seed(2)
        weights = [torch.randn(each.shape, dtype=torch.float64).to(each.dtype) for each in outputs]
        trained = [each for each in leaves if each.requires_grad]
        loss = torch.stack([(each * weight).sum().abs() for each, weight in zip(outputs, weights)]).sum()
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        return [each.detach() for each in (*outputs, *gradients) if each is not None]


def samples(name: str, count: int, saved: bool = False) -> Iterator[Sample]:
    """Up to `count` of the operator's samples in float32 that have a gradient."""
    op, operator = OPERATORS[name]
    given = op.sample_inputs("cpu", torch.float32, requires_grad=True)
    if operator is not op.op:
        given = (each for each in given if not each.broadcasts_input)
    found = (_sample(operator, each, saved) for each in given)
    return itertools.islice((each for each in found if each is not None), count)


def _sample(operator: Callable[..., Any], given: Any, saved: bool) -> Sample | None:
    leaves, structure = pytree.tree_flatten((given.input, given.args, given.kwargs))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if any(leaves[place].layout is not torch.strided for place in places):
        return None  # sparse tensors are in test_limits.py
    change = given.output_process_fn_grad

    def function(one: Tensor, *tensors: Tensor) -> Any:
        filled = list(leaves)
        for place, tensor in zip(places, tensors):
            filled[place] = _met(tensor, one, saved) if tensor.requires_grad else tensor
        first, args, kwargs = pytree.tree_unflatten(filled, structure)
        return [
            each * one if isinstance(each, Tensor) and each.is_floating_point() and not each.is_sparse else each
            for each in pytree.tree_leaves(change(operator(first, *args, **kwargs)))
        ]

    sample = Sample(function, tuple(leaves[place] for place in places))
    torch.manual_seed(1)
    try:
        outputs = function(torch.ones(()), *map(_converted, sample.tensors))
    except RuntimeError:
        return None  # eager mode does not take it: a view in place of a tensor whose storage is too small
    return sample if _differentiable(outputs) else None


def _met(tensor: Tensor, one: Tensor, saved: bool) -> Tensor:
    return opaque(tensor) if saved else tensor * one


def _differentiable(outputs: list[Any]) -> list[Tensor]:
    return [each for each in outputs if isinstance(each, Tensor) and each.requires_grad and not each.is_sparse]


def _converted(each: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A leaf of its own, floats in another precision."""
    own = each.detach().clone()
    if own.is_floating_point():
        own = own.to(dtype)
    elif own.is_complex():
        own = own.to(dtype.to_complex())
    return own.requires_grad_(each.requires_grad)
