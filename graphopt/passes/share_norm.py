"""share_norm (MS-BP, exact): the norm's backward and the next linears' weight gradients read one tensor, z.

Before   backward reads the norm's input x, for the norm, and its output y = weight * z + bias, for dW = g^T y.
Now      it reads z = (x - mean) * rstd alone, stored in the dtype in which the linears read y. Weight gradients are
             dW = (g^T z) diag(weight) + (sum g) (x) bias      (LowMemoryBP, section 4, without merging the weights)
         where that moves fewer bytes than y made anew from z, which any other reader of y in backward gets.
Costs    one pointwise kernel in backward, over dW or over y; nothing in forward but the store of z.

RMSNorm is the same without the mean. The cut may still keep x and make z from it, where x is kept for someone else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.graph import after_tangents, in_checkpoint, outputs_of
from graphopt.lowering import formulas, ops  # noqa: F401  (ops registers the operators named below)
from graphopt.lowering.decompose import inductor_table, replace
from graphopt.partition import PREFERRED
from graphopt.passes.readers import CASTS, Readers, WeightGradient, packet
from graphopt.pipeline import fired, left_alone
from graphopt.splicing import Traced, alike, splice

aten, own = torch.ops.aten, torch.ops.graphopt
BACKWARD = {
    aten.native_layer_norm.default: aten.native_layer_norm_backward.default,
    own.rms_norm.default: own.rms_norm_backward.default,
}


@dataclass(frozen=True)
class Norm:
    """One norm of the joint graph: its nodes in forward and backward, and what they were given."""

    forward: fx.Node
    backward: fx.Node
    y: fx.Node
    x: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    ndim: int
    eps: float

    @property
    def centred(self) -> bool:
        return self.forward.target is aten.native_layer_norm.default

    @property
    def dtype(self) -> torch.dtype:
        return self.x.meta["val"].dtype  # type: ignore[no-any-return]


def share_norm(gm: fx.GraphModule, example_inputs: Sequence[object] = ()) -> fx.GraphModule:
    """Rewrite every LayerNorm and RMSNorm of a joint graph that backward can read through z.

    Exact up to rounding, for any float dtype; statistics, sums and the parameters' gradients are float32 inside.
    """
    graph, traced = gm.graph, Traced()
    for node in [node for node in graph.nodes if node.target in BACKWARD]:
        norm = _norm(node)
        if isinstance(norm, str):
            left_alone(node, norm)
            continue
        readers = Readers(norm.y, after_tangents(graph))
        if not readers.backward and readers.dtype().itemsize >= norm.dtype.itemsize:
            left_alone(node, "backward does not read the norm's output; keeping its input costs no more")
            continue
        if not readers.smooth and readers.dtype() != formulas.compute_dtype(norm.dtype):
            left_alone(node, "its output is compared or clamped further on, which backward must see unrounded")
            continue
        fired(node, _share(graph, norm, readers, traced))
    graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _norm(forward: fx.Node) -> Norm | str:
    """The norm whose forward node this is, or why it is left alone."""
    outputs = outputs_of(forward)
    x, shape, weight, *bias, eps = forward.args
    statistics = [node for index, node in outputs.items() if index > 0]
    readers = {user for node in statistics for user in node.users}
    if in_checkpoint(forward):
        return "its region is checkpointed and recomputed as a whole"
    if len(readers) != 1 or 0 not in outputs or next(iter(readers)).target is not BACKWARD[forward.target]:  # type: ignore[index]
        return "no gradient reaches its input or parameters, or its statistics are read elsewhere"
    return Norm(forward, readers.pop(), outputs[0], x, weight, bias[0] if bias else None, len(shape), eps)  # type: ignore[arg-type]


def _share(graph: fx.Graph, norm: Norm, readers: Readers, traced: Traced) -> str:
    """Rewrite one norm; the answer says what reads z now."""
    z_dtype, table = readers.dtype(), inductor_table()
    given = norm.x, norm.weight, norm.bias
    y, z, rstd = splice(
        graph, norm.forward,
        lambda x, weight, bias: formulas.norm(x, norm.ndim, weight, bias, norm.eps, norm.centred, z_dtype),
        given, like=norm.forward, decompositions=table,
        memo=alike(traced, ("norm", norm.ndim, norm.eps, norm.centred, z_dtype), given),
    )  # fmt: skip
    read = norm.backward.args[0], z, rstd, norm.weight
    gradients = splice(
        graph, norm.backward,
        lambda grad, z, rstd, w: formulas.norm_backward(grad, z, rstd, w, norm.ndim, norm.centred, norm.dtype),
        read, like=norm.backward, decompositions=table,
        memo=alike(traced, ("norm_backward", norm.ndim, norm.centred, norm.dtype), read),
    )  # fmt: skip
    if norm.x.op != "placeholder":
        _prefer(z)
    text = _redirect(graph, norm, readers, z, traced)
    replace(norm.backward, gradients)
    norm.y.replace_all_uses_with(y)
    return f"backward reads z ({str(z_dtype).removeprefix('torch.')}) instead of the norm's input{text}"


def _prefer(z: fx.Node) -> None:
    """Let the cut save z where it takes no more bytes than making it anew from x.

    The mark goes to what z is rounded from: a node that forward does not need itself cannot carry it.
    """
    rounded = packet(z) in CASTS and z.args[0].meta["val"].dtype == formulas.compute_dtype(z.meta["val"].dtype)  # type: ignore[union-attr]
    source = z.args[0] if rounded else z
    source.meta[PREFERRED] = True  # type: ignore[union-attr]


def _redirect(graph: fx.Graph, norm: Norm, readers: Readers, z: fx.Node, traced: Traced) -> str:
    """Let backward's readers of y read z, or y made anew from z."""
    gradients = readers.weight_gradients() if norm.ndim == 1 and norm.weight is not None else None
    if gradients and _rescaling_pays(gradients):
        links = readers.copy(z)
        for each in gradients:
            _rescale(graph, norm, each, links[each.y], traced)
        return f", and so does the gradient of {_count(len(gradients), 'weight')}"
    if not readers.backward:
        return ""
    dtype = norm.y.meta["val"].dtype
    if z.meta["val"].dtype != formulas.compute_dtype(dtype):  # otherwise forward's y is made from this z already
        given = z, norm.weight, norm.bias
        y = splice(
            graph, norm.forward, lambda z, w, b: formulas.affine(z, w, b, dtype), given,
            like=norm.backward, decompositions=inductor_table(), memo=alike(traced, ("affine", dtype), given),
        )  # fmt: skip
        links = readers.copy(y)
        for reader, inputs in readers.backward.items():
            for link in inputs:
                reader.replace_input_with(link, links[link])
    return f"; its output is made anew from z for {_count(len(readers.backward), 'reader')}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number > 1 else "")


def _rescaling_pays(gradients: list[WeightGradient]) -> bool:
    # rescaling reads and writes every dW once, making y anew reads and writes tokens x width once; in float16 g^T z may
    # overflow where dW does not
    if gradients[0].product.meta["val"].dtype == torch.float16:
        return False
    written = sum(each.grad.meta["val"].shape[0 if each.rows_first else 1] for each in gradients)
    return statically_known_true(written <= gradients[0].tokens)


def _rescale(graph: fx.Graph, norm: Norm, gradient: WeightGradient, z: fx.Node, traced: Traced) -> None:
    """dW = (g^T z) diag(weight) + (sum g) (x) bias in the place of one dW = g^T y."""
    product = gradient.product
    dtype = product.meta["val"].dtype

    def rows(grad: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        compute = formulas.compute_dtype(dtype)
        dweight = (grad @ z).to(compute) * weight
        return (dweight if bias is None else dweight + grad.sum(1, True, dtype=compute) * bias).to(dtype)

    def columns(grad: Tensor, z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        compute = formulas.compute_dtype(dtype)
        dweight = (z @ grad).to(compute) * weight[:, None]
        return (dweight if bias is None else dweight + bias[:, None] * grad.sum(0, True, dtype=compute)).to(dtype)

    arguments: tuple[Any, ...] = (gradient.grad, z, norm.weight, norm.bias)
    result = splice(
        graph, product, rows if gradient.rows_first else columns, arguments, like=product,
        decompositions=inductor_table(), memo=alike(traced, ("weight", gradient.rows_first, dtype), arguments),
    )  # fmt: skip
    product.replace_all_uses_with(result)
    graph.erase_node(product)
