"""pack_mask: boolean tensors that backward reads (dropout, ReLU, conditions) cross as one bit an element.

Before   backward reads a bool of one byte an element.
Now      it reads unpack(pack(mask)), and the cut saves the words. Where a first cut has marked what crosses, only those
         masks are packed: one that backward can make anew from a tensor it reads anyway is cheaper still.
Costs    a reduction of 16 bits to a word beside the mask's producer, and a shift in backward's first kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from graphopt.crossing import IN_BACKWARD, SAVED
from graphopt.graph import after_tangents, compares, in_backward, in_checkpoint, inverse, memory_order, nbytes, tensor
from graphopt.lowering import ops  # noqa: F401  (ops registers the operators named below)
from graphopt.pipeline import fired, left_alone
from graphopt.splicing import copy_node, splice

own = torch.ops.graphopt
SMALLEST = 128  # bytes


def pack_mask(gm: fx.GraphModule, example_inputs: Sequence[object] = ()) -> fx.GraphModule:
    """Let backward read the boolean tensors of a joint graph through packed words. Exact; any shape."""
    graph = gm.graph
    marked = any(SAVED in node.meta for node in graph.nodes)
    backward, after = in_backward(graph), after_tangents(graph)
    for node in list(graph.nodes):
        value = tensor(node)
        if value is None or value.dtype != torch.bool or node.op != "call_function" or node in after:
            continue
        if not any(_reads(user, backward) for user in node.users) or (marked and SAVED not in node.meta):
            continue
        if in_checkpoint(node):
            left_alone(node, "its region is checkpointed and recomputed as a whole")
        elif nbytes(value) < SMALLEST:
            left_alone(node, f"it has less than {SMALLEST} bytes")
        elif compares(node):
            left_alone(node, "it compares values, which the kernel that packs it would make anew")
        else:
            readers = [user for user in node.users if _reads(user, backward)]
            unpacked = splice(graph, node.next, _through_words, (node,), like=node)
            for each in (unpacked, *unpacked.all_input_nodes):
                if each is not node and each.target is not own.pack.default:
                    each.meta["partitioner_tag"] = "is_backward"
            _redirect(node, unpacked, readers, backward)
            fired(node, "crosses as one bit an element")
    graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _reads(user: fx.Node, backward: set[fx.Node]) -> bool:
    return user in backward or IN_BACKWARD in user.meta


def _redirect(node: fx.Node, new: fx.Node, readers: Sequence[fx.Node], backward: set[fx.Node]) -> None:
    """Let backward read `new` for `node`; what it makes anew from `node` gets a copy, which it makes from `new`."""
    for user in readers:
        if user in backward:
            user.replace_input_with(node, new)
        else:
            again = copy_node(user, user.next, {node: new})
            backward.add(again)
            _redirect(user, again, [each for each in user.users if _reads(each, backward)], backward)


def _through_words(mask: torch.Tensor) -> torch.Tensor:
    # bits lie in the order of the mask's memory, so that what comes back has its strides: a view may follow
    order = memory_order(mask)
    dense = mask.permute(order)
    back = inverse(order)
    return own.unpack(own.pack(dense, 1), dense.shape, 1, torch.bool).permute(back)  # type: ignore[no-any-return]
