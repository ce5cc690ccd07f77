"""pack_mask: boolean tensors that backward reads (dropout, ReLU, conditions) cross as one bit an element.

Before   backward reads a bool of one byte an element.
Now      it reads unpack(pack(mask)), and the cut saves the words. Where a first cut has marked what crosses, only those
         masks are packed: one that backward can make anew from a tensor it reads anyway is cheaper still.
Costs    a reduction of 32 bits to a word beside the mask's producer, and a shift in backward's first kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from graphopt.graph import after_tangents, in_backward, in_checkpoint, inherit, nbytes, splice, tensor
from graphopt.lowering import formulas, ops  # noqa: F401  (ops registers the operators named below)
from graphopt.partition import SAVED
from graphopt.pipeline import fired, left_alone

own = torch.ops.graphopt


def pack_mask(gm: fx.GraphModule, example_inputs: Sequence[object] = ()) -> fx.GraphModule:
    """Let backward read the boolean tensors of a joint graph through packed words. Exact; any shape."""
    graph = gm.graph
    marked = any(SAVED in node.meta for node in graph.nodes)
    backward, after = in_backward(graph), after_tangents(graph)
    for node in list(graph.nodes):
        value = tensor(node)
        if value is None or value.dtype != torch.bool or node.op != "call_function" or node in after:
            continue
        readers = sorted(user for user in node.users if user in backward)
        if not readers or (marked and SAVED not in node.meta):
            continue
        if in_checkpoint(node):
            left_alone(node, "its region is checkpointed and recomputed as a whole")
        elif nbytes(value) < 4 * formulas.WORD:
            left_alone(node, "it is no larger than a few words")
        else:
            unpacked = splice(graph, readers[0], _through_words, (node,), like=readers[0])
            for reader in readers:
                reader.replace_input_with(node, unpacked)
            words = unpacked.args[0]
            inherit(words, node)  # made where the mask is, so that the two fuse
            node.append(words)
            fired(node, "crosses as one bit an element")
    gm.recompile()
    return gm


def _through_words(mask: torch.Tensor) -> torch.Tensor:
    return own.unpack(own.pack(mask), mask.shape)  # type: ignore[no-any-return]
