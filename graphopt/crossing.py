"""What a cut saves: the tensors that cross from forward to backward, their bytes, and marks of them for passes."""

from __future__ import annotations

import operator
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch._prims.rng_prims import run_and_save_rng_state

from graphopt.graph import ORIGIN, after_tangents, in_backward, is_random, storage, storage_bytes, tensor

# marks in node.meta of what a cut saves, and of what it runs in backward, if only to make it anew
SAVED, IN_BACKWARD = "graphopt_saved", "graphopt_in_backward"
CUT = "graphopt_cut"  # in the meta of a joint graph that is not decomposed yet: a Cut of it

Halves = tuple[fx.GraphModule, fx.GraphModule]  # forward, backward


@dataclass(frozen=True)
class Crossing:
    """The tensors that cross from forward to backward, and the names of what backward computes, be it only anew.

    Inputs of the graph are left out; of several that lie in one storage there is one. The nodes are those of a forward
    graph, or of a joint graph of which that would be cut.
    """

    saved: tuple[fx.Node, ...]
    in_backward: frozenset[str]

    @property
    def bytes(self) -> int:
        return storage_bytes(node.meta["val"] for node in self.saved)

    @property
    def random_state_bytes(self) -> int:
        """Of the states of random numbers that the cut itself saves, for what checkpointed regions draw anew."""
        makers = {node: node.args[0] for node in self.saved if node.target is operator.getitem}
        states = [node for node, maker in makers.items() if getattr(maker, "target", None) is run_and_save_rng_state]
        return storage_bytes(node.meta["val"] for node in states)


def crossing_of(halves: Halves, num_fwd_outputs: int) -> Crossing:
    """What crosses between two graphs: forward's outputs past the user's own."""
    forward, backward = halves
    outputs: Sequence[Any] = forward.graph.output_node().args[0]  # type: ignore[assignment]
    names = (node.name for node in backward.graph.nodes if node.op == "call_function")
    return Crossing(_distinct(outputs[num_fwd_outputs:], forward.graph), frozenset(names))


def crossing_if_saved(graph: fx.Graph, chosen: Iterable[fx.Node], num_fwd_outputs: int) -> Crossing:
    """What would cross, and be made anew, if `chosen` of a joint graph might be saved: what backward reads of it is.

    Backward has its results to give, and what it writes in place, such as buffers.
    """
    start, backward = set(chosen), in_backward(graph)
    results: Sequence[Any] = graph.output_node().args[0]  # type: ignore[assignment]
    queue = [node for node in results[num_fwd_outputs:] if isinstance(node, fx.Node)]
    queue += [node for node in backward if node.op == "call_function" and node.is_impure() and not is_random(node)]
    needed = set(queue)
    while queue:
        node = queue.pop()
        if node not in start:
            more = [each for each in node.all_input_nodes if each not in needed]
            needed.update(more)
            queue.extend(more)
    names = (node.name for node in needed if node.op == "call_function" and node not in start)
    return Crossing(_distinct([node for node in chosen if node in needed], graph), frozenset(names))


def _distinct(nodes: Iterable[Any], graph: fx.Graph) -> tuple[fx.Node, ...]:
    """Those that are tensors, in storages of their own, none an input's."""
    placeholders = (tensor(node) for node in graph.find_nodes(op="placeholder"))
    inputs = {storage(value) for value in placeholders if value is not None}
    found: dict[int, fx.Node] = {}
    for node in nodes:
        value = tensor(node)
        if value is not None and storage(value) not in inputs:
            found.setdefault(storage(value), node)
    return tuple(found.values())


def mark(gm: fx.GraphModule, found: Crossing) -> None:
    """Mark in the joint graph what a cut of it saves and what it runs in backward, for passes on saved tensors."""
    saved = {node.name for node in found.saved}
    for node in gm.graph.nodes:
        if node.name in saved:
            node.meta[SAVED] = True
        if node.name in found.in_backward:
            node.meta[IN_BACKWARD] = True


class Cut:
    """What a cut saves, and for whom."""

    def __init__(self, halves: Halves, num_fwd_outputs: int) -> None:
        forward, backward = halves
        outputs: Sequence[Any] = forward.graph.output_node().args[0]  # type: ignore[assignment]
        values = [(node.name, value) for node in outputs if (value := tensor(node)) is not None]
        self.users = {storage(value) for node in outputs[:num_fwd_outputs] if (value := tensor(node)) is not None}
        self.saved = values
        self.crossing = crossing_of(halves, num_fwd_outputs)
        self.backward, self.after = backward.graph, after_tangents(backward.graph)

    def bytes_freed(self, origins: Container[str]) -> int:
        """What would not be saved if all that spells out `origins`, operators of backward, read gradients alone.

        What the user is given lives on in any case.
        """
        live = self._inputs_read(origins)
        kept = self.users | {storage(value) for name, value in self.saved if name in live}
        crossing = (node.meta["val"] for node in self.crossing.saved)
        return storage_bytes(value for value in crossing if storage(value) not in kept)

    def _inputs_read(self, origins: Container[str]) -> set[str]:
        found, queue = set[fx.Node](), [self.backward.output_node()]
        while queue:
            node = queue.pop()
            for each in node.all_input_nodes:
                if each not in found and (each in self.after or node.meta.get(ORIGIN) not in origins):
                    found.add(each)
                    queue.append(each)
        return {node.name for node in found if node.op == "placeholder"}
