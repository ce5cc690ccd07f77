"""What can be done with each forward value that backward may want: saved as it is, saved encoded, recomputed.

A codec changes a value a little. So what is decoded may only be read where a small change stays small:
    ROUGH      comparisons, rounding, indices: what they answer is saved, never recomputed
    SINGULAR   a denominator, the argument of a logarithm: such a value is saved as it is
Nor can one scale serve values orders of magnitude apart (ranges.py). What a softmax is taken of crosses in 8 bits or
more (softmax.py).
Views go with what they show. Random numbers, collectives and operators nobody knows are not recomputed; what a
checkpointed region reads is not encoded.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._functorch.partitioners import get_default_op_list
from torch.utils.checkpoint import CheckpointPolicy

from graphopt.codecs import MASK, Codec
from graphopt.compat import FMA
from graphopt.graph import (
    ORIGIN,
    after_tangents,
    compares,
    hint,
    in_checkpoint,
    is_random,
    nbytes,
    owners,
    storage,
    storage_bytes,
    tensor,
)
from graphopt.lowering import ops  # noqa: F401  (ops registers the operators named below)
from graphopt.plan.estimate import ATTENTION, Rates, is_heavy, packet, seconds, written_out
from graphopt.plan.ranges import reduces, statistics_of, wide
from graphopt.plan.softmax import FINE, needs

aten, prims = torch.ops.aten, torch.ops.prims
SMALLEST, SMALLEST_MASK = 4096, 128  # bytes; below it a codec is not worth its kernel

ROUGH = {
    aten.floor, aten.ceil, aten.round, aten.trunc, aten.frac, aten.fmod, aten.remainder, aten.floor_divide, aten.sign,
    aten.sgn, aten.heaviside, aten.copysign, aten.nextafter,
}  # fmt: skip
# operand that must not come near a pole or leave the function's domain
SINGULAR = {
    aten.div: 1, aten.true_divide: 1, prims.div: 1, aten.reciprocal: 0, aten.rsqrt: 0, aten.sqrt: 0, aten.log: 0,
    aten.log2: 0, aten.log10: 0, aten.log1p: 0, aten.asin: 0, aten.acos: 0, aten.acosh: 0, aten.atanh: 0, aten.tan: 0,
    aten.erfinv: 0, aten.logit: 0, aten.xlogy: 1, aten.lgamma: 0, aten.digamma: 0, aten.pow: 0,
}  # fmt: skip
# operators of backward that torch does not list as pointwise, and that are smooth in what they read
SMOOTH = {
    *FMA,
    aten._softmax_backward_data, aten._log_softmax_backward_data, aten.native_layer_norm_backward,
    aten.native_group_norm_backward, aten.native_batch_norm_backward, aten.cat, aten.index_put, aten.constant_pad_nd,
}  # fmt: skip
RECOMPUTABLE_KERNELS = {
    aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution, *ATTENTION,
}  # fmt: skip
# beside those that torch lists: ours, and what Inductor folds tensors without contents into, on the meta device
CHEAP = {torch.ops.graphopt.unpack, aten.empty_strided}
FUSED_SHARE = 0.05  # of the bytes of a recomputed value that a fused kernel still costs


@dataclass(frozen=True)
class Value:
    """A forward value that owns its storage, with the views of it.

    `recompute` is the time of computing it from `inputs` in backward, infinite where that is not done; `codecs` are
    those it may be encoded with, `raw` says why there is none. `free` is what lives on in any case. What
    `needs_fine` may be recomputed only where nothing is encoded in fewer than FINE bits.
    """

    node: fx.Node
    bytes: int
    inputs: tuple[fx.Node, ...]
    savable: bool
    free: bool
    recompute: float
    codecs: tuple[Codec, ...]
    raw: str = ""
    decoded_to_memory: bool = False
    required: bool = False
    needs_fine: bool = False

    @property
    def numel(self) -> int:
        return math.prod(hint(size) for size in self.node.meta["val"].shape)


@dataclass
class Graph:
    """The values of a joint graph by their nodes, in its order; those that backward reads are `required`.

    `states` are the bytes that are saved whatever is planned: the states of random numbers of checkpointed regions.
    """

    values: dict[fx.Node, Value] = field(default_factory=dict)
    states: int = 0


def values(gm: fx.GraphModule, num_fwd_outputs: int, codecs: Sequence[Codec], rate: Rates, *, kernels: bool) -> Graph:
    """The values that backward reads, and all that they can be computed from.

    `kernels` says whether matrix products, attention and convolutions may be recomputed.
    """
    graph = gm.graph
    after, owner, users = after_tangents(graph), owners(graph), _outputs(graph, num_fwd_outputs)
    op_types = get_default_op_list()
    forward = [node for node in graph.nodes if node not in after and node.op != "output"]
    gradients = set(_results(graph)[num_fwd_outputs:])
    required, exact, region = set[fx.Node](), set[fx.Node](), set[fx.Node]()
    for node in forward:
        readers = [user for user in node.users if user in after and user.op != "output"]
        if readers or node in gradients:
            required.add(owner[node])
        if any(not _smooth(user, node, op_types) for user in readers):
            exact.add(owner[node])
        if not in_checkpoint(node) and any(in_checkpoint(user) for user in node.users):
            region.add(owner[node])
    exact |= region
    statistics = statistics_of(forward)
    softmax = needs({node: owner[node] for node in forward}, statistics)
    apart = wide(forward, owner, statistics) | {owner[each] for each in softmax.masked}
    fine, dithered = ({owner[each] for each in found} for found in (softmax.fine, softmax.dither))
    found = Graph()
    for node in _ancestors(required, owner):
        value = tensor(node)
        given = node.op != "call_function"
        lives_on = value is not None and storage(value) in users
        allowed = [codec for codec in codecs if codec.bits >= FINE or node not in fine]
        allowed = [codec.hashed() for codec in allowed] if node in dithered else allowed
        why = _why_raw(node, value, node in exact, node in statistics, node in apart)
        if not why and codecs and not allowed:
            why = f"a softmax is taken of it: it needs {FINE} bits or more"
        found.values[node] = Value(
            node,
            0 if value is None else storage_bytes([value]),
            tuple(dict.fromkeys(owner[each] for each in node.all_input_nodes)),
            savable=given or (value is not None and not in_checkpoint(node)),
            free=given or lives_on or _is_size(node),
            recompute=_recompute(node, op_types, rate, kernels, exact=node in (exact if codecs else region)),
            codecs=() if given or lives_on else _codecs(node, value, why, allowed),
            raw=why,
            decoded_to_memory=written_out(node),
            required=node in required,
            needs_fine=node in softmax.behind_products and not in_checkpoint(node),  # regions read what is exact
        )
    return found


def _ancestors(required: set[fx.Node], owner: dict[fx.Node, fx.Node]) -> list[fx.Node]:
    found, queue = set(required), list(required)
    while queue:
        for each in queue.pop().all_input_nodes:
            if owner[each] not in found:
                found.add(owner[each])
                queue.append(owner[each])
    return [node for node in owner if node in found]


def _results(graph: fx.Graph) -> list[Any]:
    return list(graph.output_node().args[0])  # type: ignore[arg-type]


def _outputs(graph: fx.Graph, num_fwd_outputs: int) -> set[int]:
    return {storage(value) for node in _results(graph)[:num_fwd_outputs] if (value := tensor(node)) is not None}


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool))


def _why_raw(node: fx.Node, value: torch.Tensor | None, exact: bool, statistic: bool, wide: bool) -> str:
    """Why a value cannot be encoded; empty where it can."""
    if value is None or not value.is_floating_point() or value.dtype.itemsize == 1:
        return "not a floating-point tensor"
    if storage_bytes([value]) != nbytes(value):
        return "it does not fill its storage"
    if storage_bytes([value]) < SMALLEST:
        return f"it has less than {SMALLEST} bytes"
    if statistic:
        return "it is a statistic of many values, which all else depends on"
    if wide:
        return "its values lie many orders of magnitude apart"
    if exact:
        return "backward compares it, divides by it or hands it to an operator that nobody knows"
    return ""


def _codecs(node: fx.Node, value: torch.Tensor | None, why: str, codecs: Sequence[Codec]) -> tuple[Codec, ...]:
    if value is not None and value.dtype == torch.bool and storage_bytes([value]) == nbytes(value) >= SMALLEST_MASK:
        return () if compares(node) else (MASK,)
    return () if why else tuple(codecs)


def _recompute(node: fx.Node, op_types: Any, rate: Rates, kernels: bool, exact: bool) -> float:
    if in_checkpoint(node) or _is_size(node) or node.target is operator.getitem:
        return 0.0
    if node.op != "call_function" or node.meta.get("recompute") == CheckpointPolicy.MUST_SAVE:
        return math.inf
    if exact and node.all_input_nodes:  # what it would be computed from may be encoded
        return math.inf
    if packet(node) in RECOMPUTABLE_KERNELS:
        return seconds(node, rate) if kernels and not _drops(node) else math.inf
    if is_random(node):
        return math.inf
    if packet(node) not in CHEAP and (
        is_heavy(node) or not op_types.is_recomputable(node) or _rough(node) or reduces(node)
    ):
        return math.inf
    if any(not _smooth(node, each, op_types) for each in node.all_input_nodes):
        return math.inf
    value = tensor(node)
    moved = 0 if value is None else storage_bytes([value])
    return moved * (1.0 if written_out(node) else FUSED_SHARE) / rate.bandwidth


def _drops(node: fx.Node) -> bool:
    """Whether an attention draws a dropout mask."""
    if packet(node) not in ATTENTION:
        return False
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {argument.name: value for argument, value in zip(schema, node.args)} | dict(node.kwargs)
    return bool(given.get("dropout_p", 0.0) != 0.0)


def _rough(node: fx.Node) -> bool:
    value = tensor(node)
    if packet(node) in ROUGH:
        return True
    read = [each for argument in node.all_input_nodes if (each := tensor(argument)) is not None]
    return value is not None and not value.is_floating_point() and any(each.is_floating_point() for each in read)


def _smooth(reader: fx.Node, read: fx.Node, op_types: Any) -> bool:
    """Whether a small change of what `reader` reads stays small in what it gives."""
    value = tensor(read)
    if value is None or not value.is_floating_point() or in_checkpoint(reader):
        return True
    if is_heavy(reader) or packet(reader) in SMOOTH:
        return True
    if _rough(reader) or not op_types.is_fusible(reader):
        return False
    place = SINGULAR.get(packet(reader))
    if place is None or ORIGIN in reader.meta or place >= len(reader.args) or reader.args[place] is not read:
        return True
    if packet(reader) is aten.pow:
        exponent = reader.args[1]
        return isinstance(exponent, (int, float)) and exponent >= 0 and float(exponent).is_integer()
    return _above_one(read)


def _above_one(node: fx.Node) -> bool:
    """1 + exp(x), as in a sigmoid written out."""
    terms = [each for each in node.args if isinstance(each, fx.Node)]
    constants = [each for each in node.args if isinstance(each, (int, float))]
    return packet(node) is aten.add and constants == [1] and [packet(each) for each in terms] == [aten.exp]
