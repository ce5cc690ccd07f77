"""A decomposed joint graph and what is wanted of it -> a plan, and the decisions that `encode` writes into the graph.

    planning = Planning(gm, num_fwd_outputs, stock_bytes, Settings(codecs, kernels=True, goal=Goal(budget=10**9)))
    planning.plan, planning.decisions, planning.frontier()

Sensitivity is how much a value's error moves the gradient: the squared relative error of the gradient by that of the
value. Measured (`graphopt.calibrate`) or, where it is not, the same for all values that are encoded, SENSITIVITY in
sum: what six transformer blocks show on average, and up to five times less or twice more.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from graphopt.codecs import MASK, Codec, named
from graphopt.errors import PlanError
from graphopt.graph import hint, module_of, operator_name, source_of
from graphopt.plan import KEEP, RECOMPUTE, Choice, Plan, fingerprint
from graphopt.plan.candidates import Value, values
from graphopt.plan.choose import DEAR, Goal, choose, frontier
from graphopt.plan.estimate import is_heavy, rates, step_seconds
from graphopt.plan.solve import Problem, Solution, saved_bytes

SENSITIVITY = 0.1


@dataclass(frozen=True)
class Settings:
    """What a plan may use, and its goal; `sensitivity` by the name of a node, where it was measured."""

    codecs: tuple[Codec, ...]
    kernels: bool
    goal: Goal
    sensitivity: Mapping[str, float] | None = None


class Planning:
    """A joint graph, decomposed, and the plan made for it; `given` is followed where it is for this graph.

    `states` are bytes that are saved in any case, see `Graph`.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        num_fwd_outputs: int,
        stock: int,
        settings: Settings,
        given: Plan | None = None,
        states: int = 0,
    ) -> None:
        self.gm, self.stock, self.states = gm, stock, states
        follows = given is not None and given.is_for(gm.graph)
        # a plan may recompute what it was made to, whatever is allowed now
        self.problem = problem_of(gm, num_fwd_outputs, stock, replace(settings, kernels=settings.kernels or follows))
        self.problem.graph.states = states
        if given is not None and follows:
            followed = self._described(self._followed(given), given.goal)
            self.plan = given if followed.bytes == given.bytes else followed  # its estimates may rest on measurements
        else:
            if given is not None:
                warnings.warn(f"plan {given.graph} is for another graph: this one is planned anew", stacklevel=3)
            self.plan = self._described(choose(self.problem, stock, settings.goal), str(settings.goal))

    @property
    def decisions(self) -> dict[str, Codec | str]:
        """What becomes of every value, by its node's name: all that backward needs and is not saved is recomputed."""
        followed = self._followed(self.plan)
        found: dict[str, Codec | str] = {node.name: codec or KEEP for node, codec in followed.saved.items()}
        return found | {node.name: RECOMPUTE for node in followed.recomputed}

    def _followed(self, plan: Plan) -> Solution:
        """What a plan comes to in this graph: all that backward needs and is not saved is recomputed.

        Raises PlanError where a choice has no place in the graph, or is not allowed in it.
        """
        values = self.problem.graph.values
        saved = {each.node: each.decision for each in plan.choices if each.decision != RECOMPUTE}
        unknown = [name for name in saved if name not in {node.name for node in values}]
        if unknown:
            raise PlanError(f"plan {plan.graph}: backward does not read {unknown[0]!r} of this graph")
        kept, recomputed, held = dict[fx.Node, Codec | None](), set[fx.Node](), set[fx.Node]()
        queue = [node for node, value in values.items() if value.required]
        while queue:
            node = queue.pop()
            value = values[node]
            if node in kept or node in recomputed or node in held:
                continue
            if value.free:
                held.add(node)
            elif node.name in saved:
                kept[node] = _allowed(plan, value, saved[node.name])
            elif math.isinf(value.recompute):
                raise PlanError(f"plan {plan.graph}: {node.name!r} is not saved, and it cannot be recomputed")
            else:
                recomputed.add(node)
                queue.extend(value.inputs)
        return self.problem.priced(
            {node: kept[node] for node in values if node in kept},
            tuple(node for node in values if node in recomputed),
            tuple(node for node in values if node in held and node.op == "call_function"),
        )

    def frontier(self) -> list[Plan]:
        """The best plans from most bytes to fewest, whatever the goal."""
        return [self._described(each, "frontier") for each in frontier(self.problem, self.stock)]

    def _described(self, solution: Solution, goal: str) -> Plan:
        """A solution as data, in the order of the graph."""
        problem, choices = self.problem, []
        for node, value in problem.graph.values.items():
            if node in solution.saved:
                choices.append(_saved(problem, value, solution.saved[node]))
            elif node in solution.recomputed and is_heavy(node):
                choices.append(_recomputed(problem, value))
        time = solution.seconds / problem.step if problem.step else 0.0
        return Plan(fingerprint(self.gm.graph), goal, tuple(choices), solution.bytes, self.stock, time, solution.error)


def problem_of(gm: fx.GraphModule, num_fwd_outputs: int, stock: int, settings: Settings) -> Problem:
    rate = rates(gm.graph)
    found = values(gm, num_fwd_outputs, settings.codecs, rate, kernels=settings.kernels)
    step = max(step_seconds(gm.graph, rate), 1e-9)  # of a graph that writes nothing out
    measured = settings.sensitivity
    if measured is not None:
        share = max(measured.values(), default=SENSITIVITY)  # what was not measured counts as the most sensitive
        return Problem(found, step, rate, lambda value: measured.get(value.node.name, share))
    unknown = Problem(found, step, rate, lambda value: 0.0)
    smallest = unknown.solve(DEAR * step / max(stock, 1))
    share = SENSITIVITY / max(1, sum(codec is not None for codec in smallest.saved.values()))
    return Problem(found, step, rate, lambda value: share)


def _allowed(plan: Plan, value: Value, decision: str) -> Codec | None:
    """The codec of a decision; one for a mask is for masks only, and all others are for what may be encoded."""
    if decision == KEEP:
        return None
    codec, is_mask = named(decision), value.node.meta["val"].dtype == torch.bool
    if (value.raw and not (is_mask and codec is MASK)) or not value.savable or is_mask != (codec is MASK):
        why = value.raw or "it is for masks"
        raise PlanError(f"plan {plan.graph}: {value.node.name!r} cannot be saved as {decision}: {why}")
    return codec


def _saved(problem: Problem, value: Value, codec: Codec | None) -> Choice:
    time = problem.codec_seconds(value, codec) / problem.step if problem.step else 0.0
    error = problem.squared_error(value, codec) ** 0.5
    why = f"its error of {codec.error:.3g} moves the gradient by {error:.2g}" if codec else value.raw
    why = why or "no codec is worth its time and error here, or the time slack is spent"
    return Choice(**_about(value), decision=codec.name if codec else KEEP, bytes=value.bytes,
                  bytes_now=saved_bytes(value, codec), time=time, error=error, why=why)  # fmt: skip


def _recomputed(problem: Problem, value: Value) -> Choice:
    time = value.recompute / problem.step if problem.step else 0.0
    values = problem.graph.values
    size = value.bytes or sum(values[user].bytes for user in value.node.users if user in values)
    why = f"running it again takes {time:.1%} of a step"
    return Choice(**_about(value), decision=RECOMPUTE, bytes=size, bytes_now=0, time=time, error=0.0, why=why)


def _about(value: Value) -> dict[str, Any]:
    node, shown = value.node, value.node.meta["val"]
    first = shown[0] if isinstance(shown, (tuple, list)) else shown
    return {
        "node": node.name, "operator": operator_name(node),
        "module": module_of(node), "source": source_of(node), "shape": tuple(hint(size) for size in first.shape),
        "dtype": str(first.dtype).removeprefix("torch."),
    }  # fmt: skip
