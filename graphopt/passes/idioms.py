"""Formulas written out in a forward graph, and how one is recognised whatever its spelling.

A pattern is a Python function as a user would write it. Pattern and graph are compared in a normal form: a chain of
multiplications, divisions and powers is one product, coefficient times factors each to a power, in any order;
x.pow(2), x * x, torch.square(x) and 1 / sqrt(v), rsqrt(v), v ** -0.5 are then the same. A sum has two operands. Casts
are looked through and recorded: whether they may go is for the reader of the Match to say. A parameter of a pattern
stands for any node, or, named `eps`, for a number.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator
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
_CASTS = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}


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
    return _FUNCTIONS.get(node.target) if node.op == "call_function" else None  # type: ignore[arg-type]


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
            lossless = torch.promote_types(before.dtype, after.dtype) == after.dtype
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
        if number == (wanted.target == "eps"):
            bound = origin(node) if isinstance(node, fx.Node) else node
            if found.names.setdefault(str(wanted.target), bound) == bound:
                yield found
    elif isinstance(node, fx.Node):
        while cast_to(node) is not None:
            found = found.inside(node)
            node = node.args[0]
            if not isinstance(node, fx.Node):
                return
        yield from _operation(wanted, node, found.inside(node))


def _operation(wanted: fx.Node, node: fx.Node, found: Match) -> Iterator[Match]:
    kind = spelled(wanted)
    if (product := _product(wanted)) is not None:
        if (other := _product(node)) is None or not math.isclose(product[0], other[0], rel_tol=1e-6):
            return
        # operations before parameters: they settle what the parameters stand for
        factors = sorted(product[1], key=lambda factor: factor[0].op == "placeholder")
        yield from _factors(factors, other[1], found.inside(*other[2]))
    elif kind in ("add", "sub"):
        operands = _operands(wanted)
        for order in itertools.permutations(_operands(node) if spelled(node) in ("add", "sub") else ()):
            yield from _factors(operands, list(order), found)
    elif kind == spelled(node) and node.op != "call_module":
        if kind in ("mean", "var"):
            found = Match(found.names, found.interior, (*found.reductions, node))
        elif len(node.args) != len(wanted.args) and kind != "rms_norm":
            return
        yield from _node(wanted.args[0], node.args[0] if node.args else node.kwargs.get("input"), found)
    elif kind == spelled(node) and node.args:
        yield from _node(wanted.args[0], node.args[0], found)


def _factors(wanted: list[tuple[Any, float]], given: list[tuple[Any, float]], found: Match) -> Iterator[Match]:
    if len(wanted) != len(given):
        return
    if not wanted:
        yield found
        return
    (first, power), rest = wanted[0], wanted[1:]
    for at, (node, other) in enumerate(given):
        if power == other:
            start = Match(dict(found.names), found.interior, found.reductions)
            for settled in _node(first, node, start):
                yield from _factors(rest, given[:at] + given[at + 1 :], settled)


def _operands(node: fx.Node) -> list[tuple[Any, float]]:
    # the two sides of a sum with their signs; a number takes its sign in, operations come first
    if node.kwargs or len(node.args) != 2:
        return []
    second = -1.0 if spelled(node) == "sub" else 1.0
    sides = [(node.args[0], 1.0), (node.args[1], second)]
    sides = [(s * sign, 1.0) if isinstance(s, (int, float)) else (s, sign) for s, sign in sides]  # type: ignore[operator]
    return sorted(sides, key=lambda side: not isinstance(side[0], fx.Node) or side[0].op == "placeholder")


def _product(root: fx.Node) -> tuple[float, list[tuple[fx.Node, float]], list[fx.Node]] | None:
    """A node as coefficient, factors and the nodes multiplied through; None where it is no product."""
    coefficient, inside = 1.0, []
    factors: dict[fx.Node, tuple[fx.Node, float]] = {}

    def take(node: Any, power: float) -> bool:
        nonlocal coefficient
        if isinstance(node, (int, float)):
            coefficient *= float(node) ** power if node > 0 or (node and power.is_integer()) else math.nan
            return True
        if not isinstance(node, fx.Node):
            return False
        # only below a whole power: (ab)^n = a^n b^n and (v^k)^n = v^(kn) hold for every real there
        passed = list(_through_casts(node))
        if power.is_integer() and all(len(each.users) == 1 for each in passed) and multiply(passed[-1], power):
            inside.extend(passed)
            return True
        key = origin(node)
        factors[key] = (node, factors[key][1] + power if key in factors else power)
        return True

    def multiply(node: fx.Node, power: float) -> bool:
        nonlocal coefficient
        kind, arguments = spelled(node), node.args
        if node.kwargs or kind not in ("mul", "div", "neg", "pow", *_POWERS):
            return False
        if kind in ("mul", "div") and len(arguments) == 2:
            return take(arguments[0], power) and take(arguments[1], -power if kind == "div" else power)
        if kind == "neg":
            coefficient *= (-1.0) ** power
            return take(arguments[0], power)
        exponent = _POWERS.get(kind, arguments[1] if len(arguments) == 2 else None)
        return isinstance(exponent, (int, float)) and take(arguments[0], power * float(exponent))

    return (coefficient, list(factors.values()), inside) if multiply(root, 1.0) else None


def _through_casts(node: fx.Node) -> Iterator[fx.Node]:
    yield node
    while cast_to(node) is not None and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        yield node
