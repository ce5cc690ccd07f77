"""placeholder until the real pass lands"""
import torch
from graphopt.lowering import ops
def canonicalize(gm, example_inputs=()):
    for n in list(gm.graph.nodes):
        if n.op == "call_function" and n.target in (torch.nn.functional.rms_norm, torch.rms_norm):
            x, shape, w, eps = (list(n.args) + [None, None])[:4]
            w = n.kwargs.get("weight", w); eps = n.kwargs.get("eps", eps)
            if eps is None: eps = torch.finfo(torch.float32).eps
            with gm.graph.inserting_before(n):
                r = gm.graph.call_function(torch.ops.graphopt.rms_norm.default, (x, list(shape), w, eps))
                y = gm.graph.call_function(__import__("operator").getitem, (r, 0))
            y.meta = dict(n.meta)
            n.replace_all_uses_with(y); gm.graph.erase_node(n)
    gm.recompile(); return gm
