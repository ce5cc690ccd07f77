"""write_residuals (exact): a residual stream is written to memory where it is summed.

Before   nothing that backward reads needs the sums of a residual stream, so Inductor, which defers what is pointwise,
         adds up to four terms anew in every kernel that reads one, and the terms stay allocated for it.
Now      each sum is written by the kernel that makes it, as stock writes those that it saves.
Costs    nothing that stock does not pay. Layers are alike again, and their kernels are compiled once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor.lowering import register_lowering

from graphopt.graph import tensor
from graphopt.lowering.ops import define

ADD, EMBEDDING = torch.ops.aten.add.Tensor, torch.ops.aten.embedding.default

define("write(Tensor(a) x) -> Tensor(a)", torch.ops.aten.alias.default)
WRITE = torch.ops.graphopt.write.default


@register_lowering(WRITE, type_promotion_kind=None)
def _lower_write(x: Any) -> Any:
    x.realize()
    return x


def write_residuals(gm: fx.GraphModule, example_inputs: Sequence[object] = ()) -> fx.GraphModule:
    """Let Inductor write what a forward graph sums, or looks up, and adds to again. Exact; any shape."""
    for node in list(gm.graph.nodes):
        if (_is_sum(node) or node.target is EMBEDDING) and len(node.users) > 1 and any(map(_is_sum, node.users)):
            with gm.graph.inserting_after(node):
                written = gm.graph.call_function(WRITE, (node,))
            written.meta = dict(node.meta)
            for user in [user for user in node.users if user is not written and user.op != "output"]:
                user.replace_input_with(node, written)
    gm.recompile()
    return gm


def _is_sum(node: fx.Node) -> bool:
    """Whether it is the sum of two tensors, one of its own shape."""
    terms = [tensor(each) for each in node.args[:2]] if node.target is ADD else [None]
    return None not in terms and any(term.shape == node.meta["val"].shape for term in terms)  # type: ignore[union-attr]
