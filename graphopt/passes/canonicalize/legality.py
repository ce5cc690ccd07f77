"""Whether a formula that was found may go: each function gives the reason why not, if there is one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from graphopt.graph import same_sizes
from graphopt.passes.canonicalize.matching import Match
from graphopt.passes.canonicalize.operations import interferes, is_cast, reduction, through_lossless, value

# what a constant may be off by, relative to itself: two products of four roundings each in float64; else half a place
# of float32, the same or the neighbouring float32. As |u| / (2 cosh(u)^2) < 0.23, a tanh GELU moves by 0.23 |x| 2**-24
_FLOAT64, _FLOAT32 = 2**-50, 2**-24


class Reason(str):
    """Why a match is left alone."""


def illegal(root: fx.Node, found: Match) -> Reason | None:
    """Why no op may stand for the formula, whichever op it is: readers, writes, modes, roundings."""
    inner, x = found.interior - {root}, found.names["x"]
    if any(user not in found.interior for node in inner for user in node.users):
        return Reason("a value inside the formula has another reader")
    # a cast that was looked through read its source back then
    read = {each for node in found.interior for each in node.all_input_nodes}
    node = min(found.interior.union(*(through_lossless(each)[:-1] for each in read)))
    while node is not root:
        if interferes(node):
            return Reason(f"{node.name} changes a tensor or a mode inside the formula")
        node = node.next
    if any(is_traceable_wrapper_subclass(value(each)) for each in found.names.values()):
        return Reason("its tensors are of a subclass, which the op need not know")
    if free_unbacked_symbols(value(found.names.get("eps"))):
        return Reason("its eps is read off a tensor")
    tensors = found.interior.union(each for name, each in found.names.items() if name != "eps")
    if not all(isinstance(value(node), Tensor) for node in tensors):
        return Reason("its values are not tensors of known dtype and shape: give example inputs")
    before, after = value(x), value(root)
    if not before.is_floating_point() or not after.is_floating_point():
        return Reason(f"it takes {before.dtype} to {after.dtype}, not floating point to floating point")
    if is_cast(x) and value(x.args[0]).dtype == torch.float64:
        return Reason("it rounds float64 on purpose")
    for node in inner:
        dtype = value(node).dtype
        if dtype != after.dtype and torch.promote_types(dtype, before.dtype) != dtype:
            return Reason(f"it rounds to {dtype} on purpose")
    if found.off > (_FLOAT64 if after.dtype == torch.float64 else _FLOAT32):
        return Reason(f"its constants are not the op's own to the accuracy of {after.dtype}")
    return None


def normalized_shape(found: Match) -> Sequence[int | torch.SymInt] | Reason:
    """The sizes of the dims a norm is taken over: x's last and the weight's and bias's only ones, or a Reason."""
    x = value(found.names["x"])
    reductions = [each for each in map(reduction, found.reductions) if each is not None]
    if len(reductions) < len(found.reductions):
        return Reason("the dims its mean is taken over are not literal")
    if not all(keepdim for _, keepdim, _ in reductions):
        return Reason("its mean drops the dims it is taken over")
    if any(correction for _, _, correction in reductions):
        return Reason("its variance is unbiased, a norm's is not")
    dims = {tuple(sorted(dim - x.dim() if dim >= 0 else dim for dim in each)) for each, _, _ in reductions}
    last = tuple(range(-len(reductions[0][0]), 0))
    if dims != {last} or not last:
        return Reason("it does not normalise over the last dims")
    shape: Sequence[int | torch.SymInt] = x.shape[-len(last) :]
    affine = [value(found.names[name]) for name in ("w", "b") if name in found.names]
    if not all(same_sizes(each.shape, shape) for each in affine):
        return Reason("its weight or bias is not of the normalised dims' shape")
    return shape


def differing(root: fx.Node, result: fx.Node) -> Reason | None:
    """Why the op's result cannot stand for the root."""
    old, new = value(root), value(result)
    same = old.dtype == new.dtype and same_sizes(old.shape, new.shape)
    return None if same else Reason("the op gives another shape or dtype")
