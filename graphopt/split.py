"""split(): a joint graph -> forward and backward, rewritten wherever that saves bytes.

share_norm, choose                       four ways; of those that save fewest bytes the first:
                                         rewritten, z preferred · rewritten · as it was · as it was, cut as stock
approx_activation, if asked for, choose  taken back unless it saves bytes
pack_mask, choose                        taken back unless it saves bytes
plan, encode, or none                    where a preset or an option asks for a plan
cut

To choose is to find out what a cut would save.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import fx

from graphopt import passes
from graphopt.crossing import CUT, Crossing, Cut, Halves, crossing_of, mark
from graphopt.cse import merge_equal
from graphopt.errors import PassError, PlanError
from graphopt.graph import copy
from graphopt.lowering.decompose import decompose
from graphopt.options import Options
from graphopt.partition import (
    HEURISTICS,
    STOCK,
    choose,
    cut,
    cut_as_tagged,
    has_preferred,
    keep_overwritten,
    prefer,
)
from graphopt.pipeline import Pass, PassRecord, bind, blamed, run, take_back
from graphopt.plan.make import Planning

# bytes: a graph for which stock saves less, such as a loss behind a graph break, is not held to a budget out of reach
SLIGHT = 2**20
REPLANNED = 3  # times that a plan is made, where the cut of its graph saves more than it counts


@dataclass(frozen=True)
class Attempt:
    """One way to split a joint graph, and what it saves; `decomposed` is `canonical` with its operators spelt out."""

    canonical: fx.GraphModule
    decomposed: fx.GraphModule
    crossing: Crossing
    heuristics: dict[str, object]
    rewritten: bool = True

    @property
    def bytes(self) -> int:
        return self.crossing.bytes


class Split(NamedTuple):
    """A joint graph in two, what each pass did, and the plan where there is one."""

    forward: fx.GraphModule
    backward: fx.GraphModule
    records: list[PassRecord]
    planning: Planning | None = None


def split(gm: fx.GraphModule, joint_inputs: Sequence[object], options: Options, **kwargs: Any) -> Split:
    """Rewrite a joint graph, cut it, rewrite what the cut saves, cut again. A step that does not pay is taken back.

    `kwargs` are those of a torch partitioner.
    """
    gm = keep_overwritten(gm)
    try:
        return _Splitting(joint_inputs, options, kwargs).run(gm)
    except PlanError:
        if options.code is None or options.plan is not None:
            raise
        # codes may take what the plan would have made anew
        return _Splitting(joint_inputs, replace(options, approx_activation="off"), kwargs).run(gm)


class _Splitting:
    """How one joint graph is split."""

    def __init__(self, joint_inputs: Sequence[object], options: Options, kwargs: dict[str, Any]) -> None:
        self.joint_inputs, self.options, self.kwargs = joint_inputs, options, kwargs
        self.outputs: int = kwargs["num_fwd_outputs"]

    def run(self, gm: fx.GraphModule) -> Split:
        best, stock, records = self.exact(gm)
        planned, more = self.planned(best, stock) if self.options.planned else (None, [])
        records = [*records, *more]
        return planned._replace(records=records) if planned is not None else Split(*self.halves(best), records)

    def spelt_out(self, canonical: fx.GraphModule) -> fx.GraphModule:
        return merge_equal(run(copy(canonical), self.joint_inputs, (decompose,))[0])

    def attempt(
        self,
        canonical: fx.GraphModule,
        decomposed: fx.GraphModule,
        heuristics: dict[str, object],
        rewritten: bool = True,
    ) -> Attempt:
        heuristics = heuristics | {"cse": False}  # merged already
        found = choose(decomposed, self.joint_inputs, heuristics, **self.kwargs)
        return Attempt(canonical, decomposed, found, heuristics, rewritten)

    def halves(self, best: Attempt) -> Halves:
        return cut(copy(best.decomposed), self.joint_inputs, best.heuristics, **self.kwargs)

    def exact(self, gm: fx.GraphModule) -> tuple[Attempt, int, list[PassRecord]]:
        """The way that saves fewest bytes, with codes and masks packed; stock's bytes; and what passes did."""
        heuristics = HEURISTICS[self.options.value("recompute")]
        plain = self.spelt_out(gm)
        stock = self.attempt(gm, plain, STOCK, rewritten=False)
        gm, records = run(copy(gm), self.joint_inputs, passes.JOINT, self.options.disable)
        tried: list[Attempt] = []
        if any(record.fired for record in records):
            decomposed = self.spelt_out(gm)
            if has_preferred(decomposed):
                tried.append(self.attempt(prefer(gm), prefer(decomposed), heuristics))
            tried.append(self.attempt(gm, decomposed, heuristics))
        if heuristics is not STOCK:
            tried.append(self.attempt(stock.canonical, plain, heuristics, rewritten=False))
        best = min([*tried, stock], key=lambda each: each.bytes)
        if not best.rewritten:
            take_back(records, "the graph as it was can be cut for fewer bytes")

        if self.options.code is not None:
            gm = copy(best.canonical)
            gm.meta[CUT] = Cut(self.halves(best), self.outputs)
            codes = [bind(each, scheme=self.options.code) for each in passes.APPROXIMATE]
            best = self.if_it_pays(best, gm, codes, records, self.spelt_out)
        mark(best.decomposed, best.crossing)
        best = self.if_it_pays(best, copy(best.decomposed), passes.AFTER_CUT, records, merge_equal)
        return best, stock.bytes, records

    def if_it_pays(
        self,
        best: Attempt,
        gm: fx.GraphModule,
        each: Sequence[Pass],
        records: list[PassRecord],
        decomposed: Callable[[fx.GraphModule], fx.GraphModule],
    ) -> Attempt:
        gm, more = run(gm, self.joint_inputs, each, self.options.disable)
        records.extend(more)
        if not any(record.fired for record in more):
            return best
        other = self.attempt(gm, decomposed(gm), best.heuristics, best.rewritten)
        if other.bytes < best.bytes:
            return other
        take_back(more, "it saves no bytes: something else needs the tensor as it is")
        return best

    def planned(self, best: Attempt, stock: int) -> tuple[Split | None, list[PassRecord]]:
        """The graph with a plan in it, none where the exact graph is as good; and what passes did."""
        options, settings = self.options, self.options.settings(stock)
        graph = copy(best.decomposed)
        followed = options.plan is not None and options.plan.is_for(graph.graph)
        if not followed and best.bytes <= settings.goal.budget < math.inf:
            return None, []
        states = best.crossing.random_state_bytes
        for _ in range(REPLANNED):
            try:
                with blamed("plan", graph):
                    planning = Planning(graph, self.outputs, stock, settings, options.plan, states)
            except PlanError as error:
                fraction = options.memory_budget is not None and options.memory_budget <= 1
                if options.code is None and options.plan is None and fraction and stock < SLIGHT:
                    return None, []
                more = states - best.crossing.random_state_bytes
                if not more:
                    raise
                raise PlanError(
                    f"{error}. {more:,} of them are what torch's cut of one plan saved between checkpointed regions; "
                    f"without a plan {best.bytes:,} are saved in all"
                ) from None
            bound = [bind(each, decisions=planning.decisions, num_fwd_outputs=self.outputs) for each in passes.PLANNED]
            gm, records = run(copy(planning.gm), self.joint_inputs, bound)
            halves = cut_as_tagged(gm, self.joint_inputs, **self.kwargs)
            found, planned = crossing_of(halves, self.outputs).bytes, planning.plan.bytes
            if found <= settings.goal.budget:
                break
            if followed:
                raise PlanError(
                    f"option 'plan': {planning.plan.graph} saves {found:,} bytes, and 'memory_budget' allows "
                    f"{int(settings.goal.budget):,}"
                )
            states += max(0, found - planned)  # what torch's cut saves between two checkpointed regions
        else:
            raise PassError(f"the plan saves {planned:,} bytes, but its graph {found:,}: a bug of the planner")
        if found >= best.bytes and options.memory_budget is None and options.plan is None:
            take_back(records, "it saves no bytes: the exact graph saves no more")
            return None, records
        return Split(*halves, records, planning), records
