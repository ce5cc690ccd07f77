"""The surgery on one norm and its linears: there, back, and what would be lost on the way.

gamma is what the norm multiplies by and beta what it adds, both in float64; W is seen as [out, in]:

    there   W' = W diag(gamma),  b' = b + W beta         back    W = W' / diag(gamma),  b = b' - W beta

All arithmetic is in float64 and rounded once, to the parameter's dtype. Callers switch autograd off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from graphopt.merge.parameters import DTYPES, short, unfit
from graphopt.merge.record import BIAS, WEIGHT, MergedLinear, MergedNorm

# what two roundings to nearest take off a number, relative to it: twice half an eps, and their product
_ROUNDED = {dtype: torch.finfo(dtype).eps * (1 + torch.finfo(dtype).eps) for dtype in DTYPES}


def why_not_merge(root: nn.Module, norm: MergedNorm) -> str | None:
    """Why merging would lose what the linears know.

    A weight that is scaled, rounded, scaled back and rounded again is off by two roundings of its own, and by more
    where it became subnormal. That passes as long as it is no more than two roundings of the feature's largest weight.
    """
    weight, bias = _parameters(root, norm)
    gamma, beta = _affine(norm, weight, bias)
    if not gamma.isfinite().all() or (beta is not None and not beta.isfinite().all()):
        return "its weight or bias is not finite"
    if zeros := int((gamma == 0).sum()):
        return (
            f"it multiplies {zeros} of {gamma.numel()} features by zero, for which the linears' weights would be lost"
        )
    for linear in norm.linears:
        weight, bias = _parameters(root, linear)
        scaled, shifted = _merged(weight, bias, gamma, beta if linear.bias else None)
        back = (scaled.to(weight.dtype).double() / gamma.to(weight.device)).to(weight.dtype)
        lost = _largest(back.double() - weight.double())
        if not (lost <= _ROUNDED[weight.dtype] * _largest(weight)).all():
            return f"its weight takes that of {linear.path!r} out of the range of {short(weight.dtype)}"
        dtype = weight.dtype if bias is None else bias.dtype
        if shifted is not None and not shifted.to(dtype).isfinite().all():
            return f"its bias takes that of {linear.path!r} out of the range of {short(dtype)}"
    return None


def merge(root: nn.Module, norm: MergedNorm) -> None:
    """Scale and shift the linears, and leave the norm neutral and frozen, with what it was in its buffers."""
    module, (norm_weight, norm_bias) = root.get_submodule(norm.path), _parameters(root, norm)
    gamma, beta = _affine(norm, norm_weight, norm_bias)
    for linear in norm.linears:
        weight, bias = _parameters(root, linear)
        scaled, shifted = _merged(weight, bias, gamma, beta if linear.bias else None)
        weight.copy_(scaled)
        if bias is not None:
            bias.copy_(shifted)
        elif shifted is not None:
            added = nn.Parameter(shifted.to(weight.dtype), requires_grad=False)
            setattr(root.get_submodule(linear.path), str(linear.bias), added)
    for name, parameter, neutral in ((WEIGHT, norm_weight, 1 - norm.offset), (BIAS, norm_bias, 0)):
        if parameter is not None:
            module.register_buffer(name, parameter.clone())
            parameter.fill_(neutral).requires_grad_(False)
            parameter.grad = None  # an optimizer would take one more step with it


def why_not_unmerge(root: nn.Module, norm: MergedNorm) -> str | None:
    """Why a norm cannot be taken out of its linears."""
    modules = dict(root.named_modules())
    named: tuple[MergedNorm | MergedLinear, ...] = (norm, *norm.linears)
    for each in named:
        own = modules[each.path]._parameters if each.path in modules else {}
        for name in filter(None, (each.weight, each.bias)):
            if own.get(name) is None:
                return f"{each.path!r} has no parameter {name!r} any more"
            if why := unfit(own[name]):
                return f"{name!r} of {each.path!r} {why}"
    buffers: list[Any] = [getattr(modules[norm.path], name, None) for name in (WEIGHT, *([BIAS] if norm.bias else []))]
    if any(not isinstance(each, Tensor) or each.is_meta or not each.isfinite().all() for each in buffers):
        return f"its {WEIGHT} or {BIAS} is gone or not finite"
    if (buffers[0].double() + norm.offset == 0).any():
        return f"its {WEIGHT} has become zero"
    return None


def unmerge(root: nn.Module, norm: MergedNorm) -> None:
    """Scale and shift the linears back; what the norm has learned since comes on top: w z + b, in the place of z."""
    module, (weight, bias) = root.get_submodule(norm.path), _parameters(root, norm)
    gamma, beta = _affine(norm, getattr(module, WEIGHT), getattr(module, BIAS) if norm.bias else None)
    for linear in norm.linears:
        _unmerge_linear(root, linear, gamma, beta)
    learned = weight.double() - (1 - norm.offset)
    weight.copy_(getattr(module, WEIGHT).double() + learned * gamma).requires_grad_(norm.weight_requires_grad)
    delattr(module, WEIGHT)
    if bias is not None:
        bias.copy_(beta + bias.double() * gamma).requires_grad_(norm.bias_requires_grad)
        delattr(module, BIAS)


def _unmerge_linear(root: nn.Module, linear: MergedLinear, gamma: Tensor, beta: Tensor | None) -> None:
    weight, bias = _parameters(root, linear)
    weight.copy_(weight.double() / gamma.to(weight.device))
    if beta is None or bias is None:
        return
    beta = beta.to(weight.device)
    rest = bias.double() - weight.double() @ beta
    # where W was trained against an added bias more of it is left than roundings
    unit = _ROUNDED[weight.dtype] + beta.numel() * torch.finfo(torch.float64).eps
    rounded = unit * (bias.double().abs() + _largest(weight) @ beta.abs())
    if linear.bias_added and not bias.requires_grad and (rest.abs() <= rounded).all():
        setattr(root.get_submodule(linear.path), str(linear.bias), None)
    else:
        bias.copy_(rest)


def _parameters(root: nn.Module, each: MergedNorm | MergedLinear) -> tuple[Any, Any]:
    """Weight, [out, in] for a linear, and bias, None where there is none to change or it is to be added."""
    own: dict[str, Any] = root.get_submodule(each.path)._parameters
    weight, bias = own[each.weight], own[each.bias] if each.bias else None
    transposed = isinstance(each, MergedLinear) and each.transposed
    return weight.T if transposed else weight, bias


def _affine(norm: MergedNorm, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """gamma and beta."""
    return weight.double() + norm.offset, None if bias is None else bias.double()


def _merged(weight: Tensor, bias: Tensor | None, gamma: Tensor, beta: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W' and b' in float64, None for a bias that stays what it is."""
    wide = weight.double()
    scaled = wide * gamma.to(weight.device)
    if beta is None:
        return scaled, None
    shift = wide @ beta.to(weight.device)
    return scaled, shift if bias is None else bias.double() + shift


def _largest(weight: Tensor) -> Tensor:
    """The largest magnitude of a weight for each feature that it reads, in float64."""
    return weight.abs().amax(0).double()
