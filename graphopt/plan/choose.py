"""A goal -> a plan: the price of a byte at which the least is saved within limits, or a budget is just met.

    least bytes     within a tolerance (of the codecs) and a time slack
    least cost      within a memory budget: of the best plan for each tolerance, the one with the least sum of time (as
                    a fraction of a step) and three times the error (of the gradient)

The best plans at all prices are the lower hull of (bytes, cost); a budget lies between two of them, far between where
layers are alike, since one price turns all of them. Prices that rise or fall along the graph turn them one by one. What
a budget leaves over then goes into finer codecs, one tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import fx

from graphopt.codecs import Codec
from graphopt.errors import PlanError
from graphopt.plan.solve import Problem, Solution, saved_bytes

STEPS = 10  # of bisection: a price to 1 part in 1,000 of its range on a logarithmic scale
# a percent of gradient error, which training has to average away, against a percent of time
ERROR_WEIGHT = 3
TILTS = 0.0, 1.0, -1.0, 2.0  # of prices
POINTS = 16  # prices of a frontier
CHEAP, DEAR = 1e-5, 1e5  # prices, in units of (seconds of a step) / (bytes of stock)


@dataclass(frozen=True)
class Goal:
    """What a plan is for. `time_slack` is the fraction of a step it may cost, `budget` the bytes it may save."""

    time_slack: float = math.inf
    budget: float = math.inf

    def __str__(self) -> str:
        if self.budget < math.inf:
            text = f"at most {int(self.budget):,} bytes, at the least cost"
            return text + (f", in {self.time_slack:.0%} more time" if self.time_slack < math.inf else "")
        return f"least bytes, in {self.time_slack:.0%} more time"


def choose(problem: Problem, stock: int, goal: Goal) -> Solution:
    """The best solution for a goal. Raises PlanError with the least that can be reached where none meets it."""
    unit = problem.step / max(stock, 1)
    limit = goal.time_slack * problem.step

    if goal.budget == math.inf:
        least = problem.solve(DEAR * unit)
        if least.seconds <= limit:
            return least
        cheapest = problem.solve(CHEAP * unit)
        return _bisect(problem, unit, lambda each: each.seconds <= limit, cheapest, up=True)
    found = list(_within_budget(problem, stock, goal.budget))
    if not found:  # at any error
        problem = replace(problem, blur=True)
        found = list(_within_budget(problem, stock, goal.budget))
    if found and all(each.seconds > limit for each in found):  # by time alone
        fast = replace(problem, sensitivity=lambda value: 0.0)
        found += [each for tilt in TILTS for each in _within_budget(fast, stock, goal.budget, tilt)]
        found = [problem.priced(each.saved, each.recomputed, each.held) for each in found]
    if not found:
        least = problem.solve(DEAR * unit)
        share = math.ceil(1000 * least.bytes / max(stock, 1)) / 1000
        returned = sum(problem.graph.values[node].bytes for node in least.held)
        raise PlanError(
            f"option 'memory_budget': {int(goal.budget):,} bytes cannot be reached; the least is {least.bytes:,} "
            f"bytes, {share:.3f} of the {stock:,} that stock Inductor saves"
            + (f"; {returned:,} of them are what the model returns" if returned else "")
        )
    in_time = [each for each in found if each.seconds <= limit]
    if not in_time:
        fastest = min(each.seconds for each in found) / problem.step
        raise PlanError(
            f"options 'memory_budget' and 'time_slack': {int(goal.budget):,} bytes take an estimated {fastest:.1%} "
            f"more time, which is more than {goal.time_slack:.1%}"
        )
    best = min(in_time, key=lambda each: cost(problem, each))
    limited = replace(problem, tolerance=max((codec.error for codec in best.saved.values() if codec), default=0.0))
    tilted = [each for tilt in TILTS[1:] for each in _within_budget(limited, stock, goal.budget, tilt)]
    return min((each for each in (best, *tilted) if each.seconds <= limit), key=lambda each: cost(problem, each))


def _within_budget(problem: Problem, stock: int, budget: float, tilt: float = 0.0) -> Iterator[Solution]:
    """The plan of least cost within a budget for each tolerance, from the strictest that can reach it."""
    unit = problem.step / max(stock, 1)
    for tolerance in _tolerances(problem)[-1:] if tilt else _tolerances(problem):
        limited = replace(problem, tolerance=tolerance)
        least = limited.solve(DEAR * unit)
        if least.bytes > budget:
            continue
        found = _bisect(limited, unit, lambda each: each.bytes <= budget, least, tilt=tilt)
        yield found
        yield refine(limited, found, budget)


def _bisect(
    problem: Problem,
    unit: float,
    good: Callable[[Solution], bool],
    found: Solution,
    up: bool = False,
    tilt: float = 0.0,
) -> Solution:
    """A good solution near the lowest price of one, or with `up` the highest; `found` is one at the other end."""
    low, high = math.log(CHEAP), math.log(DEAR)
    for _ in range(STEPS):
        middle = (low + high) / 2
        tried = problem.solve(math.exp(middle) * unit, tilt)
        if good(tried):
            found = tried
        if good(tried) == up:
            low = middle
        else:
            high = middle
    return found


def refine(problem: Problem, found: Solution, budget: float) -> Solution:
    """Spend the bytes that a budget leaves on finer codecs: each time where they lessen the error most."""
    saved: dict[fx.Node, Codec | None] = dict(found.saved)
    left = budget - found.bytes
    while True:
        steps = [step for step in _finer(problem, saved) if step[1] <= left]
        if not steps:
            return problem.priced(saved, found.recomputed, found.held)
        node, more, codec, _ = max(steps, key=lambda step: step[3] / step[1])
        saved[node] = codec
        left -= more


def _finer(problem: Problem, saved: Mapping[fx.Node, Codec | None]) -> Iterator[tuple[fx.Node, int, Codec, float]]:
    for node, codec in saved.items():
        if codec is None:
            continue
        value = problem.graph.values[node]
        for other in problem.codecs(value):
            gain = problem.squared_error(value, codec) - problem.squared_error(value, other)
            more = saved_bytes(value, other) - saved_bytes(value, codec)
            if gain > 0 and more > 0:
                yield node, more, other, gain


def frontier(problem: Problem, stock: int) -> list[Solution]:
    """Plans from most bytes to fewest, of those found at prices from cheap to dear with each set of codecs.

    None saves more than stock; each costs more than the one before it, and less than any that saves no more.
    """
    unit = problem.step / max(stock, 1)
    step = (math.log(DEAR) - math.log(CHEAP)) / (POINTS - 1)
    found = [
        replace(problem, tolerance=tolerance).solve(CHEAP * math.exp(i * step) * unit)
        for tolerance in _tolerances(problem)
        for i in range(POINTS)
    ]
    best: list[Solution] = []
    for each in sorted(found, key=lambda each: (each.bytes, cost(problem, each))):
        if each.bytes <= stock and (not best or cost(problem, each) < cost(problem, best[-1])):
            best.append(each)
    return best[::-1]


def cost(problem: Problem, found: Solution) -> float:
    """What a plan within a budget is chosen by: time, as a fraction of a step, and error."""
    return found.seconds / problem.step + ERROR_WEIGHT * found.error


def _tolerances(problem: Problem) -> list[float]:
    """The errors of the codecs, from the finest; 0 if there is none."""
    return sorted({codec.error for value in problem.graph.values.values() for codec in problem.codecs(value)}) or [0.0]
