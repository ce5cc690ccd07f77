"""What a cut saves: the tensors that cross from forward to backward, their bytes, and marks of them for passes."""

from __future__ import annotations

import operator
from collections.abc import Container, Sequence
from typing import Any

from torch import fx
from torch._prims.rng_prims import run_and_save_rng_state

from graphopt.graph import ORIGIN, after_tangents, storage, storage_bytes, tensor

# marks in node.meta of what a cut saves, and of what it runs in backward, if only to make it anew
SAVED, IN_BACKWARD = "graphopt_saved", "graphopt_in_backward"
CUT = "graphopt_cut"  # in the meta of a joint graph that is not decomposed yet: a Cut of it

Halves = tuple[fx.GraphModule, fx.GraphModule]  # forward, backward


def crossing_bytes(forward: fx.GraphModule, num_fwd_outputs: int) -> int:
    return storage_bytes(node.meta["val"] for node in crossing(forward, num_fwd_outputs))


def random_state_bytes(forward: fx.GraphModule, num_fwd_outputs: int) -> int:
    """Bytes of the states of random numbers that the cut itself saves, for what checkpointed regions draw anew."""
    makers = {node: node.args[0] for node in crossing(forward, num_fwd_outputs) if node.target is operator.getitem}
    states = [node for node, maker in makers.items() if getattr(maker, "target", None) is run_and_save_rng_state]
    return storage_bytes(node.meta["val"] for node in states)


def crossing(forward: fx.GraphModule, num_fwd_outputs: int) -> list[fx.Node]:
    """The saved tensors: forward's outputs past the user's own, inputs of the graph left out, each storage once."""
    placeholders = (tensor(node) for node in forward.graph.find_nodes(op="placeholder"))
    inputs = {storage(value) for value in placeholders if value is not None}
    outputs: Sequence[Any] = forward.graph.output_node().args[0]  # type: ignore[assignment]
    found: dict[int, fx.Node] = {}
    for node in outputs[num_fwd_outputs:]:
        value = tensor(node)
        if value is not None and storage(value) not in inputs:
            found.setdefault(storage(value), node)
    return list(found.values())


def run_in(half: fx.GraphModule) -> set[str]:
    """The names of what a half computes, from what is saved or anew; they are those of the joint graph."""
    return {node.name for node in half.graph.nodes if node.op == "call_function"}


def mark(gm: fx.GraphModule, halves: Halves, num_fwd_outputs: int) -> None:
    """Mark in the joint graph what a cut of it saves and what it runs in backward, for passes on saved tensors."""
    forward, backward = halves
    saved = {node.name for node in crossing(forward, num_fwd_outputs)}
    again = run_in(backward)
    for node in gm.graph.nodes:
        if node.name in saved:
            node.meta[SAVED] = True
        if node.name in again:
            node.meta[IN_BACKWARD] = True


class Cut:
    """What a cut saves, and for whom."""

    def __init__(self, halves: Halves, num_fwd_outputs: int) -> None:
        forward, backward = halves
        outputs: Sequence[Any] = forward.graph.output_node().args[0]  # type: ignore[assignment]
        values = [(node.name, value) for node in outputs if (value := tensor(node)) is not None]
        self.users = {storage(value) for node in outputs[:num_fwd_outputs] if (value := tensor(node)) is not None}
        self.saved = values
        self.crossing = [node.meta["val"] for node in crossing(forward, num_fwd_outputs)]
        self.backward, self.after = backward.graph, after_tangents(backward.graph)

    def bytes_freed(self, origins: Container[str]) -> int:
        """What would not be saved if all that spells out `origins`, operators of backward, read gradients alone.

        What the user is given lives on in any case.
        """
        live = self._inputs_read(origins)
        kept = self.users | {storage(value) for name, value in self.saved if name in live}
        return storage_bytes(value for value in self.crossing if storage(value) not in kept)

    def _inputs_read(self, origins: Container[str]) -> set[str]:
        found, queue = set[fx.Node](), [self.backward.output_node()]
        while queue:
            node = queue.pop()
            for each in node.all_input_nodes:
                if each not in found and (each in self.after or node.meta.get(ORIGIN) not in origins):
                    found.add(each)
                    queue.append(each)
        return {node.name for node in found if node.op == "placeholder"}
