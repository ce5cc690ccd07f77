"""What one node of a forward graph does, however it is spelled: operator, function, method or module."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

_ALIASES = {
    "multiply": "mul", "truediv": "div", "divide": "div", "true_divide": "div", "subtract": "sub", "negative": "neg",
    "expit": "sigmoid",
}  # fmt: skip
_NAMES = _ALIASES | {
    name: name
    for name in (
        "add", "sub", "mul", "div", "neg", "pow", "square", "sqrt", "rsqrt", "reciprocal",
        "exp", "tanh", "erf", "sigmoid", "mean", "var", "rms_norm",
    )
}  # fmt: skip
_PLACES = (operator, torch, F, torch.special)
_FUNCTIONS = {getattr(place, name): op for name, op in _NAMES.items() for place in _PLACES if hasattr(place, name)}
_MODULES: dict[type, str] = {nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.RMSNorm: "rms_norm"}
_CASTS = {"float", "double", "half", "bfloat16"}
_MODES = {
    "_set_grad_enabled", "_enter_autocast", "_exit_autocast", "_enter_inference_mode", "_exit_inference_mode",
}  # fmt: skip
_WRITES = {
    "setitem", "iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "ipow", "imod", "iand", "ior", "ixor",
    "ilshift", "irshift",
}  # fmt: skip


def value(node: object) -> Any:
    """What a node stands for: the fake value in its metadata, the parameter a get_attr reads, or None if unknown."""
    if not isinstance(node, fx.Node):
        return None
    found = node.meta.get("example_value", node.meta.get("val"))
    if found is None and node.op == "get_attr" and node.graph.owning_module is not None:
        return operator.attrgetter(str(node.target))(node.graph.owning_module)
    return found


def module_called(node: fx.Node) -> nn.Module | None:
    if node.op != "call_module" or node.graph.owning_module is None:
        return None
    return node.graph.owning_module.get_submodule(str(node.target))


def spelled(node: object) -> str | None:
    """The one name of the operation a node does; None for one that no formula here has."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "call_module":
        return _MODULES.get(type(module_called(node)))
    if node.op == "call_method":
        return _NAMES.get(str(node.target))
    return _FUNCTIONS.get(node.target) if node.op == "call_function" else None


def is_cast(node: object) -> bool:
    """Whether a node is a tensor in another dtype, where it was."""
    if not isinstance(node, fx.Node) or node.op != "call_method":
        return False
    before, after = value(node.args[0]), value(node)
    if isinstance(before, Tensor) and isinstance(after, Tensor) and before.device != after.device:
        return False
    if node.target not in ("to", "type_as"):
        return node.target in _CASTS and len(node.args) == 1 and not node.kwargs
    to = node.args[1] if len(node.args) == 2 else node.kwargs.get("dtype")
    if len(node.args) + len(node.kwargs) != 2:
        return False
    of_another = isinstance(to, fx.Node) and to.target is getattr and to.args[1] == "dtype"
    return of_another or isinstance(to, torch.dtype) or isinstance(value(to), Tensor)


def through_casts(node: fx.Node) -> list[fx.Node]:
    """A node and, if it is a cast, what it casts, down to what is no cast."""
    nodes = [node]
    while is_cast(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        nodes.append(node)
    return nodes


def through_lossless(node: fx.Node) -> list[fx.Node]:
    """A node and, if it is a cast that loses nothing, what it casts, down to what is no such cast."""
    nodes = [node]
    for source in through_casts(node)[1:]:
        before, after = value(source), value(nodes[-1])
        if not isinstance(before, Tensor) or not isinstance(after, Tensor) or not before.is_floating_point():
            break
        if torch.promote_types(before.dtype, after.dtype) != after.dtype:
            break
        nodes.append(source)
    return nodes


def origin(node: fx.Node) -> fx.Node:
    """The node before casts that lose nothing."""
    return through_lossless(node)[-1]


def reduction(node: fx.Node) -> tuple[tuple[int, ...], bool, Any] | None:
    """(dims, keepdim, correction) of a mean or var call, no dims for all; None where they are not literal."""
    is_var = spelled(node) == "var"
    order = ("dim", "unbiased", "keepdim") if is_var else ("dim", "keepdim")
    given = {**dict(zip(order, node.args[1:])), **node.kwargs}
    dims = given.pop("dim", None)
    dims = (dims,) if type(dims) is int else () if dims is None else dims
    given.pop("dtype", None)  # like a cast: the node's value has it
    keepdim = given.pop("keepdim", False) is True
    correction = given.pop("correction", None)
    unbiased = given.pop("unbiased", None)
    if given or len(node.args) > 1 + len(order) or not isinstance(dims, (tuple, list)):
        return None
    if any(type(dim) is not int for dim in dims):
        return None
    correction = int(unbiased is not False) if correction is None else correction
    return tuple(dims), keepdim, correction if is_var else 0


def interferes(node: fx.Node) -> bool:
    """Whether a node may write into a tensor, or switches grad, inference or autocast on or off."""
    target = node.target
    if node.op == "call_module":
        return bool(getattr(module_called(node), "inplace", False))
    if node.op not in ("call_method", "call_function"):
        return False
    # what runs a graph of its own, as checkpoint does, may write in there
    if isinstance(target, HigherOrderOperator):
        return True
    if isinstance(target, OpOverload):
        return bool(target._schema.is_mutable)
    if isinstance(target, OpOverloadPacket):
        return any(getattr(target, each)._schema.is_mutable for each in target._overload_names)
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    inplace = node.kwargs.get("inplace") or (name in vars(F) and any(each is True for each in node.args))
    # max_norm scales rows of the table where it stands; either function takes it fourth
    if name in ("embedding", "embedding_bag") and any((*node.args[3:4], node.kwargs.get("max_norm"))):
        return True
    written = name.removesuffix("__").endswith("_") or name.strip("_") in _WRITES
    return bool(inplace or written or "out" in node.kwargs or name in _MODES)
