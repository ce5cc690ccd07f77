"""encode (approximate where a codec is): a plan written into a joint graph.

Before   backward reads forward values as they are; the cut decides which are saved.
Now      it reads what is saved as it is, decode(encode(v)) of what the plan encodes, and copies of what the plan
         recomputes, which read decoded values too. The cut has nothing left to decide.
Costs    an encoder beside each value's producer, a decoder in backward's first reader, the recomputation planned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy

from graphopt.codecs import MASK, Codec, is_named
from graphopt.graph import (
    ENCODED,
    after_tangents,
    in_checkpoint,
    inverse,
    layout,
    memory_order,
    operator_name,
    owners,
    place_behind,
)
from graphopt.lowering import random
from graphopt.lowering.codec_ops import DECODE, ENCODE
from graphopt.lowering.decompose import inductor_table
from graphopt.pipeline import fired
from graphopt.plan import KEEP, RECOMPUTE
from graphopt.splicing import Traced, alike, copy_node, splice


def encode(
    gm: fx.GraphModule,
    example_inputs: Sequence[object] = (),
    *,
    decisions: Mapping[str, Codec | str],
    num_fwd_outputs: int,
) -> fx.GraphModule:
    """Write decisions into a decomposed joint graph: by the name of a node a codec, "recompute" or "keep".

    Views go with what they show, and what is not named is left to the cut. What is encoded must be dense in memory.
    """
    graph, owner, after = gm.graph, owners(gm.graph), after_tangents(gm.graph)
    parts: dict[fx.Node, tuple[fx.Node, ...]] = {}
    traced: Traced = {}
    for node in list(graph.nodes):
        decision = decisions.get(node.name)
        if isinstance(decision, Codec):
            parts[node] = _encoded(node, decision, traced)
            fired(node, f"saved as {decision.name}")
        elif decision == KEEP and node.op == "call_function":
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    backward = _Backward(graph, decisions, owner, parts, traced)
    for node in list(graph.nodes):
        if node in after:
            for each in node.all_input_nodes:
                if each not in after:
                    node.replace_input_with(each, backward.of(each, node))
    _redirect_gradients(graph.output_node(), num_fwd_outputs, after, backward)
    random.fuse_seeds(gm)
    graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _encoded(node: fx.Node, codec: Codec, traced: Traced) -> tuple[fx.Node, ...]:
    order, whole = memory_order(node.meta["val"]), _is_whole(codec, node)

    def encode(x: Tensor) -> tuple[Tensor, ...]:
        seed = random.seed(x.device) if codec.draws else None
        parts = ENCODE(x, order, codec.name, seed) if whole else codec.parts(x.permute(order), seed)
        return tuple(parts) if seed is None else (*parts, seed)

    result = splice(
        node.graph, place_behind(node), encode, (node,), like=node,
        decompositions=inductor_table(), memo=alike(traced, ("encode", codec), (node,)),
    )  # fmt: skip
    for part in result:
        part.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        part.meta[ENCODED] = f"{codec.name} of {operator_name(node)}"
    return tuple(result)


def _is_whole(codec: Codec, node: fx.Node) -> bool:
    """Whether a codec is one operator in the graph: where its name says what it is, and sizes are numbers."""
    return is_named(codec) and codec is not MASK and layout(node.meta["val"]) is not None


def _redirect_gradients(output: fx.Node, num_fwd_outputs: int, after: set[fx.Node], backward: _Backward) -> None:
    """Gradients that no tangent reaches are forward values that backward answers as they are."""
    results: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    for place in range(num_fwd_outputs, len(results)):
        node = results[place]
        if isinstance(node, fx.Node) and node not in after:
            results[place] = backward.of(node, output)
    output.args = (tuple(results),)


@dataclass
class _Backward:
    """What backward reads in the place of each forward node, put ahead of its first reader."""

    graph: fx.Graph
    decisions: Mapping[str, Codec | str]
    owner: Mapping[fx.Node, fx.Node]
    parts: Mapping[fx.Node, tuple[fx.Node, ...]]
    traced: Traced
    made: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.place = {node: place for place, node in enumerate(self.graph.nodes)}

    def of(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """What stands for a node, with all that it is copied from."""
        needed, queue = set[fx.Node](), [node]
        while queue:
            each = queue.pop()
            if each not in self.made and each not in needed:
                needed.add(each)
                queue.extend(each.all_input_nodes if self._follows(each) else ())
        for each in sorted(needed, key=self.place.__getitem__):
            self.made[each] = self._decoded(each, before) if each in self.parts else self._copied(each, before)
        return self.made[node]

    def _follows(self, node: fx.Node) -> bool:
        """Whether it is recomputed, or shows another node, and so depends on what stands for its inputs."""
        is_size = isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))
        if node.op != "call_function" or is_size or node in self.parts or in_checkpoint(node):
            return False  # what is checkpointed keeps its tag, by which the cut recomputes it, its random numbers too
        return self.owner[node] is not node or self.decisions.get(node.name) == RECOMPUTE

    def _copied(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """A copy of what is recomputed, or shows what is decoded or recomputed; the node itself if it is neither."""
        if not self._follows(node):
            return node
        read = {each: self.made[each] for each in node.all_input_nodes}
        if self.owner[node] is not node and all(new is old for old, new in read.items()):
            return node
        new = copy_node(node, before, read)
        _put_in_backward(new)
        return new

    def _decoded(self, node: fx.Node, before: fx.Node) -> fx.Node:
        codec, order = self.decisions[node.name], memory_order(node.meta["val"])
        assert isinstance(codec, Codec)
        whole = _is_whole(codec, node)

        def decode(value: Tensor, *parts: Tensor) -> Tensor:
            # of the value itself only sizes are read, which are saved as numbers
            shape = [value.shape[dim] for dim in order]
            x = DECODE(parts, shape, codec.name, value.dtype) if whole else codec.decode(parts, shape, value.dtype)
            return x.permute(inverse(order))

        last = before.prev
        result: fx.Node = splice(
            self.graph, before, decode, (node, *self.parts[node]), like=node, decompositions=inductor_table(),
            memo=alike(self.traced, ("decode", codec), (node,)),
        )  # fmt: skip
        while last.next is not before:
            last = last.next
            if isinstance(last.meta.get("val"), torch.Tensor):
                _put_in_backward(last)
        return result


def _put_in_backward(node: fx.Node) -> None:
    node.meta["partitioner_tag"] = "must_be_in_backward"
    node.meta.pop("recompute", None)
