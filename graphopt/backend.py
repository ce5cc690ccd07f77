"""The backends torch.compile finds by name.

forward graph                  canonicalize
─ AOTAutograd ─▶ joint graph   share_norm, cut
                               approx_activation if asked for, cut again if it fired
                               pack_mask, cut again if it fired
─▶ forward, backward graphs    lower
─▶ Inductor, unmodified (`lowmem`), or run as they stand, node by node (`lowmem_eager`)
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor_config
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomPartitionerFn

from graphopt import passes
from graphopt.graph import copy
from graphopt.lowering.decompose import decompose, tracing_table
from graphopt.options import Options, parse
from graphopt.partition import HEURISTICS, STOCK, Halves, crossing_bytes, cut, mark, mark_freed, prefer, wishes
from graphopt.passes.approx_activation import ACTIVATIONS
from graphopt.pipeline import PassRecord, bind, run, take_back


def lowmem(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend of `torch.compile(model, backend="lowmem")`: Inductor, with fewer bytes kept for backward.

    `mode` is one of Inductor's; `options` may hold graphopt's own keys (see `Options`) beside Inductor's. A graph
    without gradients is compiled as under Inductor. Raises OptionsError for options that are not allowed, PassError
    for a bug in a pass.
    """
    own, patches = parse(options)
    patches = {**(list_mode_options(mode) if mode else {}), **patches, "custom_partitioner_fn": Partitioner(own)}
    gm, _ = run(gm, example_inputs, passes.FORWARD, own.disable)
    with inductor_config.patch(patches):
        table = tracing_table()
    return compile_fx(gm, example_inputs, _inner_compile, patches, table)  # type: ignore[return-value]


def _reset() -> None:
    from torch._inductor.cudagraph_trees import reset_cudagraph_trees

    reset_cudagraph_trees()


lowmem.reset = _reset  # type: ignore[attr-defined]  # what torch._dynamo.reset() calls


def lowmem_eager(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """`lowmem` without Inductor: the same passes and cut, the graphs run node by node. For tests and debugging."""
    own, _ = parse(options)
    gm, _ = run(gm, example_inputs, passes.FORWARD, own.disable)
    compiler = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=Partitioner(own),
        decompositions=tracing_table(),
    )
    return compiler(gm, example_inputs)


@dataclass(frozen=True)
class Attempt:
    """One way to split a joint graph: the graph with its canonical operators whole, spelt out, and cut."""

    whole: fx.GraphModule
    joint: fx.GraphModule
    halves: Halves
    bytes: int


def split(
    gm: fx.GraphModule, joint_inputs: Sequence[object], options: Options, **kwargs: Any
) -> tuple[fx.GraphModule, fx.GraphModule, list[PassRecord]]:
    """Rewrite a joint graph, cut it, rewrite what the cut saves, cut again. A step that does not pay is taken back."""
    rules, outputs = HEURISTICS[str(options.recompute)], kwargs["num_fwd_outputs"]

    def attempt(
        whole: fx.GraphModule, rules: Mapping[str, object] = rules, joint: fx.GraphModule | None = None
    ) -> Attempt:
        joint = joint or run(copy(whole), joint_inputs, (decompose,))[0]
        halves = cut(copy(joint), joint_inputs, rules, **kwargs)
        return Attempt(whole, joint, halves, crossing_bytes(halves[0], outputs))

    plain = attempt(copy(gm))
    gm, records = run(gm, joint_inputs, passes.JOINT, options.disable)
    best = attempt(gm)
    if wishes(gm) and (other := attempt(prefer(gm), rules, prefer(best.joint))).bytes <= best.bytes:
        best = other
    if best.bytes > plain.bytes:
        take_back(records, "the graph as it was can be cut for fewer bytes")
        best = plain
    if rules is not STOCK and (stock := attempt(plain.whole, STOCK, plain.joint)).bytes < best.bytes:
        take_back(records, "stock Inductor saves fewer bytes of this graph")
        best, rules = stock, STOCK

    if options.approx_activation:
        mark_freed(best.whole, ACTIVATIONS, best.halves, outputs)
        codes = [bind(each, scheme=options.approx_activation) for each in passes.CODES]
        gm, more = run(copy(best.whole), joint_inputs, codes, options.disable)
        records += more
        if any(record.fired for record in more):
            if (coded := attempt(gm, rules)).bytes < best.bytes:
                best = coded
            else:
                take_back(more, "it saves no bytes: the cut keeps others in their place")

    mark(best.joint, best.halves, outputs)
    gm, more = run(best.joint, joint_inputs, passes.SAVED, options.disable)
    records += more
    if any(record.fired for record in more):
        packed = cut(gm, joint_inputs, rules, **kwargs)
        if crossing_bytes(packed[0], outputs) < best.bytes:
            return *packed, records
        take_back(more, "it saves no bytes: something else needs the tensor as it is")
    return *best.halves, records


class Partitioner(CustomPartitionerFn):
    """Joint passes, cut, cut passes: what AOTAutograd calls to split a joint graph. Picklable; a key of the caches."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        forward, backward, _ = split(gm, joint_inputs, self.options, **kwargs)
        return run(forward, (), passes.HALVES)[0], run(backward, (), passes.HALVES)[0]

    def uuid(self) -> str:
        return f"{_sources()}-{self.options!r}"


def _inner_compile(gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Any:
    # a graph without gradients never met the partitioner, so its canonical operators are still whole; once spelt out,
    # Inductor's own table is the right one, and the only one that its cache has a key for
    kwargs.pop("get_decomp_fn", None)
    gm, _ = run(gm, example_inputs, (decompose,))
    return compile_fx_inner(gm, example_inputs, **kwargs)


@cache
def _sources() -> str:
    """A hash of graphopt's sources and of what they run on: two that differ never share a compiled graph."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    digest.update(f"{torch.__version__} {sys.version}".encode())
    return digest.hexdigest()
