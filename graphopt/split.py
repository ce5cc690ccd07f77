"""split(): a joint graph -> forward and backward, rewritten wherever that saves bytes.

share_norm, cut                          four ways; of those that save fewest bytes the first:
                                         rewritten, z preferred · rewritten · as it was · as it was, cut as stock
approx_activation, if asked for, cut     taken back unless it saves bytes
pack_mask, cut                           taken back unless it saves bytes
plan, encode, cut                        where a preset or an option asks for a plan
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import fx

from graphopt import passes
from graphopt.errors import PassError, PlanError
from graphopt.graph import copy
from graphopt.lowering.decompose import decompose
from graphopt.options import Options
from graphopt.partition import (
    CUT,
    HEURISTICS,
    STOCK,
    Cut,
    Halves,
    crossing_bytes,
    cut,
    cut_as_tagged,
    has_preferred,
    keep_overwritten,
    mark,
    merge_equal,
    prefer,
    random_state_bytes,
)
from graphopt.pipeline import Pass, PassRecord, bind, blamed, run, take_back
from graphopt.plan.make import Planning

# bytes: a graph for which stock saves less, such as a loss behind a graph break, is not held to a budget out of reach
SLIGHT = 2**20


@dataclass(frozen=True)
class Attempt:
    """One way to split a joint graph; `decomposed` is `canonical` with its operators spelt out, as it was cut."""

    canonical: fx.GraphModule
    decomposed: fx.GraphModule
    halves: Halves
    bytes: int
    heuristics: Mapping[str, object]
    rewritten: bool = True


class Split(NamedTuple):
    """A joint graph in two, what each pass did, and the plan where there is one."""

    forward: fx.GraphModule
    backward: fx.GraphModule
    records: list[PassRecord]
    planning: Planning | None = None


def split(gm: fx.GraphModule, joint_inputs: Sequence[object], options: Options, **kwargs: Any) -> Split:
    """Rewrite a joint graph, cut it, rewrite what the cut saves, cut again. A step that does not pay is taken back."""
    outputs = kwargs["num_fwd_outputs"]
    heuristics = HEURISTICS[options.value("recompute")]

    def attempt(
        canonical: fx.GraphModule,
        heuristics: Mapping[str, object],
        rewritten: bool = True,
        decomposed: fx.GraphModule | None = None,
    ) -> Attempt:
        decomposed = decomposed or run(copy(canonical), joint_inputs, (decompose,))[0]
        halves = cut(copy(decomposed), joint_inputs, heuristics, **kwargs)
        return Attempt(canonical, decomposed, halves, crossing_bytes(halves[0], outputs), heuristics, rewritten)

    def if_it_pays(best: Attempt, gm: fx.GraphModule, each: Sequence[Pass], decomposed: bool) -> Attempt:
        gm, more = run(gm, joint_inputs, each, options.disable)
        records.extend(more)
        if not any(record.fired for record in more):
            return best
        other = attempt(gm, best.heuristics, decomposed=gm if decomposed else None)
        if other.bytes < best.bytes:
            return other
        take_back(more, "it saves no bytes: something else needs the tensor as it is")
        return best

    gm = keep_overwritten(gm)
    plain = attempt(copy(gm), heuristics, rewritten=False)
    gm, records = run(gm, joint_inputs, passes.JOINT, options.disable)
    changed = any(record.fired for record in records)
    attempts = [attempt(gm, heuristics), plain] if changed else [plain]
    if has_preferred(gm):
        attempts.insert(0, attempt(prefer(gm), heuristics, decomposed=prefer(attempts[0].decomposed)))
    if heuristics is not STOCK:
        attempts.append(attempt(plain.canonical, STOCK, rewritten=False, decomposed=plain.decomposed))
    best = min(attempts, key=lambda each: each.bytes)
    if not best.rewritten:
        take_back(records, "the graph as it was can be cut for fewer bytes")

    if options.code is not None:
        gm = copy(best.canonical)
        gm.meta[CUT] = Cut(best.halves, outputs)
        best = if_it_pays(best, gm, [bind(each, scheme=options.code) for each in passes.APPROXIMATE], decomposed=False)
    mark(best.decomposed, best.halves, outputs)
    best = if_it_pays(best, copy(best.decomposed), passes.AFTER_CUT, decomposed=True)
    if not options.planned:
        return Split(*best.halves, records)
    stock = attempts[-1].bytes  # that of the plain graph, cut as stock
    settings = options.settings(stock)
    if best.bytes <= settings.goal.budget < math.inf:
        return Split(*best.halves, records)
    graph = merge_equal(copy(best.decomposed))
    states = random_state_bytes(best.halves[0], outputs)
    try:
        with blamed("plan", graph):
            planning = Planning(graph, outputs, stock, settings, options.plan, states)
    except PlanError:
        if options.code is not None and options.plan is None:  # codes may take what the plan would have made anew
            return split(plain.canonical, joint_inputs, replace(options, approx_activation="off"), **kwargs)
        if stock >= SLIGHT or options.memory_budget is None or options.memory_budget > 1 or options.plan is not None:
            raise
        return Split(*best.halves, records)
    bound = [bind(each, decisions=planning.decisions, num_fwd_outputs=outputs) for each in passes.PLANNED]
    gm, more = run(copy(planning.gm), joint_inputs, bound)
    halves = cut_as_tagged(gm, joint_inputs, **kwargs)
    found = crossing_bytes(halves[0], outputs)
    if found > settings.goal.budget:
        raise PassError(f"the plan saves {planning.plan.bytes:,} bytes, but its graph {found:,}: a bug of the planner")
    if found >= best.bytes and options.memory_budget is None and options.plan is None:
        take_back(more, "it saves no bytes: the exact graph saves no more")
        return Split(*best.halves, [*records, *more])
    return Split(*halves, [*records, *more], planning)
