"""Whether a formula that was found may go: each function gives the reason why not, if there is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from graphopt.passes.canonicalize.matching import Match
from graphopt.passes.canonicalize.operations import cast_to, interferes, reduction, spelled, value


class Reason(str):
    """Why a match is left alone."""


def illegal(root: fx.Node, found: Match) -> Reason | None:
    """Why no op may stand for the formula, whichever op it is: readers, writes, modes, roundings."""
    inner, x = found.interior - {root}, found.names["x"]
    if any(user not in found.interior for node in inner for user in node.users):
        return Reason("a value inside the formula has another reader")
    node = min(found.interior)
    while node is not root:
        if interferes(node):
            return Reason(f"{node.name} changes a tensor or a mode inside the formula")
        node = node.next
    if any(is_traceable_wrapper_subclass(value(each)) for each in found.names.values()):
        return Reason("its tensors are of a subclass, which the op need not know")
    if free_unbacked_symbols(value(found.names.get("eps"))):
        return Reason("its eps is read off a tensor")
    before, after = value(x), value(root)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        rounds = any(cast_to(node) in (torch.float16, torch.bfloat16) for node in inner)
        return Reason("it rounds to half precision on purpose") if rounds else None
    if not before.is_floating_point() or not after.is_floating_point():
        return Reason(f"it takes {before.dtype} to {after.dtype}, not floating point to floating point")
    if cast_to(x) is not None and getattr(value(x.args[0]), "dtype", None) == torch.float64:
        return Reason("it rounds float64 on purpose")
    for node in inner:
        dtype = getattr(value(node), "dtype", before.dtype)
        if dtype != after.dtype and torch.promote_types(dtype, before.dtype) != dtype:
            return Reason(f"it rounds to {dtype} on purpose")
    return None


def normalized_shape(found: Match) -> Sequence[int | torch.SymInt] | Reason:
    """The sizes of the dims a norm is taken over: x's last and the weight's and bias's only ones, or a Reason."""
    x = value(found.names["x"])
    rank = x.dim() if isinstance(x, Tensor) else 0
    reductions = [each for each in map(reduction, found.reductions) if each is not None and each[1]]
    if len(reductions) < len(found.reductions):
        return Reason("its mean drops the dims it is taken over")
    if any(correction for _, _, correction in reductions):
        return Reason("its variance is unbiased, a norm's is not")
    dims = {tuple(sorted(dim - rank if rank and dim >= 0 else dim for dim in each)) for each, _, _ in reductions}
    last = tuple(range(-len(reductions[0][0]), 0))
    if dims != {last} or not last:
        return Reason("it does not normalise over the last dims")
    affine = [_parameter(found.names[name]) for name in ("w", "b") if name in found.names]
    shapes = [each.shape for each in affine if isinstance(each, Tensor)]
    if len(shapes) < len(affine) or not (shapes or rank):
        return Reason("the size of the normalised dims is not known")
    shape: Sequence[int | torch.SymInt] = x.shape[-len(last) :] if isinstance(x, Tensor) else shapes[0]
    # without x's sizes a weight of size 1 may be broadcast
    if any(len(each) != len(last) or not _same(each, shape) for each in shapes) or (not rank and 1 in shape):
        return Reason("its weight or bias is not of the normalised dims' shape")
    return shape


def differing(root: fx.Node, result: fx.Node) -> Reason | None:
    """Why the op's result, as far as it is known, cannot stand for the root."""
    old, new = value(root), value(result)
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return None
    same = old.dtype == new.dtype and _same(old.shape, new.shape)
    return None if same else Reason("the op gives another shape or dtype")


def _parameter(node: fx.Node) -> Any:
    # a parameter cast, or shifted and scaled by numbers, keeps its shape
    while value(node) is None and len(node.all_input_nodes) == 1:
        if cast_to(node) is None and spelled(node) not in ("add", "sub", "mul"):
            break
        node = node.all_input_nodes[0]
    return value(node)


def _same(left: Sequence[Any], right: Sequence[Any]) -> bool:
    return len(left) == len(right) and all(statically_known_true(a == b) for a, b in zip(left, right))
