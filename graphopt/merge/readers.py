"""Which linears read which norm, and why one cannot be merged: read off the canonical forward graph, not off names.

A norm can be merged if its weight and bias are parameters that may be changed, and if what reads its output, through
copies and views that keep the features apart, is linears alone, whose weights and biases may be changed too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator

from graphopt import passes
from graphopt.errors import MergeError
from graphopt.graph import hint, module_of, outputs_of, storage
from graphopt.merge.parameters import Parameters, Refused, called, text
from graphopt.merge.record import BIAS, WEIGHT, MergedLinear, MergedNorm
from graphopt.passes.canonicalize.operations import spelled, through_casts, value
from graphopt.pipeline import run
from graphopt.tracer import forward_graph

# the calls and the names of their arguments, in order
RMS_NORM = torch.ops.graphopt.rms_norm.default
NORMS: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys((F.layer_norm, torch.layer_norm), ("input", "normalized_shape", "weight", "bias")),
    RMS_NORM: ("x", "normalized_shape", "weight", "eps"),
}
LINEARS: dict[Any, tuple[str, ...]] = {F.linear: ("input", "weight", "bias"), torch.addmm: ("bias", "input", "weight")}
# what leaves every value where it is, but for its dtype, device or memory
COPIES = {
    "contiguous", "clone", "to", "type", "type_as", "float", "half", "bfloat16", "double", "cpu", "cuda",
}  # fmt: skip
VIEWS = {
    "view", "reshape", "flatten", "squeeze", "unsqueeze", "transpose", "permute", "movedim", "expand", "select",
    "narrow", "getitem",
}  # fmt: skip


def find_norms(root: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, MergedNorm | str | None]:
    """Every norm by its path: what to merge of it, or why it cannot be; None where there is nothing to merge."""
    gm, given = forward_graph(root, inputs, kwargs)
    gm, records = run(gm, given, passes.FORWARD)
    if any(isinstance(node.target, HigherOrderOperator) and "checkpoint" in called(node) for node in gm.graph.nodes):
        raise MergeError("checkpointed regions hide their norms: turn activation checkpointing off while merging")
    parameters = Parameters(root, gm.graph, given)
    found: dict[str, MergedNorm | str | None] = {}
    for node in gm.graph.nodes:
        if node.target not in NORMS:
            continue
        arguments = _given(node, NORMS)
        if arguments.get("weight") is None and arguments.get("bias") is None:
            found.setdefault(module_of(node), None)
            continue
        path = _path(parameters, node, arguments)
        if found.get(path) is not None:
            found[path] = "more than one norm of the graph reads its parameters: it is shared"
            continue
        try:
            found[path] = _norm(parameters, path, node, arguments)
        except Refused as why:
            found[path] = str(why)
    # what the graph does not show as a norm, or not at all
    modules = parameters.modules
    for event in itertools.chain.from_iterable(record.left_alone for record in records):
        own = modules[event.module]._parameters.values() if event.module in modules else ()
        if any(each is not None and each.dim() == 1 for each in own):
            found.setdefault(event.module, f"its formula cannot be read: {event.text}")
    for path, module in modules.items():
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and module.weight is not None:
            found.setdefault(path, "the graph of these inputs does not show it")
    return found


def _norm(parameters: Parameters, path: str, node: fx.Node, given: Mapping[str, Any]) -> MergedNorm:
    if given.get("weight") is None:
        raise Refused("it has a bias and no weight")
    chain = _chain(given["weight"])
    weight, _, weight_name = parameters.only_read_by(node, chain, "its weight")
    bias, bias_name = None, None
    if given.get("bias") is not None:
        bias, owner, bias_name = parameters.only_read_by(node, through_casts(given["bias"]), "its bias")
        if owner != path:
            raise Refused(f"its bias is a parameter of another module, {owner!r}")
    if any(hasattr(parameters.modules[path], name) for name in (WEIGHT, BIAS)):
        raise Refused("it was merged already, as a part of another model")
    if weight.dim() != 1:
        raise Refused(f"it normalises over {weight.dim()} dims, not over the features alone")
    y = outputs_of(node).get(0, node) if node.target is RMS_NORM else node  # it returns rstd too
    linears = tuple(_linear(parameters, linear, source, bias) for linear, source in _readers(y))
    if not linears:
        raise Refused("nothing reads its output")
    return MergedNorm(
        path,
        weight=weight_name,
        bias=bias_name,
        offset=sum(spelled(each) == "add" for each in chain),
        weight_requires_grad=weight.requires_grad,
        bias_requires_grad=bias is not None and bias.requires_grad,
        linears=linears,
    )


def _linear(parameters: Parameters, node: fx.Node, y: fx.Node, norm_bias: Tensor | None) -> MergedLinear:
    given = _given(node, LINEARS)
    as_input = given.get("input") is y and y not in (given.get("weight"), given.get("bias"))
    if not as_input or given.keys() - {"input", "weight", "bias"}:
        raise Refused(f"its output is read by {text(node)} as another than the input of a linear")
    linear = f"the linear in {module_of(node)!r}"
    _, path, weight = parameters.only_read_by(node, through_casts(given["weight"]), f"the weight of {linear}")
    bias, added = None, False
    if norm_bias is not None and given.get("bias") is not None:
        _, owner, bias = parameters.only_read_by(node, through_casts(given["bias"]), f"the bias of {linear}")
        if owner != path:
            raise Refused(f"weight and bias of {linear} are parameters of two modules")
    elif norm_bias is not None:
        # where forward is another than nn.Linear's nobody may read a bias that is added
        plain = getattr(parameters.modules[path].forward, "__func__", None) is nn.Linear.forward
        added = plain and weight == "weight" and module_of(node) == path
        if not added and norm_bias.any():
            raise Refused(f"its bias is not zero, and {linear} has none and cannot be given one")
        bias = "bias" if added else None
    return MergedLinear(path, weight, bias, transposed=node.target is torch.addmm, bias_added=added)


def _given(node: fx.Node, names: Mapping[Any, Sequence[str]]) -> dict[str, Any]:
    """The arguments of a norm or a linear, by name."""
    return {**dict(zip(names[node.target], node.args)), **node.kwargs}


def _path(parameters: Parameters, node: fx.Node, given: Mapping[str, Any]) -> str:
    """The path of the module that holds a norm's parameters; where they are computed, of the one that calls it."""
    for name in ("weight", "bias"):
        chain = _chain(given.get(name))
        if chain and (owner := parameters.owner(chain[-1])):
            return owner[0]
    return module_of(node)


def _chain(weight: Any) -> list[fx.Node]:
    """What a norm's weight is made from, by casts and by Gemma's 1 + weight."""
    if not isinstance(weight, fx.Node):
        return []
    chain = through_casts(weight)
    if spelled(chain[-1]) == "add" and not chain[-1].kwargs:
        match chain[-1].args:
            case (1, term) | (term, 1):
                chain += _chain(term)
    return chain


def _readers(y: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The linears that read y or a copy or view of it that keeps features apart, and what they read."""
    waiting = [y]
    for node in waiting:
        for user in node.users:
            if user.op == "output":
                raise Refused("its output is returned by the model")
            if user.target in LINEARS:
                yield user, node
            elif _keeps_features(user, node):
                waiting.append(user)
            elif user.target != "type_as" or user.args[0] is node:  # otherwise its dtype alone is read
                raise Refused(f"its output is read by {text(user)}, which is no linear")


def _keeps_features(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node only copies or views its source, with the features still along the last dim."""
    name, before, after = called(node), value(source), value(node)
    if node.op not in ("call_method", "call_function") or node.args[:1] != (source,):
        return False
    if not isinstance(after, Tensor) or not after.is_floating_point():
        return False
    if name in COPIES:
        return True
    if name not in VIEWS or node.all_input_nodes != [source]:
        return False
    # a tensor in which every element lies at the offset of its feature; after a view it must still
    sizes = [hint(size) for size in before.shape]
    probe = torch.empty_strided(sizes, (*[0] * (before.dim() - 1), 1), device="meta")
    call: Any = getattr(Tensor, name) if node.op == "call_method" else node.target
    try:
        seen = call(probe, *node.args[1:], **node.kwargs)
    except RuntimeError:  # a view that only the strides of the real tensor allow
        return False
    if storage(seen) != storage(probe) or seen.storage_offset() or list(seen.shape[-1:]) != sizes[-1:]:
        return False
    return seen.stride(-1) == 1 and not any(stride for size, stride in zip(seen.shape[:-1], seen.stride()) if size > 1)
