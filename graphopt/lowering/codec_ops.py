"""graphopt::encode and graphopt::decode: a codec as one node of a graph, until Inductor lowers it.

    parts = torch.ops.graphopt.encode(x, "int8", seed)      # seed: int64, no dims, where the codec draws; else None
    x_ = torch.ops.graphopt.decode(parts, shape, "int8", dtype)

A formula is some thirty nodes, and every cut, pass and lowering of a graph would go through those of every tensor that
is encoded. Inductor meets one node, for which the formula is traced once for all tensors of that layout and lowered in
its place; it fuses as if it had been spelt out. Wherever else such a graph runs, so does the formula.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._inductor.ir import ExternKernel, TensorBox
from torch._inductor.lowering import lowerings, register_lowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt.codecs import named
from graphopt.graph import layout
from graphopt.lowering.decompose import inductor_table
from graphopt.lowering.ops import define

AS_STRIDED = torch.ops.aten.as_strided.default


def encode(x: Tensor, codec: str, seed: Tensor | None) -> list[Tensor]:
    """The parts to save of x, any shape and float dtype, without the seed; see `Codec.parts`."""
    return list(named(codec).parts(x, seed))


def decode(parts: Sequence[Tensor], shape: Sequence[int], codec: str, dtype: torch.dtype) -> Tensor:
    """x_ from all parts, the seed too; see `Codec.decode`."""
    return named(codec).decode(parts, shape, dtype)


define(
    "encode(Tensor x, str codec, Tensor? seed) -> Tensor[]", encode,
    fake=lambda x, codec, seed: named(codec).empty_parts(x),
)  # fmt: skip
define(
    "decode(Tensor[] parts, SymInt[] shape, str codec, ScalarType dtype) -> Tensor", decode,
    fake=lambda parts, shape, codec, dtype: parts[0].new_empty(shape, dtype=dtype),
)  # fmt: skip


@register_lowering(torch.ops.graphopt.encode.default, type_promotion_kind=None)
def _lower_encode(x: Any, codec: str, seed: Any) -> Any:
    given = [x] if seed is None else [x, seed]
    return _replay(_traced(_encode_flat, _layouts(), (codec,)), given, saved=True)


@register_lowering(torch.ops.graphopt.decode.default, type_promotion_kind=None)
def _lower_decode(parts: Any, shape: Any, codec: str, dtype: torch.dtype) -> Any:
    return _replay(_traced(_decode_flat, _layouts(), (tuple(map(int, shape)), codec, dtype)), parts, saved=False)


def _encode_flat(tensors: Sequence[Tensor], codec: str) -> tuple[Tensor, ...]:
    return tuple(encode(tensors[0], codec, tensors[1] if len(tensors) > 1 else None))


def _decode_flat(tensors: Sequence[Tensor], shape: Sequence[int], codec: str, dtype: torch.dtype) -> Tensor:
    return decode(tensors, shape, codec, dtype)


def _layouts() -> tuple[Any, ...]:
    """Those of the tensors that the node which Inductor is at reads."""
    return tuple(layout(node.meta["val"]) for node in V.graph.current_node.all_input_nodes)


@cache
def _traced(function: Callable[..., Any], layouts: tuple[Any, ...], rest: tuple[Any, ...]) -> fx.GraphModule:
    with FakeTensorMode(), enable_python_dispatcher(), torch.no_grad():
        given = [_empty(*each) for each in layouts]
        return make_fx(lambda *tensors: function(tensors, *rest), decomposition_table=inductor_table())(*given)


def _empty(dims: int, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty_strided(sizes[:dims], sizes[dims:], dtype=dtype, device=device)


def _replay(gm: fx.GraphModule, given: Sequence[Any], saved: bool) -> Any:
    """Lower a graph node by node on Inductor's tensors, by what Inductor's own loop does for such operators.

    That writes down what is `saved` at once, so that what is computed from it reads it there.
    """
    env: dict[Any, Any] = dict(zip(gm.graph.find_nodes(op="placeholder"), given))
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        if node.target is operator.getitem:
            env[node] = operator.getitem(*args)
            continue
        with V.graph.set_current_node(node), V.set_current_node(node):
            result = lowerings[node.target](*args, **kwargs)
        if isinstance(result, TensorBox):
            if any((saved and user.op == "output") or user.target is AS_STRIDED for user in node.users):
                result = ExternKernel.require_exact_strides(result, node.meta["val"].stride())
            if len(node.users) > 1:
                result.mark_reuse(len(node.users))
            if result.has_exceeded_max_reads():
                result.realize_hint()
        env[node] = result
    results = gm.graph.output_node().args[0]
    return list(map(env.__getitem__, results)) if isinstance(results, (tuple, list)) else env[results]
