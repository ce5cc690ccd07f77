"""Which values to save, how, and which to recompute: a minimum cut, and the price of a byte that meets a goal.

For a price `p` of a byte the best plan minimises, over all ways to give backward what it reads,

    seconds + error^2 * seconds of a step + p * bytes.

That is a minimum cut. Every value v is an edge v.in -> v.out whose capacity is its cheapest way to be saved; an edge
source -> v.in costs its recomputation, which needs its inputs: input.out -> v.in is infinite; what backward reads is
tied to the sink. Cut edges v.in -> v.out are saved values, cut edges source -> v.in recomputed ones. A byte more dear
saves fewer bytes, so bisection finds the price at which a budget is met.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
from networkx.algorithms.flow import boykov_kolmogorov
from torch import fx

from graphopt.codecs import Codec
from graphopt.plan.candidates import Graph, Value
from graphopt.plan.estimate import Rates
from graphopt.plan.softmax import FINE

SOURCE, SINK = "source", "sink"
PRECISION = 1e15  # whole numbers, in units of a femtosecond: flows of floats never quite fill an edge


@dataclass(frozen=True)
class Solution:
    """Nodes saved, with their codec or None, nodes recomputed, and nodes read that the caller keeps in any case."""

    saved: Mapping[fx.Node, Codec | None]
    recomputed: tuple[fx.Node, ...]
    held: tuple[fx.Node, ...]
    bytes: int
    seconds: float
    error: float


@dataclass
class Problem:
    """The values of one joint graph, the time of a step, and how much each value's error moves the gradient.

    `sensitivity` is, for each value, the squared relative error of the gradient by the squared relative error of the
    value; `tolerance` is the error that a codec may have. With `blur` what needs FINE bits may be recomputed from less.
    """

    graph: Graph
    step: float
    rate: Rates
    sensitivity: Callable[[Value], float]
    tolerance: float = math.inf
    blur: bool = False

    def codecs(self, value: Value) -> Iterator[Codec]:
        """The codecs within the tolerance that take fewer bytes than the value itself."""
        for codec in value.codecs:
            if codec.error <= self.tolerance and codec.bytes(value.numel) < value.bytes:
                yield codec

    @cached_property
    def coarse(self) -> bool:
        """Whether anything may be encoded in fewer than FINE bits, masks aside, which lose nothing."""
        codecs = (codec for value in self.graph.values.values() for codec in self.codecs(value))
        return any(codec.bits < FINE and codec.error for codec in codecs)

    def recompute(self, value: Value) -> float:
        """The time of computing a value anew, infinite where it might be from what a coarse codec left."""
        return math.inf if self.coarse and value.needs_fine and not self.blur else value.recompute

    def solve(self, price: float, tilt: float = 0.0) -> Solution:
        """The best plan where a byte costs `price` seconds.

        With a `tilt` it costs more at the end of the graph than at its start, by a factor of e^tilt, or less.
        """
        network = nx.DiGraph()
        network.add_nodes_from((SOURCE, SINK))
        places = range(len(self.graph.values))
        prices = [price * math.exp(tilt * (place / len(places) - 0.5)) for place in places]
        ways = {node: self._way(value, each) for (node, value), each in zip(self.graph.values.items(), prices)}
        for node, value in self.graph.values.items():
            before, behind = (node.name, "in"), (node.name, "out")
            cost, _ = ways[node]
            _edge(network, before, behind, cost)
            if value.inputs or not value.free:
                _edge(network, SOURCE, before, self.recompute(value))
            else:
                _edge(network, SOURCE, before, math.inf)
            for each in value.inputs:
                _edge(network, (each.name, "out"), before, math.inf)
            if value.required:
                _edge(network, behind, SINK, math.inf)
        _, (kept, _) = nx.minimum_cut(network, SOURCE, SINK, flow_func=boykov_kolmogorov)
        saved, recomputed, held = dict[fx.Node, Codec | None](), list[fx.Node](), list[fx.Node]()
        for node, value in self.graph.values.items():
            if (node.name, "out") in kept:
                continue
            if (node.name, "in") not in kept:
                recomputed.append(node)
            elif not value.free:
                saved[node] = ways[node][1]
            elif node.op == "call_function":
                held.append(node)
        return self.priced(saved, tuple(recomputed), tuple(held))

    def priced(
        self, saved: Mapping[fx.Node, Codec | None], recomputed: tuple[fx.Node, ...], held: tuple[fx.Node, ...]
    ) -> Solution:
        values = self.graph.values
        time = sum(values[node].recompute for node in recomputed)
        time += sum(self.codec_seconds(values[node], codec) for node, codec in saved.items())
        error = sum(self.squared_error(values[node], codec) for node, codec in saved.items())
        size = sum(saved_bytes(values[node], codec) for node, codec in saved.items())
        size += sum(values[node].bytes for node in held) + self.graph.states
        return Solution(saved, recomputed, held, size, time, math.sqrt(error))

    def squared_error(self, value: Value, codec: Codec | None) -> float:
        return self.sensitivity(value) * codec.error**2 if codec else 0.0

    def codec_seconds(self, value: Value, codec: Codec | None) -> float:
        """Encoding and decoding: what they move beyond the value itself, or their arithmetic if that takes longer."""
        if codec is None:
            return 0.0
        moved = 2 * codec.bytes(value.numel) + value.bytes * value.decoded_to_memory
        return max(moved / self.rate.bandwidth, value.numel / self.rate.codec)

    def _way(self, value: Value, price: float) -> tuple[float, Codec | None]:
        """The cheapest way to save a value."""
        if not value.savable:
            return math.inf, None
        if value.free:
            return 0.0, None
        ways: list[tuple[float, Codec | None]] = [(price * value.bytes, None)]
        for codec in self.codecs(value):
            cost = self.codec_seconds(value, codec) + self.squared_error(value, codec) * self.step
            ways.append((cost + price * codec.bytes(value.numel), codec))
        return min(ways, key=lambda way: way[0])


def saved_bytes(value: Value, codec: Codec | None) -> int:
    return codec.bytes(value.numel) if codec else value.bytes


def _edge(network: nx.DiGraph, start: object, end: object, cost: float) -> None:
    if math.isinf(cost):
        network.add_edge(start, end)  # without a capacity it is infinite
    else:
        network.add_edge(start, end, capacity=round(cost * PRECISION))
