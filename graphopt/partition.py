"""The cut: what crosses from forward to backward, and what backward makes anew.

torch's min-cut partitioner does the cutting. Stock heuristics guard speed by keeping every tensor that backward would
have to write out once more; here they are off, since a pointwise kernel costs less than the bytes it spares. Only what
torch lists as cheap is made anew: pointwise work, views, casts, indexing. Matrix products, attention, convolutions,
random numbers, collectives and operators nobody knows the price of are not; nor are reductions to less than a quarter.
A checkpointed region keeps the user's own tags.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import fx
from torch._functorch import partitioners
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import CheckpointPolicy

from graphopt.compiling import quick_flow
from graphopt.crossing import Crossing, Halves, crossing_if_saved, crossing_of
from graphopt.graph import after_tangents, copy, in_backward, in_checkpoint, is_random, is_view, tensor

aten = torch.ops.aten
EQUALITY = (aten.eq.Tensor, aten.ne.Tensor)
# gives of what it reads one or another, without rounding
CHOICE = (aten.maximum.default, aten.minimum.default, aten.where.self, aten.amax.default, aten.amin.default)
PREFERRED = "graphopt_preferred"  # in node.meta: a rewrite's mark of what it would rather see saved

# pinned whatever the user has set, by their names in torch._functorch.config
STOCK: dict[str, object] = {
    "activation_memory_budget": 1.0,  # below 1 torch draws random numbers anew
    "aggressive_recomputation": False,  # as does this
}
FEWEST_BYTES: dict[str, object] = STOCK | {
    "ban_recompute_used_far_apart": False,  # a residual read again later
    "ban_recompute_materialized_backward": False,  # what a matrix product of backward reads
    "ban_recompute_long_fusible_chains": True,  # from one end of the model to the other
    "ban_recompute_not_in_allowlist": True,
    "ban_recompute_reductions": True,
}
# where a plan has been written into the graph: what it saves is tagged, and its copies must not be merged again
PLANNED: dict[str, object] = FEWEST_BYTES | {"cse": False}
# by the option "recompute"
HEURISTICS = {"any": FEWEST_BYTES, "pointwise": FEWEST_BYTES, "stock": STOCK}


def cut(
    gm: fx.GraphModule, joint_inputs: Sequence[object], heuristics: Mapping[str, object] = FEWEST_BYTES, **kwargs: Any
) -> Halves:
    """Split a joint graph, which is used up, into forward and backward, under torch's heuristics as `heuristics` pins.

    The other arguments are those of a torch partitioner.
    """
    _settle(gm, joint_inputs, heuristics, kwargs)
    return _partition(min_cut_rematerialization_partition, gm, joint_inputs, heuristics, kwargs)


def choose(
    gm: fx.GraphModule, joint_inputs: Sequence[object], heuristics: Mapping[str, object] = FEWEST_BYTES, **kwargs: Any
) -> Crossing:
    """What `cut` would save of a joint graph, which is left as it is: less work where no graphs have to be made."""
    gm = copy(gm)
    found = _settle(gm, joint_inputs, heuristics, kwargs)
    return found if found is not None else _choose(gm, joint_inputs, heuristics, kwargs)


def _settle(
    gm: fx.GraphModule, joint_inputs: Sequence[object], heuristics: Mapping[str, object], kwargs: dict[str, Any]
) -> Crossing | None:
    """Tag what a cut must save: random numbers, and what backward compares where it would be made anew.

    What the cut then saves, if it had to be found out.
    """
    draw_once(gm.graph)
    compared = comparisons(gm.graph)
    while compared:
        found = _choose(copy(gm), joint_inputs, heuristics, kwargs)
        again = [node for node in compared if node.name in found.in_backward]
        anew = [compared[node] for node in again if not found.in_backward.isdisjoint(compared[node])]
        if not must_save(node for read in anew for node in read.values()):
            return found
    return None


class _Chosen(Exception):
    def __init__(self, gm: fx.GraphModule, saved: list[fx.Node]) -> None:
        self.graph, self.saved = gm.graph, saved


def _stop(gm: fx.GraphModule, saved_values: list[fx.Node], saved_sym_nodes: list[fx.Node], **kwargs: Any) -> None:
    raise _Chosen(gm, [*saved_values, *saved_sym_nodes])


def _until_chosen() -> Callable[..., Halves]:
    """torch's partitioner, which raises _Chosen where it would make graphs of what it has chosen to save.

    In a version of torch that makes them otherwise it is the whole partitioner.
    """
    whole: Any = inspect.unwrap(min_cut_rematerialization_partition)
    if whole.__code__.co_freevars or "_extract_fwd_bwd_modules" not in whole.__code__.co_names:
        return min_cut_rematerialization_partition
    stopping = {**vars(partitioners), "_extract_fwd_bwd_modules": _stop}
    found = FunctionType(whole.__code__, stopping, argdefs=whole.__defaults__)
    found.__kwdefaults__ = whole.__kwdefaults__
    return found


def _choose(
    gm: fx.GraphModule, joint_inputs: Sequence[object], heuristics: Mapping[str, object], kwargs: dict[str, Any]
) -> Crossing:
    outputs: int = kwargs["num_fwd_outputs"]
    # the states of random numbers that a checkpointed region draws again torch saves once it has made the graphs
    drawn = any(is_random(node) and in_checkpoint(node) for node in gm.graph.nodes)
    partitioner = min_cut_rematerialization_partition if drawn else _until_chosen()
    try:
        return crossing_of(_partition(partitioner, gm, joint_inputs, heuristics, kwargs), outputs)
    except _Chosen as chosen:
        return crossing_if_saved(chosen.graph, chosen.saved, outputs)


def _partition(
    partitioner: Callable[..., Halves],
    gm: fx.GraphModule,
    joint_inputs: Sequence[object],
    heuristics: Mapping[str, object],
    kwargs: dict[str, Any],
) -> Halves:
    with functorch_config.patch(dict(heuristics)), quick_flow:
        return partitioner(gm, joint_inputs, **kwargs)


def cut_as_tagged(gm: fx.GraphModule, joint_inputs: Sequence[object], *, num_fwd_outputs: int, **kwargs: Any) -> Halves:
    """Split a joint graph that a plan has been written into: what is tagged MUST_SAVE is saved if backward reads it.

    The tag alone holds only for what forward computes in any case, so they pass for outputs of forward meanwhile.
    """
    _leave_to_forward(gm.graph, num_fwd_outputs)
    must_save(node for read in comparisons(gm.graph).values() for node in read.values())
    output, tag = gm.graph.output_node(), CheckpointPolicy.MUST_SAVE
    results: list[Any] = list(output.args[0])  # type: ignore[arg-type]
    tagged = [node for node in gm.graph.nodes if node.meta.get("recompute") == tag and tensor(node) is not None]
    start, end = num_fwd_outputs, num_fwd_outputs + len(tagged)
    _set_results(output, [*results[:start], *tagged, *results[start:]], start, len(tagged))
    forward, backward = cut(gm, joint_inputs, PLANNED, num_fwd_outputs=end, **kwargs)
    output = forward.graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    _set_results(output, [*results[:start], *results[end:]], start, -len(tagged))
    forward.graph.eliminate_dead_code()
    forward.recompile()
    return forward, backward


def _set_results(output: fx.Node, results: Sequence[Any], place: int, more: int) -> None:
    """Set a graph's outputs, and with them the descriptions that AOTAutograd keeps of each."""
    output.args = (tuple(results),)
    if "desc" in output.meta:
        known = list(output.meta["desc"])
        rest = known[place - more :] if more < 0 else known[place:]
        output.meta["desc"] = [*known[:place], *[None] * max(more, 0), *rest]


def comparisons(graph: fx.Graph) -> dict[fx.Node, dict[str, fx.Node]]:
    """What backward compares for equality (a maximum with what it was taken over), and the forward values it reads.

    Made anew in another kernel, a value may differ in its last bit; so either these are saved, or what they answer.
    Where the user checkpoints one of them it is made anew in any case, and saving the others would help nobody.
    """
    backward, after = in_backward(graph), after_tangents(graph)
    found = [node for node in graph.nodes if node.target in EQUALITY and node in backward and node not in after]
    read = {node: {each.name: each for each in _forward_values(node, backward)} for node in found}
    return {node: values for node, values in read.items() if not any(map(in_checkpoint, values.values()))}


def must_save(nodes: Iterable[fx.Node]) -> bool:
    """Tag what must be saved although torch's list calls it cheap; whether any had no tag before."""
    free = [node for node in nodes if "recompute" not in node.meta]
    for node in free:
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return bool(free)


def draw_once(graph: fx.Graph) -> None:
    """Save random numbers (torch's list calls rrelu cheap); leave to forward what a checkpoint draws for nobody.

    Forward has to draw it, as eager does, since what is drawn next depends on it. As it is random no pass takes it for
    dead, and the cut would run it in backward again, with all that it is drawn from.
    """
    graph.eliminate_dead_code()
    must_save(node for node in graph.nodes if is_random(node))
    for node in graph.nodes:
        if is_random(node) and not node.users and in_checkpoint(node):
            del node.meta["recompute"]
            node.meta["partitioner_tag"] = "must_be_in_forward"


def _leave_to_forward(graph: fx.Graph, num_fwd_outputs: int) -> None:
    """Free what a checkpointed region computes and backward does not read, all that it reads of it being saved.

    The cut would run it in backward again, for nothing, and save what it is computed from.
    """
    results: Sequence[Any] = graph.output_node().args[0]  # type: ignore[assignment]
    backward = after_tangents(graph) | {node for node in results[num_fwd_outputs:] if isinstance(node, fx.Node)}
    read, saved = set(backward), CheckpointPolicy.MUST_SAVE
    for node in reversed(graph.nodes):
        if any(user in backward or (user in read and user.meta.get("recompute") != saved) for user in node.users):
            read.add(node)
    for node in graph.nodes:
        if in_checkpoint(node) and node not in read:
            del node.meta["recompute"]
            if is_random(node):
                node.meta["partitioner_tag"] = "must_be_in_forward"


def keep_overwritten(gm: fx.GraphModule) -> fx.GraphModule:
    """Let backward read a copy of what forward writes over, such as a buffer that it also computes with; in place.

    torch's cut takes a graph's inputs to be there in backward as they were, which these are not.
    """
    graph, after = gm.graph, after_tangents(gm.graph)
    writes = [node for node in graph.find_nodes(op="call_function", target=aten.copy_.default) if node not in after]
    for given in {node.args[0]: None for node in writes if node.args[0].op == "placeholder"}:
        readers = [user for user in given.users if user not in writes]
        if not _reach(readers, after, graph.output_node()):
            continue
        with graph.inserting_after(list(graph.find_nodes(op="placeholder"))[-1]):
            kept = graph.call_function(aten.clone.default, (given,))
        kept.meta |= {"val": given.meta["val"].clone(), "partitioner_tag": "is_forward"}
        kept.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        for reader in readers:
            reader.replace_input_with(given, kept)
    gm.recompile()
    return gm


def _reach(nodes: Sequence[fx.Node], after: Container[fx.Node], output: fx.Node) -> bool:
    """Whether backward reads one of the nodes, or what is computed from one."""
    queue, seen = list(nodes), set(nodes)
    while queue:
        node = queue.pop()
        if node in after:
            return True
        more = [user for user in node.users if user not in seen and user is not output]
        seen.update(more)
        queue.extend(more)
    return False


def has_preferred(gm: fx.GraphModule) -> bool:
    """Whether a rewrite has marked what it would rather see saved."""
    return any(PREFERRED in node.meta for node in gm.graph.nodes)


def prefer(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph in which the cut must save what rewrites would rather see saved."""
    gm = copy(gm)
    for node in gm.graph.nodes:
        if PREFERRED in node.meta:
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return gm


def _forward_values(node: fx.Node, backward: set[fx.Node]) -> Iterator[fx.Node]:
    """The forward nodes that a node of backward is made from; of a view or a choice, what it shows or chooses from."""
    for each in node.all_input_nodes:
        if each in backward or is_view(each) or each.target in CHOICE:
            yield from _forward_values(each, backward)
        else:
            yield each
