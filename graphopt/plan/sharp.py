"""What must be known well: the scores of an attention, the logits of a cross entropy, and what they are made of.

An exponential turns an error of a score into a factor. In a trained model scores are large, so queries and keys in 4
bits leave nothing of its gradient, though they do little harm in one with random weights. And the gradient of a cross
entropy is a probability less one or zero: where a model is sure, little is left of it beside the probability's error.

So these values are encoded in FINE bits at least: queries, keys, scores, logits, the probabilities of a cross entropy,
and all that they are computed from by pointwise work, on both sides of the last matrix product before them. What lies
before that, another product away, may be coarser; what is computed from it may then not be recomputed for them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator

import torch
from torch import fx

from graphopt.graph import storage, tensor
from graphopt.plan.estimate import ATTENTION, is_heavy, packet

aten = torch.ops.aten
FINE = 8  # bits


def sharpened(nodes: Iterable[fx.Node], statistics: Collection[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """The nodes of a joint graph that need FINE bits, and those of them that must not be recomputed from less.

    The second are products before the last one before a softmax; `statistics` are nodes that stand for many values.
    """
    products = dict.fromkeys(_softmaxed(nodes, statistics), 0)  # matrix products between a node and its softmax
    queue = deque(products)
    last = set[fx.Node]()
    while queue:
        node = queue.popleft()
        crossed = products[node] + is_heavy(node)
        if crossed > 1:
            last.add(node)
            continue
        for each in node.all_input_nodes:
            if each.op == "call_function" and crossed < products.get(each, 2):
                products[each] = crossed
                # those without another product first, so that each node is reached by its shortest way
                (queue.append if is_heavy(node) else queue.appendleft)(each)
    return set(products), last


def is_softmax(node: fx.Node, statistics: Collection[fx.Node]) -> bool:
    """exp(x - max(x)) or exp(x - logsumexp(x)), as in a softmax written out."""
    return packet(node) is aten.exp and _subtracted(node) in statistics


def _subtracted(exponential: fx.Node) -> fx.Node | None:
    """The s of exp(x - s)."""
    given = _shown(exponential.all_input_nodes[0])
    is_difference = packet(given) is aten.sub and isinstance(given.args[1], fx.Node)
    return _shown(given.args[1]) if is_difference else None  # type: ignore[arg-type]


def _shown(node: fx.Node) -> fx.Node:
    """What a node is a view of, or an alias."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1 and (value := tensor(node)) is not None:
        (given,) = node.all_input_nodes
        if (seen := tensor(given)) is None or storage(seen) != storage(value):
            break
        node = given
    return node


def _softmaxed(nodes: Iterable[fx.Node], statistics: Collection[fx.Node]) -> Iterator[fx.Node]:
    for node in nodes:
        if packet(node) in ATTENTION:
            yield from (each for each in node.args[:2] if isinstance(each, fx.Node))
        elif is_softmax(node, statistics):
            yield from node.all_input_nodes
            if _is_of_loss(node):
                yield node


def _is_of_loss(softmax: fx.Node) -> bool:
    """Whether an exponential is that of a log-softmax: its sum's logarithm is taken, or has been."""
    sums = [user for user in softmax.users if packet(user) is aten.sum]
    subtracted = _subtracted(softmax)
    return any(packet(user) is aten.log for each in sums for user in each.users) or (
        subtracted is not None and packet(subtracted) is aten.log
    )
