"""graphopt's own operators: schema, fake implementation, reference in plain torch, derivative.

They keep an idiom in one piece for as long as passes want to name it. `decompose` and `lower` spell them out before
Inductor sees a graph; under `lowmem_eager` the reference runs as it stands.

    rms_norm            y = x * rstd * weight, rstd = rsqrt(mean(x^2) + eps); y in x's dtype, rstd in float32
    rms_norm_backward   dx, dweight; an output that `mask` leaves out is empty
    pack, unpack        small integers <-> one or two bits an element, 16 to a word

The codecs' operators are in codec_ops.py: those stay whole until Inductor meets them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.lowering import formulas

_library = torch.library.Library("graphopt", "DEF")  # type: ignore[no-untyped-call]


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any] | None = None) -> None:
    """Register an operator; without `fake` the reference, in plain torch, serves as its fake implementation."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    _library.impl(name, reference, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"graphopt::{name}", fake or reference, lib=_library)


def rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    y, _, rstd = formulas.norm(x, len(shape), weight, None, eps, centred=False, z_dtype=x.dtype)
    return y, rstd


def rms_norm_backward(
    grad: Tensor, x: Tensor, shape: Sequence[int], rstd: Tensor, weight: Tensor | None, mask: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    z = x.to(rstd.dtype).contiguous()
    # without dweight not written as in forward: merged with that, z would be saved beside an x that is saved anyway
    z = z * rstd if mask[1] else rstd * z
    dx, dweight, _ = formulas.norm_backward(grad, z, rstd, weight, len(shape), centred=False, dtype=x.dtype)
    return dx if mask[0] else x.new_empty(0), dweight if mask[1] else x.new_empty(0)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, shape, weight, _ = inputs
    ctx.shape = shape
    ctx.save_for_backward(x, output[1], weight)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
    x, rstd, weight = ctx.saved_tensors
    mask = [ctx.needs_input_grad[0], weight is not None and ctx.needs_input_grad[2]]
    dx, dweight = torch.ops.graphopt.rms_norm_backward(grad, x, ctx.shape, rstd, weight, mask)
    return dx if mask[0] else None, None, dweight if mask[1] else None, None


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("graphopt::rms_norm has no second derivative: double backward (create_graph) is not supported")


define("rms_norm(Tensor x, SymInt[] normalized_shape, Tensor? weight, float eps) -> (Tensor, Tensor)", rms_norm)
define(
    "rms_norm_backward(Tensor grad, Tensor x, SymInt[] normalized_shape, Tensor rstd, Tensor? weight, bool[2] mask)"
    " -> (Tensor, Tensor)",
    rms_norm_backward,
)
define("pack(Tensor values, int bits) -> Tensor", formulas.pack)
define("unpack(Tensor words, SymInt[] shape, int bits, ScalarType dtype) -> Tensor", formulas.unpack)
torch.library.register_autograd("graphopt::rms_norm", _differentiate, setup_context=_save_inputs, lib=_library)
torch.library.register_autograd("graphopt::rms_norm_backward", _no_double_backward, lib=_library)
