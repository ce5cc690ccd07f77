"""Which operators a joint graph keeps whole for the passes, and how they are spelt out once the passes have run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch import fx
from torch._inductor.decomposition import select_decomp_table

from graphopt.graph import ORIGIN, outputs_of
from graphopt.lowering import formulas, ops
from graphopt.splicing import Traced, alike, splice

aten, own = torch.ops.aten, torch.ops.graphopt

# kept out of the table that AOTAutograd traces with, so that a pass can name them
CANONICAL = (
    aten.native_layer_norm.default, aten.native_layer_norm_backward.default, aten.gelu.default, aten.silu.default,
    aten.gelu_backward.default, aten.silu_backward.default, aten.mish_backward.default,
    aten.hardswish_backward.default, aten.softplus_backward.default, aten.elu_backward.default,
    aten.tanh_backward.default, aten.sigmoid_backward.default,
)  # fmt: skip

OWN: dict[Any, Callable[..., Any]] = {
    own.rms_norm.default: ops.rms_norm,
    own.rms_norm_backward.default: ops.rms_norm_backward,
}


def inductor_table() -> dict[Any, Callable[..., Any]]:
    """Inductor's decompositions under its present configuration (`fallback_random` changes them)."""
    return select_decomp_table()


def tracing_table(options: Mapping[str, Any] | None = None) -> dict[Any, Callable[..., Any]]:
    """Inductor's decompositions without those of the canonical operators: what a joint graph is traced with.

    Which they are depends on Inductor's `options`, those that hold and those that are given.
    """
    with inductor_config.patch(dict(options or {})):
        return {op: rule for op, rule in inductor_table().items() if op not in CANONICAL}


def decompose(gm: fx.GraphModule, example_inputs: Sequence[object] = ()) -> fx.GraphModule:
    """Spell out the canonical operators that are left, with Inductor's own decompositions, node by node.

    The bodies of higher-order operators (torch.cond, scan) are traced with the same table, so they are treated too.
    """
    table = {op: inductor_table()[op] for op in CANONICAL} | OWN
    traced: Traced = {}
    for each in [module for module in gm.modules() if isinstance(module, fx.GraphModule)]:
        for node in list(each.graph.nodes):
            if node.op == "call_function" and node.target in table:
                node.meta[ORIGIN] = node.name
                inline(each.graph, node, table[node.target], traced)
        each.recompile()
    return gm


def inline(graph: fx.Graph, node: fx.Node, rule: Callable[..., Any], traced: Traced | None = None) -> None:
    """Put the nodes of `rule` in the place of one node; what was `traced` before is not traced again."""
    given = node.args, node.kwargs
    result = splice(
        graph, node, lambda args, kwargs: rule(*args, **kwargs), given, like=node, decompositions=inductor_table(),
        memo=None if traced is None else alike(traced, node.target, given),
    )  # fmt: skip
    replace(node, result)


def replace(node: fx.Node, result: Any) -> None:
    """Let the readers of `node` read `result` instead: a node, or one for each output. `node` is erased."""
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        for index, output in outputs_of(node).items():
            output.replace_all_uses_with(result[index])
            node.graph.erase_node(output)
    node.graph.erase_node(node)


def lower(gm: fx.GraphModule, example_inputs: Sequence[object] = ()) -> fx.GraphModule:
    """Spell out `pack` and `unpack` in a graph that the cut has made; a pair that fell into one graph cancels."""
    for node in [node for node in gm.graph.nodes if node.target is own.unpack.default]:
        words = node.args[0]
        if words.target is own.pack.default:
            replace(node, words.args[0])
    gm.graph.eliminate_dead_code()
    for node in list(gm.graph.nodes):
        if node.target in (own.pack.default, own.unpack.default):
            inline(gm.graph, node, formulas.pack if node.target is own.pack.default else formulas.unpack)
    gm.recompile()
    return gm
