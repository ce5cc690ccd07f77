"""graphopt::encode and graphopt::decode: a codec as one node of a graph, until Inductor lowers it.

    parts = torch.ops.graphopt.encode(x, order, "int8", seed)    # seed: int64, no dims, where the codec draws, or None
    x_ = torch.ops.graphopt.decode(parts, shape, "int8", dtype)  # of x.permute(order)

A formula is some thirty nodes, and every cut, pass and lowering of a graph would go through those of every tensor that
is encoded. Inductor meets one node, for which the formula is traced once for all tensors of that layout and lowered in
its place; it fuses as if it had been spelt out, or is a function that alike tensors share (`_is_apart`). Wherever else
such a graph runs, so does the formula; in the code of Inductor too where sizes are symbolic, but `passes/encode.py`
spells out those.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._inductor.ir import ExternKernel, FlexibleLayout, InvokeSubgraph, Subgraph, TensorBox, is_storage_and_layout
from torch._inductor.lowering import (
    fallback_handler,
    fallback_node_due_to_unsupported_type,
    permute,
    register_lowering,
    view,
)
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt.codecs import named
from graphopt.errors import OptionsError
from graphopt.graph import layout
from graphopt.lowering.decompose import inductor_table
from graphopt.lowering.ops import define

MANY = 12  # encoders: writing C++ for so many takes as long as compiling one kernel more
AS_STRIDED = torch.ops.aten.as_strided.default


@dataclass
class _Encoders:
    """Of a graph that Inductor lowers: tensors encoded, by size, dtype and codec; and the functions made so far."""

    counts: Counter[tuple[int, torch.dtype, str]]
    functions: dict[tuple[Any, str], Subgraph] = field(default_factory=dict)


def _encode(x: Tensor, order: Sequence[int], codec: str, seed: Tensor | None) -> list[Tensor]:
    """The parts to save of x, any shape and float dtype, without the seed; see `Codec.parts`.

    `order` are the dims as they lie in memory. A view ahead of the operator would say so too, but Inductor lays out
    what is viewed as if it were new, and where attention reads it in its own order, copies it.
    """
    if (seed is not None) != named(codec).draws:
        raise OptionsError(f"codec {codec!r} takes {'a' if named(codec).draws else 'no'} seed")
    return list(named(codec).parts(x.permute(list(order)), seed))


def _decode(parts: Sequence[Tensor], shape: Sequence[int], codec: str, dtype: torch.dtype) -> Tensor:
    """x_ from all parts, the seed too; see `Codec.decode`."""
    return named(codec).decode(parts, shape, dtype)


# with fakes of their own: a formula's thirty operators for every tensor of every graph would take as long as a cut
define(
    "encode(Tensor x, int[] order, str codec, Tensor? seed) -> Tensor[]", _encode,
    fake=lambda x, order, codec, seed: named(codec).empty_parts(x.permute(list(order))),
)  # fmt: skip
define(
    "decode(Tensor[] parts, SymInt[] shape, str codec, ScalarType dtype) -> Tensor", _decode,
    fake=lambda parts, shape, codec, dtype: parts[0].new_empty(shape, dtype=dtype),
)  # fmt: skip
ENCODE, DECODE = torch.ops.graphopt.encode.default, torch.ops.graphopt.decode.default


@register_lowering(ENCODE, type_promotion_kind=None)
def _lower_encode(x: Any, order: Sequence[int], codec: str, seed: Any) -> Any:
    node_x, *_, node_seed = V.graph.current_node.args
    nodes: Any = [node_x] if seed is None else [node_x, node_seed]
    layouts = _layouts(nodes)
    if layouts is None:
        return _called(ENCODE, x, order, codec, seed)
    fakes = [node.meta["val"] for node in nodes]
    if list(order) != sorted(order) and is_storage_and_layout(x) and isinstance(x.get_layout(), FlexibleLayout):
        x = ExternKernel.require_exact_strides(x, fakes[0].stride())
    given = [x] if seed is None else [x, seed]
    if _is_apart(x, fakes[0].permute(list(order)), codec):
        return _apart(fakes, tuple(order), codec, given)
    return list(_replay(_traced(_encoded, layouts, (tuple(order), codec)), given, saved=True))


@register_lowering(DECODE, type_promotion_kind=None)
def _lower_decode(parts: Any, shape: Any, codec: str, dtype: torch.dtype) -> Any:
    layouts = _layouts(V.graph.current_node.args[0])
    if layouts is None or any(not str(size).isdigit() for size in shape):
        return _called(DECODE, parts, shape, codec, dtype)
    return _replay(_traced(_decode, layouts, (tuple(map(int, shape)), codec, dtype)), parts, saved=False)


def _is_apart(x: Any, rows: Tensor, codec: str) -> bool:
    """Whether encoding is a function of the generated code, which all tensors of one size share, and no fused kernel.

    So it is on a CPU for what is in memory anyway: made by a matrix product or read by one, or an input of the graph.
    Generating and compiling C++ for each tensor takes long. On a GPU a kernel less counts for more. Inductor's C++
    wrappers have no such functions.
    """
    dense = rows.is_contiguous() and rows.numel() > 0
    return (
        dense
        and rows.device.type == "cpu"
        and is_storage_and_layout(x)
        and not V.graph.cpp_wrapper
        and _count(rows, codec) >= MANY
    )


def _count(x: Tensor, codec: str) -> int:
    """How many tensors of that size are encoded so in the graph that is compiled."""
    return _encoders().counts[x.numel(), x.dtype, codec]


def _encoders() -> _Encoders:
    # kept by Inductor's own graph: its functions refer to it, so that a table with weak keys would keep it for good
    found: _Encoders | None = vars(V.graph).get("graphopt_encoders")
    if found is None:
        encoded = [node.args for node in V.graph.graph.find_nodes(op="call_function", target=ENCODE)]
        values: Any = ((x.meta["val"], codec) for x, _, codec, _ in encoded)
        counts = Counter((value.numel(), value.dtype, codec) for value, codec in values if layout(value) is not None)
        found = vars(V.graph)["graphopt_encoders"] = _Encoders(counts)
    return found


def _apart(fakes: Sequence[Tensor], order: Sequence[int], codec: str, given: Sequence[Any]) -> list[TensorBox]:
    """Call the function that encodes so many values; the first call makes it.

    It is what Inductor makes of `torch.compiler.nested_compile_region`, whose node stands in for ours meanwhile.
    """
    flat = [fakes[0].permute(list(order)).view(-1), *fakes[1:]]
    known = _encoders().functions
    key = layout(flat[0]), codec
    if key not in known:
        gm = _traced(_encoded, tuple(map(layout, flat)), ((0,), codec))
        known[key] = Subgraph(name=f"encode_{len(known)}", graph_module=gm)
    x: Any = permute(ExternKernel.require_exact_strides(given[0], fakes[0].stride()), order)
    call = fx.Graph().call_function(invoke_subgraph)
    call.meta["eager_input_vals"] = (None, None, *flat), {}
    with V.graph.set_current_node(call):
        parts = InvokeSubgraph.create(known[key], view(x, flat[0].shape), *given[1:])
    return [TensorBox.create(part) for part in parts]


def _called(op: Any, *args: Any, **kwargs: Any) -> Any:
    """An operator that Inductor calls as it is."""
    return fallback_handler(op, add_to_fallback_set=False)(*args, **kwargs)  # type: ignore[no-untyped-call]


def _encoded(tensors: Sequence[Tensor], order: Sequence[int], codec: str) -> list[Tensor]:
    return _encode(tensors[0], order, codec, tensors[1] if len(tensors) > 1 else None)


def _layouts(nodes: Any) -> tuple[Any, ...] | None:
    found = tuple(layout(node.meta["val"]) for node in nodes)
    return None if None in found else found


@lru_cache(1024)
def _traced(function: Callable[..., Any], layouts: tuple[Any, ...], rest: tuple[Any, ...]) -> fx.GraphModule:
    """The formula's graph; it does not depend on Inductor's settings, for it draws nothing."""
    with FakeTensorMode(), enable_python_dispatcher(), torch.no_grad():
        given = [_empty(*each) for each in layouts]
        return make_fx(lambda *tensors: function(tensors, *rest), decomposition_table=inductor_table())(*given)


def _empty(dims: int, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty_strided(sizes[:dims], sizes[dims:], dtype=dtype, device=device)


def _replay(gm: fx.GraphModule, given: Sequence[Any], saved: bool) -> Any:
    """Lower a formula on Inductor's tensors, in the middle of Inductor's own loop over the nodes around it.

    What is `saved` is written down at once, so that what is computed from it reads it there; what is decoded is left
    for its reader's kernel. Of what the loop does for a node (`GraphLowering.run_node`) the rest is for operators that
    a formula has none of, or is done for the node that the formula stands for: its origins, its users, its strides. A
    formula's last operator has no readers here, so a concatenation is written slice by slice, as is wanted.
    """
    env: dict[Any, Any] = dict(zip(gm.graph.find_nodes(op="placeholder"), given, strict=True))
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
        if node.target is operator.getitem:
            env[node] = operator.getitem(*args)
            continue
        with V.graph.set_current_node(node), V.set_current_node(node):
            if fallback_node_due_to_unsupported_type(node):  # a dtype that the device's code generator lacks
                result = _called(node.target, *args, **kwargs)
            else:
                result = V.graph.call_function(node.target, args, kwargs)
        if isinstance(result, TensorBox):
            if any((saved and user.op == "output") or user.target is AS_STRIDED for user in node.users):
                result = ExternKernel.require_exact_strides(result, node.meta["val"].stride())
            if len(node.users) > 1:
                result.mark_reuse(len(node.users))
            if result.has_exceeded_max_reads():
                result.realize_hint()
        env[node] = result
    return fx.map_arg(gm.graph.output_node().args[0], env.__getitem__)
