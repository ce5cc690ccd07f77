"""The operators that have a kernel of their own: schema, checks, derivative, and which implementation runs where.

    activation_forward    y = f(x), code of f'(x) by a scheme of `graphopt.lowering.codes`
    activation_backward   dx = grad * levels[code]; the code is that of grad in row-major order
    norm_forward          y, z, rstd of LayerNorm (centred) or RMSNorm
    norm_backward         dx, dweight, dbias from z; one of the latter two that `mask` leaves out is empty
    group_encode          codes of 8, 4 or 2 bits, then what each group keeps; with a seed they are dithered
    group_decode          x_ of a given shape from codes, what groups keep, and the seed

On CUDA the kernel runs where it supports its arguments, everywhere else the reference. In eager mode autograd keeps
the code alone of an activation; of a norm z, rstd and weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.graph import inverse, memory_order
from graphopt.kernels import activation, group_quant, norm
from graphopt.lowering.activations import ACTIVATIONS
from graphopt.lowering.codes import SCHEMES

_require: Callable[[Any, Callable[[], str]], None] = torch._check
_library = torch.library.Library("graphopt", "FRAGMENT")  # type: ignore[no-untyped-call]


def _define(
    schema: str,
    check: Callable[..., None],
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    kernel: Callable[..., Any],
    supports: Callable[..., bool],
) -> None:
    # all take the arguments of the schema, in its order
    def checked(run: Callable[..., Any]) -> Callable[..., Any]:
        def checking(*args: Any) -> Any:
            check(*args)
            return run(*args)

        return checking

    def on_cuda(*args: Any) -> Any:
        return kernel(*args) if supports(*args) else reference(*args)

    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    _library.impl(name, checked(reference), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    _library.impl(name, checked(on_cuda), "CUDA")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"graphopt::{name}", checked(fake), lib=_library)


def _check_names(name: str, scheme: str) -> None:
    _check_one_of("activation", name, tuple(ACTIVATIONS))
    _check_one_of("scheme", scheme, SCHEMES)


def _check_one_of(what: str, given: object, allowed: tuple[object, ...]) -> None:
    if given not in allowed:
        raise ValueError(f"{what} {given!r} is not one of {', '.join(map(repr, allowed))}")


def _check_activation(x: Tensor, name: str, scheme: str, seed: Tensor | None) -> None:
    _check_names(name, scheme)
    _require(x.is_floating_point(), lambda: f"activation_forward: x is {x.dtype}, not floating point")
    if scheme == "unbiased":
        _check_seed("activation_forward: 'unbiased' draws from a seed,", seed, x.device)


def _check_code(grad: Tensor, code: Tensor, name: str, scheme: str) -> None:
    _check_names(name, scheme)
    _require(grad.is_floating_point(), lambda: f"activation_backward: grad is {grad.dtype}, not floating point")
    words = activation.words(grad.numel())
    _require(
        (code.dtype, code.dim(), code.device) == (torch.int32, 1, grad.device) and code.shape[0] == words,
        lambda: f"activation_backward: code is {_about(code)}, not int32 ({words},) on {grad.device}",
    )


def _check_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, *rest: Any) -> None:
    # kernels read as many elements as these shapes promise
    expected = tuple(shape)
    _require(x.is_floating_point(), lambda: f"norm_forward: x is {x.dtype}, not floating point")
    _require(rest[-1].is_floating_point, lambda: f"norm_forward: z_dtype is {rest[-1]}, not floating point")
    _require(
        len(expected) > 0 and tuple(x.shape[-len(expected) :]) == expected,
        lambda: f"norm_forward: normalized_shape {expected} is not the end of x's shape {tuple(x.shape)}",
    )
    _check_shape("norm_forward: weight", weight, expected, x.device)
    _check_shape("norm_forward: bias", bias, expected, x.device)


def _check_normalised(grad: Tensor, z: Tensor, rstd: Tensor, weight: Tensor | None, ndim: int, *_: Any) -> None:
    _require(0 < ndim <= grad.dim(), lambda: f"norm_backward: ndim is {ndim}, grad has {grad.dim()} dims")
    outer, inner = tuple(grad.shape[:-ndim]), tuple(grad.shape[-ndim:])
    _check_shape("norm_backward: z", z, outer + inner, grad.device)
    _check_shape("norm_backward: rstd", rstd, (*outer, *[1] * ndim), grad.device)
    _check_shape("norm_backward: weight", weight, inner, grad.device)


def _check_shape(what: str, given: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    _require(
        given is None or (tuple(given.shape) == shape and given.device == device),
        lambda: f"{what} is {_about(given)}, not {shape} on {device}",
    )


def _check_seed(what: str, seed: Tensor | None, device: torch.device) -> None:
    _require(
        seed is not None and (seed.dtype, seed.numel(), seed.device) == (torch.int64, 1, device),
        lambda: f"{what} one int64 on {device}, not {_about(seed)}",
    )


def _check_encode(x: Tensor, bits: int, group: int, symmetric: bool, seed: Tensor | None) -> None:
    _check_one_of("bits", bits, group_quant.BITS)
    _check_one_of("group", group, group_quant.GROUPS)
    _require(x.is_floating_point(), lambda: f"group_encode: x is {x.dtype}, not floating point")
    if seed is not None:
        _check_seed("group_encode: the seed is", seed, x.device)


def _check_decode(
    codes: Tensor, kept: Sequence[Tensor], seed: Tensor | None, bits: int, shape: Sequence[int], dtype: torch.dtype
) -> None:
    _check_one_of("bits", bits, group_quant.BITS)
    _require(dtype.is_floating_point, lambda: f"group_decode: dtype is {dtype}, not floating point")
    _require(
        codes.dtype == torch.uint8 and codes.dim() == 2,
        lambda: f"group_decode: codes are {_about(codes)}, not 2 dims of uint8",
    )
    group = codes.shape[1] * 8 // bits
    _check_one_of("group", group, group_quant.GROUPS)
    numel = math.prod(shape)
    _require(
        codes.shape[0] == (numel + group - 1) // group,
        lambda: f"group_decode: {codes.shape[0]} groups of {group} are not those of shape {tuple(shape)}",
    )
    _require(len(kept) in (1, 2), lambda: f"group_decode: groups keep one number or two, not {len(kept)}")
    for each in kept:
        _check_shape("group_decode: what groups keep", each, (codes.shape[0], 1), codes.device)
    dtypes = {each.dtype for each in kept}
    _require(dtypes == {torch.bfloat16}, lambda: f"group_decode: what groups keep is {dtypes}, not bfloat16")
    if seed is not None:
        _check_seed("group_decode: the seed is", seed, codes.device)


def _about(given: Tensor | None) -> str:
    return "None" if given is None else f"{given.dtype} {tuple(given.shape)} on {given.device}"


def _supports_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool,
    z_dtype: torch.dtype,
) -> bool:  # fmt: skip
    return norm.supports(math.prod(shape), x.dtype, _dtype(weight), _dtype(bias), z_dtype)


def _supports_norm_backward(
    grad: Tensor, z: Tensor, rstd: Tensor, weight: Tensor | None, ndim: int, centred: bool, dtype: torch.dtype,
    mask: Sequence[bool],
) -> bool:  # fmt: skip
    supported = norm.supports(math.prod(grad.shape[-ndim:]), grad.dtype, z.dtype, _dtype(weight), dtype)
    return supported and rstd.dtype == torch.float32


def _dtype(parameter: Tensor | None) -> torch.dtype | None:
    return None if parameter is None else parameter.dtype


def _save_code(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, ctx.name, ctx.scheme, _ = inputs
    y, code = output
    ctx.order = memory_order(y)
    ctx.save_for_backward(code)
    ctx.mark_non_differentiable(code)


def _differentiate_activation(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
    # the code lies as y does, so the gradient is read in that order
    (code,) = ctx.saved_tensors
    dx = torch.ops.graphopt.activation_backward(grad.permute(ctx.order), code, ctx.name, ctx.scheme)
    return dx.permute(inverse(ctx.order)), None, None, None


def _save_normalised(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, shape, weight, bias, _, ctx.centred, z_dtype = inputs
    y, z, rstd = output
    ctx.ndim, ctx.dtype = len(shape), x.dtype
    # without an affine map y equals z, and what reads y may keep it too
    equal = weight is None and bias is None and z_dtype == x.dtype
    ctx.save_for_backward(y if equal else z, rstd, weight)
    ctx.mark_non_differentiable(z, rstd)


def _differentiate_norm(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    z, rstd, weight = ctx.saved_tensors
    mask = list(ctx.needs_input_grad[2:4])
    dx, dweight, dbias = torch.ops.graphopt.norm_backward(grad, z, rstd, weight, ctx.ndim, ctx.centred, ctx.dtype, mask)
    return dx, None, dweight if mask[0] else None, dbias if mask[1] else None, None, None, None


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.mark_non_differentiable(*output)


def _no_gradient(ctx: Any, *grads: Any) -> tuple[None, ...]:
    return (None,) * 5


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "graphopt's operators have no second derivative: double backward (create_graph) is not supported"
    )


_define(
    "activation_forward(Tensor x, str activation, str scheme, Tensor? seed) -> (Tensor y, Tensor code)",
    check=_check_activation,
    reference=activation.reference_forward,
    fake=lambda x, *_: activation.empty_forward(x),
    kernel=activation.forward,
    supports=lambda x, *_: activation.supports(x.dtype),
)
_define(
    "activation_backward(Tensor grad, Tensor code, str activation, str scheme) -> Tensor",
    check=_check_code,
    reference=activation.reference_backward,
    fake=lambda grad, *_: torch.empty_like(grad, memory_format=torch.contiguous_format),
    kernel=activation.backward,
    supports=lambda grad, *_: activation.supports(grad.dtype),
)
_define(
    "norm_forward(Tensor x, SymInt[] normalized_shape, Tensor? weight, Tensor? bias, float eps, bool centred,"
    " ScalarType z_dtype) -> (Tensor, Tensor, Tensor)",
    check=_check_norm,
    reference=norm.reference_forward,
    fake=lambda x, shape, weight, bias, eps, centred, z_dtype: norm.empty_forward(x, len(shape), z_dtype),
    kernel=norm.forward,
    supports=_supports_norm,
)
_define(
    "norm_backward(Tensor grad, Tensor z, Tensor rstd, Tensor? weight, int ndim, bool centred, ScalarType dtype,"
    " bool[2] mask) -> (Tensor, Tensor, Tensor)",
    check=_check_normalised,
    reference=norm.reference_backward,
    fake=lambda grad, z, rstd, weight, ndim, centred, *rest: norm.empty_backward(grad, weight, ndim, *rest),
    kernel=norm.backward,
    supports=_supports_norm_backward,
)
_define(
    "group_encode(Tensor x, int bits, int group, bool symmetric, Tensor? seed) -> Tensor[]",
    check=_check_encode,
    reference=group_quant.reference_encode,
    fake=lambda x, bits, group, symmetric, _: group_quant.empty_encode(x, bits, group, symmetric),
    kernel=group_quant.encode,
    supports=lambda x, bits, group, *_: group_quant.supports(x.dtype, x.numel() // group),
)
_define(
    "group_decode(Tensor codes, Tensor[] kept, Tensor? seed, int bits, SymInt[] shape, ScalarType dtype) -> Tensor",
    check=_check_decode,
    reference=group_quant.reference_decode,
    fake=lambda codes, kept, seed, bits, shape, dtype: codes.new_empty(shape, dtype=dtype),
    kernel=group_quant.decode,
    supports=lambda codes, kept, seed, bits, shape, dtype: group_quant.supports(dtype, codes.shape[0]),
)
torch.library.register_autograd(
    "graphopt::activation_forward", _differentiate_activation, setup_context=_save_code, lib=_library
)
torch.library.register_autograd(
    "graphopt::norm_forward", _differentiate_norm, setup_context=_save_normalised, lib=_library
)
torch.library.register_autograd("graphopt::group_encode", _no_gradient, setup_context=_save_nothing, lib=_library)
for name in ("activation_backward", "norm_backward"):
    torch.library.register_autograd(f"graphopt::{name}", _no_double_backward, lib=_library)
