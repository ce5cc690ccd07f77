"""What is encoded in 8 bits at least: what a softmax is taken of, and what its gradient is made of.

An exponential turns an error of a score into a factor. In a trained model scores are large, so queries and keys in 4
bits leave nothing of its gradient, though they do little harm in one with random weights. And a softmax's gradient is a
difference: of a probability and one or zero in a cross entropy, of values and their mean in an attention. Where a model
is sure, little is left of it beside the errors of the two.

So FINE bits are for queries, keys, values, scores and results of an attention, for logits, for probabilities; and for
all that these are computed from by pointwise work, on both sides of the last matrix product before them. What lies
before that, another product away, may be coarser; what is computed from it may then not be recomputed for them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import fx

from graphopt.plan.estimate import ATTENTION, is_heavy, packet

aten, prims = torch.ops.aten, torch.ops.prims
Owners = Mapping[fx.Node, fx.Node]
FINE = 8  # bits
FLEX_ATTENTION = "flex_attention"  # a higher-order operator
BIAS = "attn_mask", "attn_bias"  # of an attention, if it is named and not the fourth argument
# what a difference passes through before its exponential: Inductor scales after the largest has been subtracted
THROUGH = {aten.mul, aten.div, aten.where, prims.convert_element_type}


def sharpened(owner: Owners, statistics: Collection[fx.Node]) -> tuple[set[fx.Node], set[fx.Node]]:
    """The nodes of a joint graph that need FINE bits, and those of them that must not be recomputed from less.

    The second are products before the last one before a softmax. `owner` says of every node what it is a view of;
    `statistics` are nodes that stand for many values.
    """
    products = dict.fromkeys(_softmaxed(owner, statistics), 0)  # matrix products between a node and its softmax
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


def is_softmax(node: fx.Node, owner: Owners, statistics: Collection[fx.Node]) -> bool:
    """exp(x - max(x)) or exp(x - logsumexp(x)), as in a softmax written out, x perhaps scaled or masked after that."""
    return packet(node) is aten.exp and any(each in statistics for each in _subtracted(node, owner))


def _subtracted(reader: fx.Node, owner: Owners) -> Iterator[fx.Node]:
    """Each s of the differences x - s that a node reads, scaled or masked perhaps."""
    for node in (owner[each] for each in reader.all_input_nodes):
        if packet(node) is aten.sub and isinstance(node.args[1], fx.Node):
            yield owner[node.args[1]]
        elif packet(node) in THROUGH:
            yield from _subtracted(node, owner)


def _softmaxed(owner: Owners, statistics: Collection[fx.Node]) -> Iterator[fx.Node]:
    for node in owner:
        if packet(node) in ATTENTION or str(node.target) == FLEX_ATTENTION:
            given = [*node.args[:4], *(node.kwargs.get(name) for name in BIAS), node, *node.users]
            yield from (each for each in given if isinstance(each, fx.Node))
        elif is_softmax(node, owner, statistics):
            yield from (*node.all_input_nodes, node)
            yield from (user for user in node.users if packet(user) is aten.div)
