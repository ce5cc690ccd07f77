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
import torch._inductor.config as inductor_config
from torch import Tensor, fx
from torch._inductor.fx_passes.replace_random import fuse_seed_creation_pass
from torch._inductor.virtualized import V
from torch.utils.checkpoint import CheckpointPolicy

from graphopt.graph import fake_mode, hint, in_backward, in_checkpoint, memory_order, splice
from graphopt.lowering import ops  # noqa: F401  (registers the operators named below)
from graphopt.lowering.code_tables import CODES
from graphopt.lowering.codes import BITS, LIMIT, SELU_ALPHA, SELU_SCALE, Code, count, draw, slope
from graphopt.lowering.decompose import inductor_table
from graphopt.lowering.formulas import WORD, WORDS, compute_dtype
from graphopt.partition import FREES
from graphopt.pipeline import fired, left_alone

aten, own, prims = torch.ops.aten, torch.ops.graphopt, torch.ops.prims


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

    def derivative(self, read: Tensor) -> Tensor:
        """f' in the compute dtype, by the operator's own backward."""
        read = read.to(compute_dtype(read.dtype)).clamp(-LIMIT, LIMIT)
        given = {self.node.args[0]: torch.ones_like(read), self.read: read}
        args = fx.map_arg(self.node.args, lambda node: given[node])
        return self.node.target(*args, **self.node.kwargs)  # type: ignore[no-any-return, operator]


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


ACTIVATIONS: dict[object, Callable[[fx.Node], Slope | None]] = {
    aten.gelu_backward.default: _gelu,
    aten.silu_backward.default: _named("silu"),
    aten.mish_backward.default: _named("mish"),
    aten.hardswish_backward.default: _named("hardswish"),
    aten.softplus_backward.default: _softplus,
    aten.elu_backward.default: _elu,
    aten.tanh_backward.default: _named("tanh", of_output=True),
    aten.sigmoid_backward.default: _named("sigmoid", of_output=True),
}
# f, for the thresholds of x of those that read f(x)
FUNCTIONS: dict[str, Callable[[float], float]] = {
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "elu": lambda x: x if x > 0 else math.expm1(x),
    "selu": lambda x: SELU_SCALE * (x if x > 0 else SELU_ALPHA * math.expm1(x)),
}


def approx_activation(
    gm: fx.GraphModule, example_inputs: Sequence[object] = (), *, scheme: str = "relu3"
) -> fx.GraphModule:
    """Let backward read a code of two bits in the place of an activation's input; any shape and float dtype.

    Approximate: the gradient is that of the scheme's step function (LowMemoryBP, arXiv 2406.16282, section 3).
    Where a first cut has marked what an exact derivative keeps, only those codes are made that take fewer bytes.
    """
    graph = gm.graph
    backward = in_backward(graph)
    marked = any(FREES in node.meta for node in graph.nodes)
    for node in [node for node in graph.nodes if node.target in ACTIVATIONS]:
        found = ACTIVATIONS[node.target](node)
        if found is None or not found.read.meta["val"].is_floating_point():
            left_alone(node, "no code is known for an activation with these settings")
            continue
        code = math.ceil(hint(found.read.meta["val"].numel()) / WORD) * WORDS[BITS].itemsize
        frees = node.meta.get(FREES, 0) if marked else code + 1
        if any(in_checkpoint(each) for each in (found.read, *found.read.users)):
            left_alone(node, "its region is checkpointed and recomputed as a whole")
        elif frees == 0:
            left_alone(node, "what it reads is kept anyway: a code would come on top")
        elif frees <= code:
            left_alone(node, f"a code of {code} bytes would free {frees}")
        else:
            _encode(graph, found, scheme, backward)
            fired(node, f"its gradient is approximate: backward has its slope from 2 bits ({scheme})")
    with V.set_fake_mode(fake_mode(graph)):
        fuse_seed_creation_pass(graph)
    graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _encode(graph: fx.Graph, found: Slope, scheme: str, backward: set[fx.Node]) -> None:
    row = CODES[found.name][scheme]
    order = memory_order(found.read.meta["val"])  # a view of dx may follow, so it gets the strides it had
    table = {op: rule for op, rule in inductor_table().items() if op is not aten.rand.default}

    def encode(read: Tensor) -> Tensor:
        return own.pack(_code(found, scheme, row, read).permute(order), BITS)  # type: ignore[no-any-return]

    def decode(grad: Tensor, words: Tensor) -> Tensor:
        dtype, back = compute_dtype(grad.dtype), [order.index(dim) for dim in range(grad.dim())]
        code = own.unpack(words, grad.permute(order).shape, BITS, torch.int32).permute(back)
        return (grad.to(dtype) * slope(code, row.levels, dtype)).to(found.node.meta["val"].dtype)

    forward = [found.read] if found.of_output else [user for user in found.read.users if user not in backward]
    first = next(node for node in graph.nodes if node.op != "placeholder")
    words = splice(
        graph, first if found.read.op == "placeholder" else found.read.next, encode, (found.read,),
        like=(*forward, found.read)[0], decompositions=table,
    )  # fmt: skip
    words.meta["recompute"] = CheckpointPolicy.MUST_SAVE  # drawn once, whatever may be recomputed
    grad = splice(graph, found.node, decode, (found.node.args[0], words), like=found.node, decompositions=table)
    found.node.replace_all_uses_with(grad)
    graph.erase_node(found.node)


def _code(found: Slope, scheme: str, row: Code, read: Tensor) -> Tensor:
    """int32 of read's shape: the code of every element under one scheme."""
    if row.thresholds is not None and scheme == "relu3":
        of_read = FUNCTIONS[found.name] if found.of_output else lambda x: x
        low, middle, high = (of_read(threshold / found.scale) for threshold in row.thresholds)
        return count(read.to(compute_dtype(read.dtype)), (low, middle, high))
    derivative = found.derivative(read)
    if row.thresholds is not None:
        return count(derivative, row.thresholds)
    return draw(derivative, row.levels, _noise(derivative))


def _noise(like: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) of like's shape, as Inductor draws them: from a seed, within the kernel that reads."""
    if inductor_config.fallback_random:
        return torch.rand(like.shape, device=like.device)
    seed = prims.inductor_seed(like.device)
    return prims.inductor_random(like.shape, seed, "rand")  # type: ignore[no-any-return]
