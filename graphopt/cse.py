"""merge_equal(): what a joint graph computes twice is computed once, and counts once among what is saved."""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch.compile_utils import fx_graph_cse

from graphopt.graph import fake_mode, is_view, storage, tensor


def merge_equal(gm: fx.GraphModule) -> fx.GraphModule:
    """Compute what is computed twice once, as the cut does; in place."""
    gm.graph.eliminate_dead_code()
    gm.graph = fx_graph_cse(gm.graph)
    _show_merged(gm.graph)
    gm.recompile()
    return gm


def _show_merged(graph: fx.Graph) -> None:
    """Let the fake tensors of views lie in the storage of what they show, not of its double that was merged with it.

    Otherwise two views of one tensor count as two tensors that are saved.
    """
    for node in graph.nodes:
        if _is_view_of_tensor(node) and not _shows(node):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: each.meta["val"])
            with fake_mode(graph), enable_python_dispatcher(), torch.no_grad():
                node.meta["val"] = node.target(*args, **kwargs)
        elif node.target is operator.getitem and _is_view_of_tensor(node.args[0]):
            node.meta["val"] = node.args[0].meta["val"][node.args[1]]


def _is_view_of_tensor(node: fx.Node) -> bool:
    return is_view(node) and tensor(node.args[0]) is not None


def _shows(view: fx.Node) -> bool:
    values, base = view.meta["val"], view.args[0].meta["val"]  # type: ignore[union-attr]
    every = values if isinstance(values, (list, tuple)) else [values]
    return all(storage(each) == storage(base) for each in every)
