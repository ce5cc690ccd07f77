"""approx_activation (Approx-BP, APPROXIMATE): backward knows an activation's slope from a code of two bits an element.

Before   backward reads the activation's input x (of tanh and sigmoid the output) for dx = dy * f'(x).
Now      it reads 16 codes to a word, dx = dy * levels[code]; forward is untouched. What a code means is a scheme of
         `graphopt.lowering.codes`: relu3 (published as ReGELU2 and ReSiLU2), unbiased or lloyd.
Costs    the gradient's exactness (see docs/codes.md); in forward a reduction of 16 codes to a word beside f.

A code pays where x is kept for f' alone: the next linear is frozen, or keeps f(x) itself. Where backward keeps x for
another gradient, as for the weight of the next linear, whose input f(x) it makes anew, or for the other factor of a
gate, x stays and a code would come on top.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils.checkpoint import CheckpointPolicy

from graphopt.crossing import CUT, Cut
from graphopt.errors import OptionsError
from graphopt.graph import (
    ORIGIN,
    after_tangents,
    fake_mode,
    hint,
    in_backward,
    in_checkpoint,
    inverse,
    memory_order,
    place_behind,
)
from graphopt.lowering import ops  # noqa: F401  (registers the operators named below)
from graphopt.lowering.activations import ACTIVATIONS, SELU_ALPHA, SELU_SCALE
from graphopt.lowering.code_tables import CODES
from graphopt.lowering.codes import BITS, SCHEMES, Code, encode, slope
from graphopt.lowering.decompose import CANONICAL, inductor_table
from graphopt.lowering.formulas import WORD, WORDS, compute_dtype
from graphopt.lowering.random import fuse_seeds, uniform
from graphopt.pipeline import fired, left_alone
from graphopt.splicing import splice

aten, own = torch.ops.aten, torch.ops.graphopt


@dataclass(frozen=True)
class Slope:
    """One backward node of the form dx = dy * f'(x).

    `read` is what f' is computed from: x, or f(x) if `of_output`. The activation is f(x) = row(scale * x) / scale, with
    the row of CODES that goes by `name`.
    """

    node: fx.Node
    read: fx.Node
    name: str
    scale: float = 1.0
    of_output: bool = False

    @property
    def bytes(self) -> int:
        """What a code of it takes."""
        return math.ceil(hint(self.read.meta["val"].numel()) / WORD) * WORDS[BITS].itemsize

    def derivative(self, read: Tensor) -> Tensor:
        """f' of what backward reads, by the operator's own backward."""
        args = fx.map_arg(self.node.args[1:], lambda node: read)
        return self.node.target(torch.ones_like(read), *args, **self.node.kwargs)  # type: ignore[no-any-return, operator]

    def row(self, scheme: str) -> Code:
        """Levels, and thresholds of what backward reads: of scale * x, or of f(x), which grows with x."""
        row = CODES[self.name][scheme]
        if scheme != "relu3" or row.thresholds is None:
            return row
        with unset_fake_temporarily():
            thresholds = torch.tensor(row.thresholds, dtype=torch.float64) / self.scale
            if self.of_output:
                thresholds = ACTIVATIONS[self.name].function(thresholds)
            low, middle, high = thresholds.tolist()
        return row._replace(thresholds=(low, middle, high))


def _elu(node: fx.Node) -> Slope | None:
    _, *settings, of_output, read = node.args
    known: dict[tuple[Any, ...], str] = {(1, 1, 1): "elu", (SELU_ALPHA, SELU_SCALE, 1): "selu"}
    name = known.get(tuple(settings))
    return Slope(node, read, name, of_output=of_output) if name else None  # type: ignore[arg-type]


def _softplus(node: fx.Node) -> Slope | None:
    _, x, beta, threshold = node.args
    return Slope(node, x, "softplus", scale=beta) if threshold == 20 and beta > 0 else None  # type: ignore[arg-type, operator]


def _gelu(node: fx.Node) -> Slope:
    return Slope(node, node.args[1], "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu")  # type: ignore[arg-type]


def _named(name: str, of_output: bool = False) -> Callable[[fx.Node], Slope]:
    return lambda node: Slope(node, node.args[1], name, of_output=of_output)  # type: ignore[arg-type]


SLOPES: dict[object, Callable[[fx.Node], Slope | None]] = {
    aten.gelu_backward.default: _gelu,
    aten.silu_backward.default: _named("silu"),
    aten.mish_backward.default: _named("mish"),
    aten.hardswish_backward.default: _named("hardswish"),
    aten.softplus_backward.default: _softplus,
    aten.elu_backward.default: _elu,
    aten.tanh_backward.default: _named("tanh", of_output=True),
    aten.sigmoid_backward.default: _named("sigmoid", of_output=True),
}


def approx_activation(
    gm: fx.GraphModule, example_inputs: Sequence[object] = (), *, scheme: str = "relu3"
) -> fx.GraphModule:
    """Let backward read a code of two bits in the place of an activation's input; any shape and float dtype.

    Approximate: the gradient is that of the scheme's step function (LowMemoryBP, arXiv 2406.16282, section 3).
    Where the graph's meta holds a cut of it, only those codes are made that take fewer bytes than what they replace.
    """
    if scheme not in SCHEMES:
        raise OptionsError(f"scheme {scheme!r} is not one of {', '.join(SCHEMES)}")
    graph = gm.graph
    slopes = _codable(graph)
    chosen = slopes if CUT not in gm.meta else _that_pay(slopes, gm.meta.pop(CUT))
    for found in slopes:
        if found in chosen:
            _rewrite(graph, found, scheme)
            fired(found.node, f"its gradient is approximate: backward has its slope from 2 bits ({scheme})")
        else:
            left_alone(found.node, "what it reads is kept anyway: a code would come on top")
    if scheme == "unbiased":
        fuse_seeds(gm)
    graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _codable(graph: fx.Graph) -> list[Slope]:
    """The nodes that a code could serve; a derivative that is part of forward (torch.func.grad) is none."""
    slopes, after = [], after_tangents(graph)
    for node in [node for node in graph.nodes if node.target in SLOPES and node.args[0] in after]:
        found = SLOPES[node.target](node)
        if found is None or not found.read.meta["val"].is_floating_point():
            left_alone(node, "no code is known for an activation with these settings")
        elif any(in_checkpoint(each) for each in (found.read, *found.read.users)):
            left_alone(node, "its region is checkpointed and recomputed as a whole")
        else:
            slopes.append(found)
    return slopes


def _that_pay(slopes: list[Slope], cut: Cut) -> list[Slope]:
    """Those whose codes take fewer bytes than what a cut saves for them alone: each by itself, and all together."""

    def freed(some: list[Slope]) -> int:
        return cut.bytes_freed({each.node.name for each in some})

    chosen: list[Slope] = []
    paying = list(slopes)
    while len(paying) != len(chosen):  # what one shares with another that stays exact is not freed either
        chosen, in_all = paying, freed(paying)
        paying = [each for each in chosen if in_all - freed([o for o in chosen if o is not each]) > each.bytes]
    return chosen if freed(chosen) > sum(each.bytes for each in chosen) else []


def _rewrite(graph: fx.Graph, found: Slope, scheme: str) -> None:
    row, value = found.row(scheme), found.read.meta["val"]
    order = memory_order(value)
    back = inverse(order)
    exact = _exact(found.node)  # a view of dx may follow, so it gets the strides it would have
    # where Inductor falls back to torch's random numbers it takes them whole
    table = {op: rule for op, rule in inductor_table().items() if op is not aten.rand.default}

    def forward(read: Tensor) -> Tensor:
        read = read.to(compute_dtype(read.dtype))
        code = encode(read, found.derivative, scheme, row, lambda: uniform(read))
        return own.pack(code.permute(order), BITS)  # type: ignore[no-any-return]

    def gradient(grad: Tensor, words: Tensor) -> Tensor:
        dtype, dense = compute_dtype(grad.dtype), grad.permute(order)
        # a row for each word where that comes out even: loops over words and shifts, no division for each element
        even = statically_known_true(grad.numel() % WORD == 0)
        rows = dense.reshape(-1, WORD) if even else dense
        code = own.unpack(words, rows.shape, BITS, torch.int32)
        dx = (rows.to(dtype) * slope(code, row.levels, dtype)).to(exact.dtype).view(dense.shape).permute(back)
        if dx.stride() == exact.stride():
            return dx
        return dx.permute(memory_order(exact)).contiguous().permute(inverse(memory_order(exact)))

    like = _forward_node(found)
    if like.target in CANONICAL:
        like.meta[ORIGIN] = like.name  # a slope's exponential is part of an activation, like its own
    words = splice(graph, place_behind(found.read), forward, (found.read,), like=like, decompositions=table)
    words.meta["recompute"] = CheckpointPolicy.MUST_SAVE  # drawn once, whatever may be recomputed
    dx = splice(graph, found.node, gradient, (found.node.args[0], words), like=found.node, decompositions=table)
    found.node.replace_all_uses_with(dx)
    graph.erase_node(found.node)


def _exact(node: fx.Node) -> Tensor:
    """The fake tensor that a node's decomposition gives; its strides are not always those of the operator."""
    given = fx.map_arg(node.args, lambda each: each.meta["val"])
    with fake_mode(node.graph), enable_python_dispatcher():
        return inductor_table()[node.target](*given, **node.kwargs)  # type: ignore[no-any-return]


def _forward_node(found: Slope) -> fx.Node:
    """The activation in forward, which a code belongs to; what it reads where that is all that is left of it."""
    if found.of_output:
        return found.read
    backward = in_backward(found.node.graph)
    return next((user for user in found.read.users if user not in backward), found.read)
