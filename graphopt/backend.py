"""The backends torch.compile finds by name.

forward graph                  canonicalize
─ AOTAutograd ─▶ joint graph   split: share_norm, cut, approx_activation if asked for, pack_mask, plan, encode
─▶ forward, backward graphs    lower, and in forward write_residuals
─▶ Inductor, which finds lowerings of ours (`lowmem`), or run as they stand, node by node (`lowmem_eager`)
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
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
from graphopt.compiling import kernels_ahead, no_empty_tails, quick_links, seeds_by_argument, young_garbage_only
from graphopt.loud import loud
from graphopt.lowering.decompose import decompose, tracing_table
from graphopt.options import Options, parse
from graphopt.pipeline import run
from graphopt.split import split


@loud
@young_garbage_only
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
    return compile_fx(gm, example_inputs, _inner_compile, patches, tracing_table(patches))  # type: ignore[return-value]


def _reset() -> None:
    from torch._inductor.cudagraph_trees import reset_cudagraph_trees

    reset_cudagraph_trees()


lowmem.reset = _reset  # type: ignore[attr-defined]  # what torch._dynamo.reset() calls


@loud
@young_garbage_only
def lowmem_eager(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """`lowmem` without Inductor: the same passes and cut, the graphs run node by node. For tests and debugging."""
    own, patches = parse(options)
    gm, _ = run(gm, example_inputs, passes.FORWARD, own.disable)
    with inductor_config.patch(patches):
        compiler = aot_autograd(
            fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
            partition_fn=Partitioner(own),
            decompositions=tracing_table(),
            keep_inference_input_mutations=True,  # as under Inductor, buffers are written in the graph
        )
        return compiler(gm, example_inputs)


class Partitioner(CustomPartitionerFn):
    """Joint passes, cuts, plan: what AOTAutograd calls to split a joint graph. Picklable; a key of the caches."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        halves = split(gm, joint_inputs, self.options, **kwargs)
        forward, _ = run(halves.forward, (), (*passes.HALVES, *passes.FORWARD_HALF))
        return forward, run(halves.backward, (), passes.HALVES)[0]

    def uuid(self) -> str:
        return f"{_sources()}-{self.options!r}"


@young_garbage_only
@kernels_ahead
@no_empty_tails
@seeds_by_argument
@quick_links
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
