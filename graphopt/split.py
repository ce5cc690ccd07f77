"""split(): a joint graph -> forward and backward, rewritten wherever that saves bytes.

share_norm, cut                          four ways; of those that save fewest bytes the first:
                                         rewritten, z preferred · rewritten · as it was · as it was, cut as stock
approx_activation, if asked for, cut     taken back unless it saves bytes
pack_mask, cut                           taken back unless it saves bytes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from graphopt import passes
from graphopt.graph import copy
from graphopt.lowering.decompose import decompose
from graphopt.options import Options
from graphopt.partition import CUT, HEURISTICS, STOCK, Cut, Halves, crossing_bytes, cut, has_preferred, mark, prefer
from graphopt.pipeline import Pass, PassRecord, bind, run, take_back


@dataclass(frozen=True)
class Attempt:
    """One way to split a joint graph; `decomposed` is `canonical` with its operators spelt out, as it was cut."""

    canonical: fx.GraphModule
    decomposed: fx.GraphModule
    halves: Halves
    bytes: int
    heuristics: Mapping[str, object]
    rewritten: bool = True


def split(
    gm: fx.GraphModule, joint_inputs: Sequence[object], options: Options, **kwargs: Any
) -> tuple[fx.GraphModule, fx.GraphModule, list[PassRecord]]:
    """Rewrite a joint graph, cut it, rewrite what the cut saves, cut again. A step that does not pay is taken back."""
    outputs = kwargs["num_fwd_outputs"]
    heuristics = HEURISTICS[options.recomputed]

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

    plain = attempt(copy(gm), heuristics, rewritten=False)
    gm, records = run(gm, joint_inputs, passes.JOINT, options.disable)
    attempts = [attempt(gm, heuristics), plain]
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
    return *best.halves, records
