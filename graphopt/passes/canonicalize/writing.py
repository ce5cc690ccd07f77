"""Putting an op in a formula's place: its dtypes and metadata, and what dies with the formula."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.passes.canonicalize.legality import Reason, differing
from graphopt.passes.canonicalize.matching import Match
from graphopt.passes.canonicalize.operations import is_cast, value


class Writer:
    """Inserts nodes ahead of a match's root and remembers them."""

    def __init__(self, root: fx.Node, found: Match) -> None:
        self.root, self.found, self.graph = root, found, root.graph
        self.x: Any = found.names["x"]
        self.made: list[fx.Node] = []

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a function, or of the method that a string names."""
        method = isinstance(target, str)
        node = self.graph.create_node("call_method" if method else "call_function", target, args, kwargs)
        node.meta = {k: v for k, v in self.root.meta.items() if k not in ("example_value", "val", "tensor_meta")}
        function = getattr(Tensor, target) if method else target
        with torch.no_grad():
            result = function(*fx.map_arg(args, value), **fx.map_arg(kwargs, value))
        node.meta["val" if "val" in self.root.meta else "example_value"] = result
        self.made.append(node)
        return node

    def attribute(self, target: str) -> fx.Node:
        node = self.graph.get_attr(target)
        self.made.append(node)
        return node

    def apply(self, op: Callable[[fx.Node], fx.Node], wide: torch.dtype | None = None) -> fx.Node:
        """op(x) with the root's dtype, computed in what x, root and `wide` promote to."""
        before, after = value(self.x).dtype, value(self.root).dtype
        dtype = reduce(torch.promote_types, (after, wide or before), before)
        return self._cast(op(self._cast(self.x, dtype)), after)

    def _cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return node if value(node).dtype == dtype else self.call("to", node, dtype)


Replacement = Callable[[Writer], fx.Node | Reason]


def put_in_place(root: fx.Node, found: Match, replacement: Replacement) -> fx.Node | Reason:
    """Have everybody read the replacement where they read the root, or give the reason why they cannot."""
    with root.graph.inserting_before(root):
        writer = Writer(root, found)
        result = replacement(writer)
    if isinstance(result, fx.Node):
        result = differing(root, result) or result
    if isinstance(result, Reason):
        for node in reversed(writer.made):
            root.graph.erase_node(node)
        return result
    result.meta = dict(root.meta)
    root.replace_all_uses_with(result)
    return result


def erase(root: fx.Node, found: Match) -> set[fx.Node]:
    """Erase a replaced root and what only the formula read."""
    erased: set[fx.Node] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        spare = node in found.interior or is_cast(node) or node.target is getattr
        if spare and not node.users and node not in erased:
            waiting += node.all_input_nodes
            node.graph.erase_node(node)
            erased.add(node)
    return erased
