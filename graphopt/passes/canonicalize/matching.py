"""Where a formula stands in a graph, whatever its spelling.

A formula is a Python function as a user would write it. Formula and graph are compared in a normal form: a chain of
multiplications, divisions and powers is one product, coefficient times factors each to a power, in any order;
x.pow(2), x * x, torch.square(x) and 1 / sqrt(v), rsqrt(v), v ** -0.5 are then the same. A sum has two operands. Casts
are looked through and recorded: whether they may go is for legality.py to say. A parameter of a formula stands for any
node, or, named `eps`, for a number.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from graphopt.passes.canonicalize.operations import origin, spelled, through_casts, value

_POWERS = {"sqrt": 0.5, "rsqrt": -0.5, "square": 2.0, "reciprocal": -1.0}
# what one product may multiply through, lest a long chain be walked anew from each of its nodes
_LONGEST = 64

# a factor and its power, or an operand and its sign
Weighted = tuple[Any, float]

# a constant is recognised by six digits; whether that is enough of them is for legality.py to say
_RECOGNISED = 1e-6


@dataclass(frozen=True)
class Match:
    """Where a formula was found: what its parameters stand for, the nodes from them to the root, its means and vars.

    `off` is how far its constants are from the formula's, relative to them.
    """

    names: dict[str, Any] = field(default_factory=dict)
    interior: frozenset[fx.Node] = frozenset()
    reductions: tuple[fx.Node, ...] = ()
    off: float = 0.0

    def inside(self, nodes: Sequence[fx.Node]) -> Match:
        return replace(self, interior=self.interior.union(nodes))


def pattern(formula: Callable[..., Any]) -> fx.Node:
    """The outermost operation of a formula's own graph."""
    result = next(iter(fx.symbolic_trace(formula).graph.find_nodes(op="output"))).args[0]
    assert isinstance(result, fx.Node)
    return result


def match(wanted: fx.Node, root: fx.Node) -> Match | None:
    """The match of a pattern whose outermost operation is `root`, if there is one."""
    return next(_node(wanted, root, Match()), None)


def _node(wanted: Any, node: Any, found: Match) -> Iterator[Match]:
    if not isinstance(wanted, fx.Node):
        if isinstance(node, (int, float)):
            yield from _constant(wanted, node, found)
    elif wanted.op == "placeholder":
        name, bound = str(wanted.target), origin(node) if isinstance(node, fx.Node) else node
        number = isinstance(node, (int, float)) or isinstance(value(node), torch.SymFloat)
        if number == (name == "eps") and found.names.get(name, bound) == bound:
            yield replace(found, names={**found.names, name: bound})
    elif isinstance(node, fx.Node):
        passed = through_casts(node)
        yield from _operation(wanted, passed[-1], found.inside(passed))


def _operation(wanted: fx.Node, node: fx.Node, found: Match) -> Iterator[Match]:
    kind, other = spelled(wanted), spelled(node)
    if (product := _pattern_product(wanted)) is not None:
        given = _product(node)
        if given is not None:
            for settled in _constant(product.coefficient, given.coefficient, found.inside(given.inside)):
                yield from _paired(list(product.factors.values()), list(given.factors.values()), settled)
    elif kind in ("add", "sub") and other in ("add", "sub"):
        yield from _paired(_operands(wanted), _operands(node), found)
    elif kind == other and (kind in ("mean", "var", "rms_norm") or len(node.args) + len(node.kwargs) == 1):
        if kind in ("mean", "var"):
            found = replace(found, reductions=(*found.reductions, node))
        yield from _node(wanted.args[0], node.args[0] if node.args else node.kwargs.get("input"), found)


def _constant(wanted: float, given: float, found: Match) -> Iterator[Match]:
    if math.isclose(wanted, given, rel_tol=_RECOGNISED):
        yield replace(found, off=max(found.off, abs(given / wanted - 1)))


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


@dataclass
class Product:
    """A coefficient, factors by what they are before casts, and the nodes multiplied through."""

    coefficient: float = 1.0
    factors: dict[fx.Node, Weighted] = field(default_factory=dict)
    inside: list[fx.Node] = field(default_factory=list)

    def take(self, node: Any, power: float) -> None:
        """Multiply by node ** power, taken apart where that is the same."""
        if isinstance(node, (int, float)):
            self.coefficient *= _raised(node, power)
            return
        passed = through_casts(node)
        # only below a whole power: (ab)^n = a^n b^n and (v^k)^n = v^(kn) hold for every real there
        if power.is_integer() and len(self.inside) < _LONGEST and (_single(passed) or _is_root(passed[-1])):
            parts = _parts(passed[-1])
        else:
            parts = []
        if parts:
            self.inside += passed
            for part, inner in parts:
                self.take(part, power * inner)
        else:
            key = origin(node)
            self.factors[key] = (node, power + (self.factors[key][1] if key in self.factors else 0.0))


def _product(root: fx.Node) -> Product | None:
    # None where the root is no product
    product, parts = Product(), _parts(root)
    for part, power in parts:
        product.take(part, power)
    return product if parts else None


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


def _is_root(node: fx.Node) -> bool:
    return spelled(node) in ("sqrt", "rsqrt")


def _raised(number: float, power: float) -> float:
    # nan, which matches nothing, where the power is no finite real
    try:
        return math.pow(number, power)
    except (ValueError, OverflowError):
        return math.nan
