"""What one node of a forward graph does, however it is spelled: operator, function, method or module."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

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
_CASTS = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}
_MODES = {
    "_set_grad_enabled", "_enter_autocast", "_exit_autocast", "_enter_inference_mode", "_exit_inference_mode",
}  # fmt: skip
_WRITES = {
    "setitem", "__setitem__", "iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imod", "iand", "ior", "ixor",
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


def cast_to(node: object) -> torch.dtype | fx.Node | None:
    """The dtype a cast gives, or the node whose dtype it takes; None for what is no cast."""
    if not isinstance(node, fx.Node) or node.op != "call_method":
        return None
    if node.target in _CASTS and len(node.args) == 1 and not node.kwargs:
        return _CASTS[str(node.target)]
    if node.target not in ("to", "type_as") or len(node.args) + len(node.kwargs) != 2:
        return None
    to = node.args[1] if len(node.args) == 2 else node.kwargs.get("dtype")
    if isinstance(to, torch.dtype):
        return to
    if not isinstance(to, fx.Node):
        return None
    if to.target is getattr and to.args[1] == "dtype":
        return to.args[0] if isinstance(to.args[0], fx.Node) else None
    return to if node.target == "type_as" or isinstance(value(to), torch.Tensor) else None


def through_casts(node: fx.Node) -> list[fx.Node]:
    """A node and, if it is a cast, what it casts, down to what is no cast."""
    nodes = [node]
    while cast_to(node) is not None and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        nodes.append(node)
    return nodes


def origin(node: fx.Node) -> fx.Node:
    """The node before casts that lose nothing."""
    while (to := cast_to(node)) is not None:
        source = node.args[0]
        before, after = value(source), value(node)
        if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
            lossless = before.is_floating_point() and torch.promote_types(before.dtype, after.dtype) == after.dtype
        else:
            lossless = to in (torch.float32, torch.float64)
        if not lossless or not isinstance(source, fx.Node):
            break
        node = source
    return node


def reduction(node: fx.Node) -> tuple[tuple[int, ...], bool, Any] | None:
    """(dims, keepdim, correction) of a mean or var call; None where it cannot be told."""
    is_var = spelled(node) == "var"
    order = ("dim", "unbiased", "keepdim") if is_var else ("dim", "keepdim")
    given = {**dict(zip(order, node.args[1:])), **node.kwargs}
    dims = given.pop("dim", None)
    dims = (dims,) if type(dims) is int else dims
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
    """Whether a node writes into a tensor, or switches grad, inference or autocast on or off."""
    if node.op == "call_module":
        return bool(getattr(module_called(node), "inplace", False))
    if node.op not in ("call_method", "call_function"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    inplace = node.kwargs.get("inplace") or (name in vars(F) and any(each is True for each in node.args))
    written = name.removesuffix("__").endswith("_") or name in _WRITES
    return bool(inplace or written or "out" in node.kwargs or name in _MODES)
