"""Formulas written out in a forward graph, and how one is recognised whatever its spelling.

A pattern is a Python function as a user would write it. Pattern and graph are compared in a normal form: a chain of
multiplications, divisions and powers is one product, coefficient times factors each to a power, in any order;
x.pow(2), x * x, torch.square(x) and 1 / sqrt(v), rsqrt(v), v ** -0.5 are then the same. A sum has two operands. Casts
are looked through and recorded: whether they may go is for the reader of the Match to say. A parameter of a pattern
stands for any node, or, named `eps`, for a number.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

_NAMES = {
    "mul": "mul", "multiply": "mul", "div": "div", "truediv": "div", "divide": "div", "true_divide": "div",
    "add": "add", "sub": "sub", "subtract": "sub", "neg": "neg", "negative": "neg", "pow": "pow", "sqrt": "sqrt",
    "rsqrt": "rsqrt", "square": "square", "reciprocal": "reciprocal", "tanh": "tanh", "erf": "erf", "exp": "exp",
    "sigmoid": "sigmoid", "mean": "mean", "var": "var", "rms_norm": "rms_norm", "expit": "sigmoid",
}  # fmt: skip
_PLACES = (operator, torch, F, torch.special)
_FUNCTIONS = {getattr(place, name): op for name, op in _NAMES.items() for place in _PLACES if hasattr(place, name)}
_MODULES = {nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.RMSNorm: "rms_norm"}
_POWERS = {"sqrt": 0.5, "rsqrt": -0.5, "square": 2.0, "reciprocal": -1.0}
_MODES = ("_set_grad_enabled", "_enter_autocast", "_exit_autocast", "_enter_inference_mode", "_exit_inference_mode")
_WRITES = (
    "setitem",
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "ipow",
    "imod",
    "iand",
    "ior",
    "ixor",
    "__setitem__",
)
_CASTS = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}

# a factor and its power, or an operand and its sign
Weighted = tuple[Any, float]


@dataclass(frozen=True)
class Match:
    """Where a pattern was found: what its parameters stand for, and the nodes between them and the root."""

    names: dict[str, Any]
    interior: frozenset[fx.Node] = frozenset()
    reductions: tuple[fx.Node, ...] = ()

    def inside(self, *nodes: fx.Node) -> Match:
        return Match(self.names, self.interior.union(nodes), self.reductions)


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
    """The one name of the operation a node does, however it is called."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "call_module":
        return _MODULES.get(type(module_called(node)))  # type: ignore[arg-type]
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
    if isinstance(to, fx.Node) and to.target is getattr and to.args[1] == "dtype":
        return to.args[0] if isinstance(to.args[0], fx.Node) else None
    known_tensor = isinstance(value(to), torch.Tensor) or node.target == "type_as"
    return to if isinstance(to, torch.dtype) or (isinstance(to, fx.Node) and known_tensor) else None


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


def reduced(node: fx.Node) -> tuple[tuple[int, ...], bool, Any] | None:
    """(dims, keepdim, correction) of a mean or var call; None where it cannot be told."""
    order = ("dim", "keepdim") if spelled(node) == "mean" else ("dim", "unbiased", "keepdim")
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
    return tuple(dims), keepdim, correction if spelled(node) == "var" else 0


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


def pattern(function: Callable[..., Any]) -> fx.Node:
    """The root of a pattern function's graph."""
    result = next(iter(fx.symbolic_trace(function).graph.find_nodes(op="output"))).args[0]
    assert isinstance(result, fx.Node)
    return result


def match(wanted: fx.Node, root: fx.Node) -> Match | None:
    """The match of a pattern whose outermost operation is `root`, if there is one."""
    return next(_node(wanted, root, Match({})), None)


def _node(wanted: Any, node: Any, found: Match) -> Iterator[Match]:
    if not isinstance(wanted, fx.Node):
        if isinstance(node, (int, float)) and math.isclose(wanted, node, rel_tol=1e-6):
            yield found
    elif wanted.op == "placeholder":
        number = isinstance(node, (int, float)) or isinstance(value(node), torch.SymFloat)
        bound = origin(node) if isinstance(node, fx.Node) else node
        name = str(wanted.target)
        if number == (name == "eps") and found.names.get(name, bound) == bound:
            yield Match({**found.names, name: bound}, found.interior, found.reductions)
    elif isinstance(node, fx.Node):
        passed = list(_through_casts(node))
        yield from _operation(wanted, passed[-1], found.inside(*passed))


def _operation(wanted: fx.Node, node: fx.Node, found: Match) -> Iterator[Match]:
    kind = spelled(wanted)
    if (product := _pattern_product(wanted)) is not None:
        other = _product(node)
        if other is not None and math.isclose(product[0], other[0], rel_tol=1e-6):
            yield from _paired(product[1], other[1], found.inside(*other[2]))
    elif kind != spelled(node) and {kind, spelled(node)} != {"add", "sub"}:
        return
    elif kind in ("add", "sub"):
        yield from _paired(_operands(wanted), _operands(node), found)
    elif kind in ("mean", "var", "rms_norm") or len(node.args) + len(node.kwargs) == 1:
        if kind in ("mean", "var"):
            found = Match(found.names, found.interior, (*found.reductions, node))
        yield from _node(wanted.args[0], node.args[0] if node.args else node.kwargs.get("input"), found)


def _paired(wanted: Sequence[Weighted], given: Sequence[Weighted], found: Match) -> Iterator[Match]:
    if not wanted and not given:
        yield found
    elif len(wanted) == len(given):
        # operations before parameters: they settle what the parameters stand for
        (first, power), *rest = sorted(wanted, key=lambda each: getattr(each[0], "op", "") == "placeholder")
        for at, (node, other) in enumerate(given):
            if power == other:
                for settled in _node(first, node, found):
                    yield from _paired(rest, [*given[:at], *given[at + 1 :]], settled)


def _operands(node: fx.Node) -> list[Weighted]:
    # the two sides of a sum with their signs; a number takes its sign in
    if node.kwargs or len(node.args) != 2:
        return []
    sides = zip(node.args, (1.0, -1.0 if spelled(node) == "sub" else 1.0))
    return [(side * sign, 1.0) if isinstance(side, (int, float)) else (side, sign) for side, sign in sides]


def _product(root: fx.Node) -> tuple[float, list[Weighted], list[fx.Node]] | None:
    """A node as coefficient, factors and the nodes multiplied through; None where it is no product."""
    coefficient = 1.0
    inside: list[fx.Node] = []
    factors: dict[fx.Node, Weighted] = {}

    def take(node: Any, power: float) -> None:
        nonlocal coefficient
        if isinstance(node, (int, float)):
            coefficient *= _raised(node, power)
            return
        # only below a whole power: (ab)^n = a^n b^n and (v^k)^n = v^(kn) hold for every real there
        passed = list(_through_casts(node))
        apart = (
            power.is_integer() and len(inside) < 64 and (_single(passed) or spelled(passed[-1]) in ("sqrt", "rsqrt"))
        )
        parts = _parts(passed[-1]) if apart else ()
        if parts:
            inside.extend(passed)
            for part, inner in parts:
                take(part, power * inner)
        else:
            key = origin(node)
            factors[key] = (node, power + (factors[key][1] if key in factors else 0.0))

    for part, power in _parts(root):
        take(part, power)
    return (coefficient, list(factors.values()), inside) if _parts(root) else None


_pattern_product = functools.cache(_product)


def _parts(node: fx.Node) -> list[Weighted]:
    # one multiplication, division or power taken apart; nothing for any other operation
    kind, arguments = spelled(node), node.args
    if node.kwargs or not arguments or not all(isinstance(each, (int, float, fx.Node)) for each in arguments):
        return []
    if kind in ("mul", "div") and len(arguments) == 2:
        return [(arguments[0], 1.0), (arguments[1], -1.0 if kind == "div" else 1.0)]
    if kind == "neg":
        return [(-1.0, 1.0), (arguments[0], 1.0)]
    if kind == "pow" and len(arguments) == 2 and isinstance(arguments[1], (int, float)):
        return [(arguments[0], float(arguments[1]))]
    return [(arguments[0], _POWERS[kind])] if kind in _POWERS and isinstance(arguments[0], fx.Node) else []


def _single(nodes: Sequence[fx.Node]) -> bool:
    return all(len(node.users) == 1 for node in nodes)


def _raised(number: float, power: float) -> float:
    # nan, which matches nothing, where the power is no finite real
    try:
        return math.pow(number, power)
    except (ValueError, OverflowError):
        return math.nan


def _through_casts(node: fx.Node) -> Iterator[fx.Node]:
    yield node
    while cast_to(node) is not None and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        yield node
