"""Which values one scale for a group cannot serve: statistics, and those that lie orders of magnitude apart.

statistics of many values     a norm's rstd, an attention's logsumexp: all else depends on them
STEEP, QUOTIENT               whatever their argument has of range, they have to another power
SPARSE                        mostly zeros
HUGE constants                a mask's, or a factor of one's, and what is added to those
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import fx

from graphopt.graph import ORIGIN, hint, tensor
from graphopt.plan.estimate import is_heavy, packet
from graphopt.plan.softmax import EXPONENTIALS, LINEAR, Owners, is_softmax

aten, prims = torch.ops.aten, torch.ops.prims
STEEP = {*EXPONENTIALS, aten.expm1, aten.sinh, aten.cosh, aten.tan}
# and the place of what they divide by
QUOTIENT = {aten.div: 1, aten.true_divide: 1, prims.div: 1, aten.reciprocal: 0, aten.rsqrt: 0}
SPARSE = {aten.scatter, aten.index_put, aten.masked_scatter}  # mostly zeros, which one scale for a group would blur
HUGE = 1e3  # a constant of a mask, or a factor of one: the values beside it are small
# they read much and give little of it, but each value as it was
INDEXING = {aten.embedding, aten.index, aten.gather, aten.slice, aten.select, aten.index_select}


def statistics_of(forward: Sequence[fx.Node]) -> set[fx.Node]:
    """Nodes of which each value stands for many: a norm's rstd, an attention's logsumexp, their logarithms."""
    found: set[fx.Node] = set()
    for node in forward:
        if is_heavy(node) or node.op != "call_function" or packet(node) in INDEXING:
            continue
        read = [each for each in node.all_input_nodes if each.op == "call_function" and tensor(each) is not None]
        if reduces(node) or (read and all(each in found for each in read)):
            found.add(node)
    return found


def wide(forward: Sequence[fx.Node], owner: Owners, statistics: set[fx.Node]) -> set[fx.Node]:
    """Nodes whose values may lie orders of magnitude apart, of which one scale for a group keeps the largest only."""
    found: set[fx.Node] = set()
    for node in forward:
        read = [each for each in node.all_input_nodes if each not in statistics]
        if packet(node) in (aten.full, aten.mul, aten.where) and any(_is_huge(each) for each in node.args):
            found.add(node)
        elif node in statistics or not read:
            continue
        elif packet(node) in SPARSE or (packet(node) in STEEP and not is_softmax(node, owner, statistics)):
            found.add(node)
        elif packet(node) in QUOTIENT and ORIGIN not in node.meta and node.args[QUOTIENT[packet(node)]] in read:
            found.add(node)
        elif packet(node) in {*LINEAR, aten.div} and any(owner[each] in found for each in read):
            found.add(node)
    return found


def reduces(node: fx.Node) -> bool:
    """Whether it gives less than a quarter of the values it reads: torch's measure of what is cheaper saved."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return _reads(node.args[0]) > 4 * _numel(node)
    given = _numel(node) if tensor(node) is not None else max(map(_numel, node.users), default=0)  # var_mean
    return _reads(node) > 4 * given > 0


def _is_huge(constant: object) -> bool:
    return isinstance(constant, (int, float)) and abs(constant) > HUGE


def _reads(node: fx.Node) -> int:
    return sum(_numel(each) for each in node.all_input_nodes)


def _numel(node: fx.Node) -> int:
    value = tensor(node)
    return 0 if value is None else math.prod(hint(size) for size in value.shape)
