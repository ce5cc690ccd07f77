"""write_residuals (exact): a residual stream is written to memory where it is summed.

Before   stock saves the sums of a residual stream, and so writes them. Where none is saved, Inductor, which defers what
         is pointwise, adds up to four terms anew in every kernel that reads one, and they stay allocated for it.
Now      a sum of which one reader is a sum again is written by the kernel that makes it.
Costs    a write, if not all that reads it is in that kernel. Layers are alike, and their kernels are compiled once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor.lowering import register_lowering

from graphopt.graph import same_sizes, tensor
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
    if node.target is not ADD:
        return False
    terms = [term for each in node.args[:2] if (term := tensor(each)) is not None]
    return len(terms) == 2 and any(same_sizes(term.shape, node.meta["val"].shape) for term in terms)
