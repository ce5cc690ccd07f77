"""What softmaxes ask of codecs: 8 bits for what they are taken of and what their gradient is made of, and no bias.

An exponential turns an error of a score into a factor. In a trained model scores are large, so queries and keys in 4
bits leave nothing of its gradient, though they do little harm in one with random weights. And a softmax's gradient is a
difference: of a probability and one or zero in a cross entropy, of values and their mean in an attention. Where a model
is sure, little is left of it beside the errors of the two.

So FINE bits are for queries, keys, values, scores and results of an attention, for logits, for probabilities; and for
all that these are computed from by pointwise work, on both sides of the last matrix product before them. What lies
before that, another product away, may be coarser; what is computed from it may then not be recomputed for them. Any
exponential counts, with or without a maximum subtracted, also that of log(1 + exp(x)) in losses of yes and no.

On the way from a product to its exponential scores may be masked: by -1e9 or -inf, beside which no group of values has
a scale. So what is saved is the product, or the probability, but nothing between.

Most probabilities are far below the largest of their group. To nearest all of them become zero, and with them, in a
cross entropy over many classes, a percent of the gradient that pushes wrong classes down. So their codecs are dithered,
and those of sigmoids, which are the probabilities of yes, and of either less what was right. The dither is hashed from
the values: nothing is drawn, so that a model's own random numbers stay as they were, and zeros stay zeros.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.graph import ORIGIN, tensor
from graphopt.plan.estimate import ATTENTION, is_heavy, packet

aten, prims = torch.ops.aten, torch.ops.prims
Owners = Mapping[fx.Node, fx.Node]
FINE = 8  # bits
FLEX_ATTENTION = "flex_attention"  # a higher-order operator
BIAS = "attn_mask", "attn_bias"  # of an attention, if it is named and not the fourth argument
# what a difference passes through before its exponential (Inductor scales after the largest has been subtracted), and
# probabilities before they are multiplied by values
THROUGH = {aten.mul, aten.div, aten.where, prims.convert_element_type}
LINEAR = {aten.add, aten.sub, aten.mul, aten.neg, aten.where, aten.clone, prims.convert_element_type}
EXPONENTIALS = {aten.exp, aten.exp2}


@dataclass(frozen=True)
class Needs:
    """Nodes that need FINE bits; those of them that must not be recomputed from less; those that want dither.

    `masked` are those that may have a mask in them, and are not to be encoded.
    """

    fine: Collection[fx.Node]
    masked: Collection[fx.Node]
    behind_products: Collection[fx.Node]
    dither: Collection[fx.Node]


def needs(owner: Owners, statistics: Collection[fx.Node]) -> Needs:
    """Of the forward nodes of a joint graph: `owner` says of each what it is a view of.

    `statistics` are nodes that stand for many values.
    """
    softmaxes = [node for node in owner if is_softmax(node, owner, statistics)]
    probabilities = _spread(softmaxes, owner, THROUGH)
    sigmoids = [node for node in owner if packet(node) is aten.sigmoid and ORIGIN not in node.meta]
    products = dict.fromkeys(_ends(owner, probabilities), 0)  # matrix products between a node and its softmax
    queue = deque(products)
    behind = set[fx.Node]()
    while queue:
        node = queue.popleft()
        crossed = products[node] + is_heavy(node)
        if crossed > 1:
            behind.add(node)
            continue
        for each in node.all_input_nodes:
            if each.op == "call_function" and crossed < products.get(each, 2):
                products[each] = crossed
                # those without another product first, so that each node is reached by its shortest way
                (queue.append if is_heavy(node) else queue.appendleft)(each)
    masked = _masked(owner)
    return Needs(set(products), masked, behind, _spread([*probabilities, *sigmoids], owner, {*THROUGH, aten.sub}))


def is_softmax(node: fx.Node, owner: Owners, statistics: Collection[fx.Node]) -> bool:
    """exp(x - max(x)) or exp(x - logsumexp(x)), as in a softmax written out, x perhaps scaled or masked after that."""
    return packet(node) in EXPONENTIALS and any(
        each in statistics or _is_normalizer(each, owner) for each in _subtracted(node, owner)
    )


def _is_normalizer(node: fx.Node, owner: Owners) -> bool:
    """The largest of some values, or the logarithm of their sum, however few they are."""
    if packet(node) is aten.log:
        return packet(owner[node.all_input_nodes[0]]) is aten.sum
    return packet(node) is aten.amax


def _subtracted(reader: fx.Node, owner: Owners) -> Iterator[fx.Node]:
    """Each s of the differences x - s that a node reads, scaled or masked perhaps."""
    queue, seen = [reader], {reader}
    while queue:
        for node in (owner[each] for each in queue.pop().all_input_nodes):
            if packet(node) is aten.sub and isinstance(node.args[1], fx.Node):
                yield owner[node.args[1]]
            elif packet(node) in THROUGH and node not in seen:
                seen.add(node)
                queue.append(node)


def _masked(owner: Owners) -> set[fx.Node]:
    """What exponentials are taken of, or attentions add to their scores, back to what is not only scaled or added."""
    found, queue = set[fx.Node](), list[fx.Node]()
    for node in owner:
        if packet(node) in EXPONENTIALS and ORIGIN not in node.meta:
            queue.extend(node.all_input_nodes)
        elif packet(node) in ATTENTION:
            queue.extend(_biases(node))
    while queue:
        node = owner[queue.pop()]
        if node not in found and packet(node) in LINEAR:
            found.add(node)
            queue.extend(node.all_input_nodes)
    return found


def _biases(attention: fx.Node) -> Iterator[fx.Node]:
    """What an attention adds to its scores."""
    given = (*attention.args[3:4], *(attention.kwargs.get(name) for name in BIAS))
    yield from (each for each in given if isinstance(each, fx.Node))


def _spread(nodes: Iterable[fx.Node], owner: Owners, through: Collection[Any]) -> set[fx.Node]:
    """Nodes, views of them, and what operators of `through` make of them value by value."""
    found = set(nodes)
    queue = list(found)
    while queue:
        node = queue.pop()
        for user in node.users:
            if user in owner and user not in found and (_pointwise(user, node, through) or owner[user] is owner[node]):
                found.add(user)
                queue.append(user)
    return found


def _pointwise(user: fx.Node, node: fx.Node, through: Collection[Any]) -> bool:
    read, given = tensor(node), tensor(user)
    return read is not None and given is not None and read.shape == given.shape and packet(user) in through


def _ends(owner: Owners, probabilities: Collection[fx.Node]) -> Iterator[fx.Node]:
    """What softmaxes are taken of, and what is read beside them."""
    yield from probabilities
    for node in owner:
        if packet(node) in ATTENTION or str(node.target) == FLEX_ATTENTION:
            yield from (each for each in node.args[:3] if isinstance(each, fx.Node))
            yield from (*_biases(node), node, *node.users)
        elif is_heavy(node) and any(each in probabilities for each in node.all_input_nodes):
            yield from node.all_input_nodes
        elif packet(node) in EXPONENTIALS and ORIGIN not in node.meta:
            yield from node.all_input_nodes
