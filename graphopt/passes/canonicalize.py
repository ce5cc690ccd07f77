"""canonicalize: norms and activations written out in a forward graph become the one torch op that says the same.

Before   Dynamo hands over x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) as the user wrote it; every operation
         asks for tensors of its own in backward.
Now      one op, whose backward other passes know: graphopt.rms_norm, layer_norm, gelu, silu.
Costs    nothing. Values change by rounding: the op computes in float32 and rounds once, the formula at every step.

Gradients are exact. A match is left alone where somebody else reads its inside, something is changed in place or a
grad or autocast mode switches on the way, or where dtypes and shapes do not show that op and formula are the same.
Without metadata and without example inputs a floating point input is assumed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, is_concrete_int, statically_known_true
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from graphopt.lowering import ops  # noqa: F401  (registers graphopt.rms_norm)
from graphopt.passes.idioms import (
    Match,
    cast_to,
    interferes,
    match,
    module_called,
    origin,
    pattern,
    reduced,
    spelled,
    value,
)
from graphopt.pipeline import fired, left_alone

SCALE = (2 / math.pi) ** 0.5


class Reason(str):
    """Why a match is left alone."""


class Writer:
    """Inserts the op ahead of a match's root: inputs widened to the common dtype, the result in the root's own."""

    def __init__(self, root: fx.Node, found: Match) -> None:
        self.root, self.found, self.graph = root, found, root.graph
        self.x: Any = found.names["x"]
        self.made: list[fx.Node] = []

    def call(self, target: Any, *args: Any, method: bool = False, **kwargs: Any) -> fx.Node:
        node = self.graph.create_node("call_method" if method else "call_function", target, args, kwargs)
        node.meta = {k: v for k, v in self.root.meta.items() if k not in ("example_value", "val", "tensor_meta")}
        if all(value(each) is not None for each in node.all_input_nodes):
            function = getattr(torch.Tensor, target) if method else target
            with torch.no_grad():
                result = function(*fx.map_arg(args, value), **fx.map_arg(kwargs, value))
            node.meta["val" if "val" in self.root.meta else "example_value"] = result
        self.made.append(node)
        return node

    def write(self, op: Callable[[fx.Node], fx.Node], wide: torch.dtype | None = None) -> fx.Node | Reason:
        """op(x) with the root's dtype: computed in what x, root and `wide` promote to."""
        before, after = value(self.x), value(self.root)
        if isinstance(before, Tensor) and isinstance(after, Tensor):
            dtype = reduce(torch.promote_types, (after.dtype, wide or before.dtype), before.dtype)
            x = self.x if dtype == before.dtype else self.call("to", self.x, dtype, method=True)
            result = op(x)
            made = value(result)
            if not isinstance(made, Tensor) or made.dtype != after.dtype:
                result = self.call("to", result, after.dtype, method=True)
            return result
        sources = _dtypes(self.root, self.found)
        known = [each for each in sources if isinstance(each, torch.dtype)]
        if wide is not None or len(known) < len(sources - {self.x}):
            return Reason("its dtype is not known: give example inputs")
        if not known:
            return op(self.x)
        # the same promotion, left to the run
        common = reduce(torch.promote_types, known)
        own = self.call(getattr, self.x, "dtype")
        result = op(self.call("to", self.x, self.call(torch.promote_types, own, common), method=True))
        return result if self.x in sources else self.call("to", result, common, method=True)


def _dtypes(node: fx.Node, found: Match) -> frozenset[fx.Node | torch.dtype]:
    # what a node's dtype is promoted from: dtypes known, and nodes whose dtype is not
    to = cast_to(node) if node is not found.names["x"] else None
    if isinstance(to, torch.dtype):
        return frozenset({to})
    if to is not None:
        return _dtypes(origin(to), found)
    if isinstance(known := value(node), Tensor):
        return frozenset({known.dtype})
    if node not in found.interior:
        return frozenset({node})
    inputs = node.all_input_nodes[: 1 if spelled(node) == "rms_norm" else None]
    return frozenset[fx.Node | torch.dtype]().union(*(_dtypes(each, found) for each in inputs))


def _normalized(write: Writer) -> Sequence[int | fx.Node] | Reason:
    """The sizes of the dims a norm reduces, checked to be x's last and the weight's only ones."""
    x, known = write.x, value(write.x)
    affine = [write.found.names[name] for name in ("w", "b") if name in write.found.names]
    parsed = [each for each in map(reduced, write.found.reductions) if each is not None and each[1]]
    if len(parsed) < len(write.found.reductions):
        return Reason("its mean drops the dims it is taken over")
    if any(correction for _, _, correction in parsed):
        return Reason("its variance is unbiased, a norm's is not")
    rank = known.dim() if isinstance(known, Tensor) else 0
    dims = {tuple(sorted(dim - rank if rank and dim >= 0 else dim for dim in each)) for each, _, _ in parsed}
    last = tuple(range(-len(parsed[0][0]), 0))
    if dims != {last} or not last:
        return Reason("it does not normalise over the last dims")
    shapes = [each.shape for each in map(_parameter, affine) if isinstance(each, Tensor)]
    if len(shapes) < len(affine) or not (shapes or rank):
        return Reason("the size of the normalised dims is not known")
    shape = known.shape[-len(last) :] if isinstance(known, Tensor) else shapes[0]
    if any(len(other) != len(last) or not _same(other, shape) for other in shapes) or (not rank and 1 in shape):
        return Reason("its weight or bias is not of the normalised dims' shape")
    return [
        int(size) if is_concrete_int(size) else write.call("size", x, dim, method=True)
        for size, dim in zip(shape, last)
    ]


def _parameter(node: fx.Node) -> Any:
    # a parameter cast, or shifted and scaled by numbers, keeps its shape
    while value(node) is None and len(node.all_input_nodes) == 1:
        if cast_to(node) is None and spelled(node) not in ("add", "sub", "mul"):
            break
        node = node.all_input_nodes[0]
    return value(node)


def _same(left: Sequence[Any], right: Sequence[Any]) -> bool:
    return len(left) == len(right) and all(statically_known_true(a == b) for a, b in zip(left, right))


def _number(eps: Any) -> float:
    # a float that dynamic=True made symbolic becomes a number again; reading it adds a guard, a new value recompiles
    return float(value(eps) if isinstance(eps, fx.Node) else eps)


def _rms(write: Writer, shape: Any, weight: Any, eps: Any) -> fx.Node | Reason:
    own = torch.ops.graphopt.rms_norm.default
    return write.write(lambda x: write.call(operator.getitem, write.call(own, x, shape, weight, _number(eps)), 0))


def rms_norm(write: Writer) -> fx.Node | Reason:
    shape = _normalized(write)
    if isinstance(shape, Reason):
        return shape
    return _rms(write, shape, write.found.names.get("w"), write.found.names["eps"])


def torch_rms_norm(write: Writer) -> fx.Node | Reason:
    node = next(each for each in sorted(write.found.interior) if cast_to(each) is None)
    shape: Any
    eps: Any
    weight: Any = None
    if (module := module_called(node)) is not None:
        shape, eps = module.normalized_shape, module.eps
        if module.weight is not None:
            weight = write.graph.get_attr(f"{node.target}.weight")
            write.made.append(weight)
    else:
        given = {**dict(zip(("input", "normalized_shape", "weight", "eps"), node.args)), **node.kwargs}
        shape, weight, eps = given["normalized_shape"], given.get("weight"), given.get("eps")
    known = value(write.x)
    if eps is None:
        if not isinstance(known, Tensor):
            return Reason("its default eps depends on a dtype that is not known: give example inputs")
        # the documentation says the input's own eps; the code takes that of the dtype it computes in
        eps = torch.finfo(torch.promote_types(known.dtype, torch.float32)).eps
    return _rms(write, shape if isinstance(shape, fx.Node) else list(shape), weight, eps)


def layer_norm(write: Writer) -> fx.Node | Reason:
    shape = _normalized(write)
    if isinstance(shape, Reason):
        return shape
    names = write.found.names

    def op(x: fx.Node) -> fx.Node:
        wanted = value(x)
        affine = [names.get("w"), names.get("b")]
        for at, each in enumerate(affine):
            # the kernel takes one dtype; the root's dtype is no narrower, so nothing is lost
            if each is not None and (not isinstance(wanted, Tensor) or value(each).dtype != wanted.dtype):
                affine[at] = write.call("type_as", each, x, method=True)
        result = write.call(F.layer_norm, x, shape, *affine, _number(names["eps"]))
        # under autocast layer_norm gives float32 and the formula does not
        half = isinstance(wanted, Tensor) and wanted.dtype.itemsize < 4
        return write.call("to", result, wanted.dtype, method=True) if half else result

    return write.write(op)


def activation(op: Callable[..., Tensor], **settings: Any) -> Callable[[Writer], fx.Node | Reason]:
    return lambda write: write.write(lambda x: write.call(op, x, **settings))


tanh_gelu = activation(F.gelu, approximate="tanh")


def quick_gelu(write: Writer) -> fx.Node | Reason:
    # 1.702 x leaves float16 from 38488 on, where the formula still gives x
    def op(x: fx.Node) -> fx.Node:
        return write.call(operator.mul, write.call(F.silu, write.call(operator.mul, x, 1.702)), 1 / 1.702)

    known = value(write.x)
    return write.write(op, torch.float32 if not isinstance(known, Tensor) or known.dtype == torch.float16 else None)


def _centred(x: Any, eps: Any) -> Any:
    return (x - x.mean(-1)) / ((x - x.mean(-1)).pow(2).mean(-1) + eps).sqrt()


def _centred_var(x: Any, eps: Any) -> Any:
    return (x - x.mean(-1)) / (x.var(-1) + eps).sqrt()


# tried in this order at every node, the last node first: what is written around a formula before the formula alone
IDIOMS: tuple[tuple[str, fx.Node, Callable[[Writer], fx.Node | Reason]], ...] = tuple(
    (name, pattern(formula), build)
    for name, formula, build in (
        ("layer norm -> layer_norm", lambda x, w, b, eps: _centred(x, eps) * w + b, layer_norm),
        ("layer norm -> layer_norm", lambda x, w, b, eps: _centred_var(x, eps) * w + b, layer_norm),
        ("layer norm -> layer_norm", lambda x, w, eps: _centred(x, eps) * w, layer_norm),
        ("layer norm -> layer_norm", lambda x, w, eps: _centred_var(x, eps) * w, layer_norm),
        ("layer norm -> layer_norm", lambda x, eps: _centred(x, eps), layer_norm),
        ("layer norm -> layer_norm", lambda x, eps: _centred_var(x, eps), layer_norm),
        ("RMS norm -> rms_norm", lambda x, w, eps: x * (x.pow(2).mean(-1) + eps).rsqrt() * w, rms_norm),
        ("RMS norm -> rms_norm", lambda x, eps: x * (x.pow(2).mean(-1) + eps).rsqrt(), rms_norm),
        ("torch rms_norm -> rms_norm", lambda x: torch.rms_norm(x, (1,)), torch_rms_norm),
        ("tanh GELU -> gelu", lambda x: 0.5 * x * (1 + (SCALE * (x + 0.044715 * x**3)).tanh()), tanh_gelu),
        ("tanh GELU -> gelu", lambda x: 0.5 * x * (1 + (SCALE * x * (1 + 0.044715 * x**2)).tanh()), tanh_gelu),
        ("tanh GELU -> gelu", lambda x: 0.5 * x * (1 + (SCALE * x + SCALE * 0.044715 * x**3).tanh()), tanh_gelu),
        ("erf GELU -> gelu", lambda x: 0.5 * x * (1 + (x / 2**0.5).erf()), activation(F.gelu)),
        ("x * sigmoid(x) -> silu", lambda x: x * x.sigmoid(), activation(F.silu)),
        ("x / (1 + exp(-x)) -> silu", lambda x: x / (1 + (-x).exp()), activation(F.silu)),
        ("quick GELU -> silu", lambda x: x * (1.702 * x).sigmoid(), quick_gelu),
    )
)


def canonicalize(gm: fx.GraphModule, example_inputs: Sequence[object] = ()) -> fx.GraphModule:
    """Replace the formulas of IDIOMS in a forward graph by one op each; a graph without any comes back untouched.

    Takes Dynamo's graphs and those of torch.fx.symbolic_trace. `example_inputs` give dtypes and shapes to a graph that
    has none in its metadata.
    """
    graph = gm.graph
    if example_inputs and not any("val" in node.meta or "example_value" in node.meta for node in graph.nodes):
        mode = detect_fake_mode(example_inputs) or FakeTensorMode(allow_non_fake_inputs=True)
        FakeTensorProp(gm, mode).propagate(*example_inputs)
    dead: set[fx.Node] = set()
    missed: dict[fx.Node, tuple[Reason, Match]] = {}
    for root in reversed(list(graph.nodes)):
        if root in dead or (spelled(root) is None and cast_to(root) is None):
            continue
        for name, wanted, build in IDIOMS:
            if (found := match(wanted, root)) is None:
                continue
            result = _illegal(root, found) or _replaced(root, found, build)
            if isinstance(result, Reason):
                missed.setdefault(root, (result, found))
                continue
            fired(result, name)
            dead |= _erase(root, found)
            break
    inside = {node for root, (_, found) in missed.items() for node in found.interior - {root}}
    for root, (reason, found) in missed.items():
        if root not in inside and not found.interior & dead:
            left_alone(root, reason)
    if dead:
        gm.recompile()
    return gm


def _replaced(root: fx.Node, found: Match, build: Callable[[Writer], fx.Node | Reason]) -> fx.Node | Reason:
    with root.graph.inserting_before(root):
        write = Writer(root, found)
        result = build(write)
    old, new = value(root), value(result)
    known = isinstance(old, Tensor) and isinstance(new, Tensor)
    if known and not (old.dtype == new.dtype and _same(old.shape, new.shape)):
        result = Reason("the op gives another shape or dtype")
    if isinstance(result, Reason):
        for node in reversed(write.made):
            root.graph.erase_node(node)
        return result
    result.meta = dict(root.meta)
    root.replace_all_uses_with(result)
    return result


def _illegal(root: fx.Node, found: Match) -> Reason | None:
    inner, x = found.interior - {root}, found.names["x"]
    if any(user not in found.interior for node in inner for user in node.users):
        return Reason("a value inside the formula has another reader")
    node = min(found.interior)
    while node is not root:
        if interferes(node):
            return Reason(f"{node.name} changes a tensor or a mode inside the formula")
        node = node.next
    if any(is_traceable_wrapper_subclass(value(each)) for each in found.names.values()):
        return Reason("its tensors are of a subclass, which the op need not know")
    if free_unbacked_symbols(value(found.names.get("eps"))):
        return Reason("its eps is read off a tensor")
    before, after = value(x), value(root)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        rounds = any(cast_to(node) in (torch.float16, torch.bfloat16) for node in inner)
        return Reason("it rounds to half precision on purpose") if rounds else None
    if not before.is_floating_point() or not after.is_floating_point():
        return Reason(f"it takes {before.dtype} to {after.dtype}, not floating point to floating point")
    if cast_to(x) is not None and getattr(value(x.args[0]), "dtype", None) == torch.float64:
        return Reason("it rounds float64 on purpose")
    for node in inner:
        dtype = getattr(value(node), "dtype", before.dtype)
        if dtype != after.dtype and torch.promote_types(dtype, before.dtype) != dtype:
            return Reason(f"it rounds to {dtype} on purpose")
    return None


def _erase(root: fx.Node, found: Match) -> set[fx.Node]:
    erased: set[fx.Node] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        spare = node in found.interior or cast_to(node) is not None or node.target is getattr
        if spare and not node.users and node not in erased:
            waiting += node.all_input_nodes
            node.graph.erase_node(node)
            erased.add(node)
    return erased
