"""splice(): how passes write into a graph, by tracing a function and putting its nodes in."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import _extract_tensor_metadata

from graphopt.graph import ORIGIN, fake_mode, layout, tensor

Decompositions = Mapping[Any, Callable[..., Any]]
Traced = dict[Any, fx.GraphModule]  # functions traced before, by what they are of

# what a spliced node takes over from the node it stands in for
_INHERITED = (
    "partitioner_tag", "stack_trace", "nn_module_stack", "fwd_nn_module_stack", "source_fn_stack",
    "fwd_source_fn_stack", "original_aten", "seq_nr", "recompute", "ac_graph_id", "custom", ORIGIN,
)  # fmt: skip


def splice(
    graph: fx.Graph,
    before: fx.Node,
    function: Callable[..., Any],
    arguments: Sequence[Any],
    *,
    like: fx.Node,
    decompositions: Decompositions | None = None,
    memo: tuple[Traced, Hashable] | None = None,
) -> Any:
    """Trace `function` on what `arguments` stand for, insert its nodes ahead of `before`, return its output as nodes.

    Nodes may lie anywhere in `arguments`; sizes that `function` reads off a tensor stay symbolic. The new nodes take
    their place in forward or backward, their module and their source line from `like`. `memo`, a store and a key, saves
    tracing the same function on alike tensors of fixed sizes again.
    """
    leaves, spec = pytree.tree_flatten(tuple(arguments))
    nodes = list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, fx.Node)))

    def flat(*values: Any) -> Any:
        given = dict(zip(nodes, values))
        filled = [given[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
        result = function(*pytree.tree_unflatten(filled, spec))
        return tuple(result) if isinstance(result, tuple) else result  # fx would make a node of a named tuple

    store, key = memo or ({}, None)
    key = key, tuple(nodes.index(leaf) for leaf in leaves if isinstance(leaf, fx.Node))  # which arguments are the same
    known = key in store
    with fake_mode(graph), enable_python_dispatcher(), torch.no_grad():
        if not known:
            trace = make_fx(flat, decomposition_table=dict(decompositions or {}))
            store[key] = trace(*_distinct(node.meta["val"] for node in nodes))
        return _insert(graph, before, store[key], nodes, like, again=known)


def _distinct(values: Iterable[Any]) -> Iterator[Any]:
    """The values; make_fx knows tensors by identity, and nodes that a rewrite has copied have one tensor."""
    seen = set[int]()
    for value in values:
        yield value.detach() if isinstance(value, torch.Tensor) and id(value) in seen else value
        seen.add(id(value))


def _insert(
    graph: fx.Graph, before: fx.Node, traced: fx.GraphModule, nodes: Sequence[fx.Node], like: fx.Node, again: bool
) -> Any:
    """Copy a traced graph; `again` for a second time, when its tensors need storages of their own."""
    inputs = iter(nodes)
    new: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(before):
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                new[node] = next(inputs)
            elif node.op == "output":
                return fx.map_arg(node.args[0], lambda n: new[n])
            else:
                if node.op == "get_attr":
                    raise ValueError("the function makes a constant tensor, which cannot be spliced into a graph")
                copied = new[node] = graph.node_copy(node, lambda n: new[n])
                if again:
                    args, kwargs = fx.map_arg((copied.args, copied.kwargs), lambda n: n.meta["val"])
                    copied.meta["val"] = copied.target(*args, **kwargs)  # type: ignore[operator]
                inherit(copied, like)
    return None


def alike(traced: Traced, function: Hashable, arguments: Sequence[Any]) -> tuple[Traced, Hashable] | None:
    """The `memo` by which `splice` traces `function` once for all arguments of one layout; None for symbolic sizes.

    Layers are alike: what they are given differs in nothing but its values.
    """
    leaves, structure = pytree.tree_flatten(tuple(arguments))
    shared = [(layout(value),) if (value := tensor(leaf)) is not None else (type(leaf), leaf) for leaf in leaves]
    if any(each == (None,) or isinstance(each[-1], fx.Node) for each in shared):
        return None
    return traced, (function, str(structure), *shared)


def inherit(node: fx.Node, like: fx.Node) -> None:
    """Give a new node the place, module and source line of `like`."""
    for key in _INHERITED:
        if key in like.meta:
            node.meta[key] = like.meta[key]
        else:
            node.meta.pop(key, None)
    value = tensor(node)
    if value is not None:
        node.meta["tensor_meta"] = _extract_tensor_metadata(value)


def copy_node(node: fx.Node, before: fx.Node, replace: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """A copy of `node` ahead of `before` that reads `replace[n]` where it read n."""
    with node.graph.inserting_before(before):
        new = node.graph.node_copy(node, lambda n: replace.get(n, n))
    new.meta = dict(node.meta)
    return new
