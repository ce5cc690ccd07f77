"""The op that each idiom becomes. A replacement takes the Writer of a match and gives the op's node, or a Reason."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from graphopt.lowering import ops  # noqa: F401  (registers graphopt.rms_norm)
from graphopt.passes.canonicalize.legality import Reason, normalized_shape
from graphopt.passes.canonicalize.operations import is_cast, module_called, value
from graphopt.passes.canonicalize.writing import Replacement, Writer


def layer_norm(write: Writer) -> fx.Node | Reason:
    names, sizes = write.found.names, _sizes(write)
    if isinstance(sizes, Reason):
        return sizes

    def op(x: fx.Node) -> fx.Node:
        dtype = value(x).dtype
        affine = [names.get("w"), names.get("b")]
        for at, each in enumerate(affine):
            # the kernel takes one dtype; the root's dtype is no narrower, so nothing is lost
            if each is not None and value(each).dtype != dtype:
                affine[at] = write.call("type_as", each, x)
        result = write.call(F.layer_norm, x, sizes, *affine, _number(names["eps"]))
        # under autocast layer_norm gives float32 and the formula does not
        return write.call("to", result, dtype) if dtype.itemsize < 4 else result

    return write.apply(op)


def rms_norm(write: Writer) -> fx.Node | Reason:
    names, sizes = write.found.names, _sizes(write)
    return sizes if isinstance(sizes, Reason) else _rms_norm(write, sizes, names.get("w"), names["eps"])


def own_rms_norm(write: Writer) -> fx.Node | Reason:
    """torch's own rms_norm, function or module, which dissolves on its way to the joint graph."""
    node = next(each for each in sorted(write.found.interior) if not is_cast(each))
    given: dict[str, Any]
    if (module := module_called(node)) is not None:
        given = {"normalized_shape": module.normalized_shape, "eps": module.eps}
        if module.weight is not None:
            given["weight"] = write.attribute(f"{node.target}.weight")
    else:
        given = {**dict(zip(("input", "normalized_shape", "weight", "eps"), node.args)), **node.kwargs}
    if (eps := given.get("eps")) is None:
        # the documentation says the input's own eps; the code takes that of the dtype it computes in
        eps = torch.finfo(torch.promote_types(value(write.x).dtype, torch.float32)).eps
    shape = given["normalized_shape"]
    return _rms_norm(write, shape if isinstance(shape, fx.Node) else list(shape), given.get("weight"), eps)


def _rms_norm(write: Writer, shape: Any, weight: Any, eps: Any) -> fx.Node:
    op = torch.ops.graphopt.rms_norm.default
    return write.apply(lambda x: write.call(operator.getitem, write.call(op, x, shape, weight, _number(eps)), 0))


def _sizes(write: Writer) -> list[int | fx.Node] | Reason:
    # the normalised shape as arguments of a call: a size that is no number is read off x
    shape = normalized_shape(write.found)
    if isinstance(shape, Reason):
        return shape
    return [
        int(size) if is_concrete_int(size) else write.call("size", write.x, dim)
        for dim, size in enumerate(shape, -len(shape))
    ]


def _number(eps: Any) -> float:
    # a float that dynamic=True made symbolic becomes a number again; reading it adds a guard, a new value recompiles
    return float(value(eps) if isinstance(eps, fx.Node) else eps)


def _activation(op: Callable[..., Tensor], **settings: Any) -> Replacement:
    return lambda write: write.apply(lambda x: write.call(op, x, **settings))


erf_gelu = _activation(F.gelu)
tanh_gelu = _activation(F.gelu, approximate="tanh")
silu = _activation(F.silu)


def quick_gelu(write: Writer) -> fx.Node:
    """x sigmoid(1.702 x) = silu(1.702 x) / 1.702."""

    def op(x: fx.Node) -> fx.Node:
        return write.call(operator.mul, write.call(F.silu, write.call(operator.mul, x, 1.702)), 1 / 1.702)

    # 1.702 x leaves float16 from 38488 on, where the formula still gives x
    return write.apply(op, torch.float32 if value(write.x).dtype == torch.float16 else None)
