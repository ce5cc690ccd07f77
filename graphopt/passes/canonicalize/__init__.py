"""canonicalize: norms and activations written out in a forward graph become the one torch op that says the same.

Before   Dynamo hands over x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) as the user wrote it; every operation
         asks for tensors of its own in backward.
Now      one op, whose backward other passes know: graphopt.rms_norm, layer_norm, gelu, silu.
Costs    nothing. Values change by rounding: the op computes in float32 and rounds once, the formula at every step.

Gradients are exact. A match is left alone where somebody else reads its inside, something is changed in place or a
grad or autocast mode switches on the way, or where dtypes and shapes do not show that op and formula are the same.
Dtypes and shapes come from the graph's metadata or from example inputs.

    operations.py     what one node does, however it is spelled
    matching.py       where a formula stands in the graph
    legality.py       whether it may go
    replacements.py   the op it becomes
    writing.py        putting that op in its place
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, rms_norm
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from graphopt.passes.canonicalize import replacements as to
from graphopt.passes.canonicalize.legality import Reason, illegal
from graphopt.passes.canonicalize.matching import Match, match, pattern
from graphopt.passes.canonicalize.operations import is_cast, spelled
from graphopt.passes.canonicalize.writing import Replacement, erase, put_in_place
from graphopt.pipeline import fired, left_alone

SCALE = (2 / math.pi) ** 0.5


def standardized(x: Any, eps: Any) -> Any:
    return (x - x.mean(-1)) / ((x - x.mean(-1)).pow(2).mean(-1) + eps).sqrt()


def standardized_by_var(x: Any, eps: Any) -> Any:
    return (x - x.mean(-1)) / (x.var(-1) + eps).sqrt()


# tried in this order at every node, the last node first: what is written around a formula before the formula alone
IDIOMS: tuple[tuple[str, Callable[..., Any], Replacement], ...] = (
    ("layer norm -> layer_norm", lambda x, w, b, eps: standardized(x, eps) * w + b, to.layer_norm),
    ("layer norm -> layer_norm", lambda x, w, b, eps: standardized_by_var(x, eps) * w + b, to.layer_norm),
    ("layer norm -> layer_norm", lambda x, w, eps: standardized(x, eps) * w, to.layer_norm),
    ("layer norm -> layer_norm", lambda x, w, eps: standardized_by_var(x, eps) * w, to.layer_norm),
    ("layer norm -> layer_norm", standardized, to.layer_norm),
    ("layer norm -> layer_norm", standardized_by_var, to.layer_norm),
    ("RMS norm -> rms_norm", lambda x, w, eps: x * (x.pow(2).mean(-1) + eps).rsqrt() * w, to.rms_norm),
    ("RMS norm -> rms_norm", lambda x, eps: x * (x.pow(2).mean(-1) + eps).rsqrt(), to.rms_norm),
    ("torch rms_norm -> rms_norm", lambda x: rms_norm(x, (1,)), to.own_rms_norm),
    ("tanh GELU -> gelu", lambda x: 0.5 * x * (1 + (SCALE * (x + 0.044715 * x**3)).tanh()), to.tanh_gelu),
    ("tanh GELU -> gelu", lambda x: 0.5 * x * (1 + (SCALE * x * (1 + 0.044715 * x**2)).tanh()), to.tanh_gelu),
    ("tanh GELU -> gelu", lambda x: 0.5 * x * (1 + (SCALE * x + SCALE * 0.044715 * x**3).tanh()), to.tanh_gelu),
    ("erf GELU -> gelu", lambda x: 0.5 * x * (1 + (x / 2**0.5).erf()), to.erf_gelu),
    ("x * sigmoid(x) -> silu", lambda x: x * x.sigmoid(), to.silu),
    ("x / (1 + exp(-x)) -> silu", lambda x: x / (1 + (-x).exp()), to.silu),
    ("quick GELU -> silu", lambda x: x * (1.702 * x).sigmoid(), to.quick_gelu),
)
_PATTERNS = tuple((name, pattern(formula), replacement) for name, formula, replacement in IDIOMS)


def canonicalize(gm: fx.GraphModule, example_inputs: Sequence[object] = ()) -> fx.GraphModule:
    """Replace the formulas of IDIOMS in a forward graph by one op each; a graph without any comes back untouched.

    Takes Dynamo's graphs and those of torch.fx.symbolic_trace. `example_inputs` give dtypes and shapes to a graph that
    has none in its metadata; without either every formula is left alone.
    """
    graph = gm.graph
    if example_inputs and not any("val" in node.meta or "example_value" in node.meta for node in graph.nodes):
        mode = detect_fake_mode(example_inputs) or FakeTensorMode(allow_non_fake_inputs=True)
        FakeTensorProp(gm, mode).propagate(*example_inputs)
    transform = next((node for node in graph.nodes if _functorch(node)), None)
    if transform is not None:
        left_alone(transform, "the graph holds a torch.func transform, whose levels a new op would not know")
        return gm
    erased: set[fx.Node] = set()
    missed: dict[fx.Node, tuple[Reason, Match]] = {}
    for root in reversed(list(graph.nodes)):
        if root in erased or (spelled(root) is None and not is_cast(root)):
            continue
        for name, wanted, replacement in _PATTERNS:
            if (found := match(wanted, root)) is None:
                continue
            result = illegal(root, found) or put_in_place(root, found, replacement)
            if isinstance(result, Reason):
                missed.setdefault(root, (result, found))
                continue
            fired(result, name)
            erased |= erase(root, found)
            break
    # of formulas within one another the outermost is reported, and none of which a part was replaced
    inside = {node for root, (_, found) in missed.items() for node in found.interior - {root}}
    for root, (reason, found) in missed.items():
        if root not in inside and not found.interior & erased:
            left_alone(root, reason)
    if erased:
        gm.recompile()
    return gm


def _functorch(node: fx.Node) -> bool:
    """Whether the node enters or leaves a level of vmap, grad or jvp, as Dynamo writes torch.func into a graph."""
    return getattr(node.target, "__module__", None) == "torch._functorch.predispatch"
