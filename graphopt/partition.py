"""The cut: what crosses from forward to backward, and what backward makes anew.

torch's min-cut partitioner does the cutting. Stock heuristics guard speed by keeping every tensor that backward would
have to write out once more; here they are off, since a pointwise kernel costs less than the bytes it spares. What must
not run twice is tagged: matrix products, attention, convolutions, random numbers, collectives, reductions, sorting,
operators nobody knows the price of. A checkpointed region keeps the user's own tags.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import fx
from torch._functorch.partitioners import get_default_op_list, min_cut_rematerialization_partition
from torch.utils.checkpoint import CheckpointPolicy

from graphopt.graph import storage, storage_bytes, tensor

SAVED = "graphopt_saved"  # the mark in node.meta of what a cut saves

# functorch's heuristics against recomputation, by their names in torch._functorch.config
HEURISTICS = {
    "ban_recompute_used_far_apart": False,  # a residual read again later
    "ban_recompute_materialized_backward": False,  # what a matrix product of backward reads
    "ban_recompute_long_fusible_chains": True,  # from one end of the model to the other
    "ban_recompute_not_in_allowlist": True,
    "ban_recompute_reductions": True,
    "activation_memory_budget": 1.0,  # below 1 it recomputes random numbers
    "aggressive_recomputation": False,
}


def cut(
    gm: fx.GraphModule,
    joint_inputs: Sequence[object],
    *,
    num_fwd_outputs: int,
    static_lifetime_input_indices: list[int] | None = None,
    **kwargs: Any,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Split a joint graph into forward and backward; the arguments are those of a torch partitioner."""
    tag(gm.graph)
    with functorch_config.patch(HEURISTICS):
        return min_cut_rematerialization_partition(
            gm,
            joint_inputs,
            num_fwd_outputs=num_fwd_outputs,
            static_lifetime_input_indices=static_lifetime_input_indices,
            **kwargs,
        )


def tag(graph: fx.Graph) -> None:
    """Forbid recomputation of whatever is not cheap and deterministic, where the user has not tagged it himself."""
    known = get_default_op_list()
    for node in graph.nodes:
        if node.op != "call_function" or "recompute" in node.meta or not isinstance(node.target, torch._ops.OpOverload):
            continue
        random = torch.Tag.nondeterministic_seeded in node.target.tags
        if random or not (known.is_recomputable(node) or known.is_view(node)):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def mark(gm: fx.GraphModule, forward: fx.GraphModule, num_fwd_outputs: int) -> None:
    """Mark in the joint graph what crosses in a cut of it, for passes that act on saved tensors only."""
    names = {node.name for node in crossing(forward, num_fwd_outputs)}
    for node in gm.graph.nodes:
        if node.name in names:
            node.meta[SAVED] = True


def saved_bytes(forward: fx.GraphModule, num_fwd_outputs: int) -> int:
    return storage_bytes(node.meta["val"] for node in crossing(forward, num_fwd_outputs))


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
