"""The FX tracer: a model and its inputs -> the forward graph, the joint graph and the tensors saved between them.

    capture = graphopt.capture(model, *inputs)
    capture.forward.print_readable()          # what Dynamo hands a backend
    capture.joint.print_readable()            # ATen forward + backward, gelu, silu and the norms in one piece
    for tensor in capture.saved: ...          # what stock Inductor keeps for backward
    capture.saved_after(share_norm)           # what it keeps once the pass has run

Nothing of the model is executed and nothing is allocated for it, so under FakeTensorMode any size will do.
"""

from __future__ import annotations

import contextlib
import logging
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import ShortenTraceback, Unsupported
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext, tracing
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import unset_fake_temporarily

from graphopt import passes
from graphopt.crossing import crossing_of
from graphopt.errors import CaptureError, GraphoptError
from graphopt.graph import ENCODED, copy, fake_mode, hint, module_of, source_of, storage, storage_bytes, tensor
from graphopt.lowering.decompose import decompose, inductor_table, tracing_table
from graphopt.options import Options
from graphopt.partition import cut
from graphopt.pipeline import Pass, PassRecord, run
from graphopt.plan import Plan
from graphopt.plan.make import Planning
from graphopt.split import split
from graphopt.step import untouched


@dataclass(frozen=True)
class SavedTensor:
    """A forward value that autograd keeps until backward has read it.

    `bytes` is what its storage takes, which is more than the shape says where it is a view of a larger tensor.
    `module` and `source` made it; `readers` are the modules whose backward reads it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    operator: str
    module: str
    source: str
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Capture:
    """One training graph of a model, as the backend meets it."""

    forward: fx.GraphModule
    joint: fx.GraphModule
    example_inputs: tuple[Any, ...]
    partition_arguments: dict[str, Any]

    @cached_property
    def saved(self) -> tuple[SavedTensor, ...]:
        """The tensors that stock Inductor saves; the model is traced again, with all of its decompositions."""
        joint, arguments = _joint_graph(copy(self.forward), self.example_inputs, inductor_table())
        with _tracing(joint):
            return _saved(*min_cut_rematerialization_partition(joint, self.example_inputs, **arguments), arguments)

    def lowmem(
        self,
        options: Options = Options(),  # noqa: B008
    ) -> tuple[tuple[SavedTensor, ...], tuple[PassRecord, ...], Planning | None]:
        """The tensors that `backend="lowmem"` saves, what every pass did, and the plan where there is one."""
        with unset_fake_temporarily():
            forward, records = run(copy(self.forward), self.example_inputs, passes.FORWARD, options.disable)
        joint, arguments = copy(self.joint), self.partition_arguments
        if options.disable:  # the captured joint graph comes of the canonical forward graph
            joint, arguments = _joint_graph(forward, self.example_inputs, tracing_table())
        with _tracing(joint):
            halves = split(joint, self.example_inputs, options, **arguments)
        saved = _saved(halves.forward, halves.backward, arguments)
        return saved, (*records, *halves.records), halves.planning

    def frontier(self, options: Options = Options()) -> list[Plan]:  # noqa: B008
        """The best plans from most bytes to fewest, by all codecs of the options' group size and rounding."""
        preset = "compressed" if options.preset in ("exact", "paper") else options.preset
        allowed = replace(
            options, preset=preset, memory_budget=None, plan=None, tolerance=math.inf, time_slack=math.inf,
            rounding=options.rounding or (None if options.codecs else "stochastic"), recompute="any",
        )  # fmt: skip
        planning = self.lowmem(allowed)[2]
        return planning.frontier() if planning else []

    def rewritten(self, *rewrites: Pass) -> tuple[fx.GraphModule, list[PassRecord]]:
        """A copy of the joint graph after the passes `rewrites`, and what each of them did."""
        with _tracing(self.joint):
            return run(copy(self.joint), self.example_inputs, rewrites)

    def saved_after(self, *rewrites: Pass) -> tuple[SavedTensor, ...]:
        """The tensors saved when `rewrites` have run on the joint graph and graphopt's cut has split it."""
        return self.cut(self.rewritten(*rewrites)[0])

    def cut(self, joint: fx.GraphModule) -> tuple[SavedTensor, ...]:
        """The tensors saved when graphopt's cut splits a rewritten copy of the joint graph."""
        with _tracing(joint):
            halves = cut(decompose(copy(joint)), self.example_inputs, **self.partition_arguments)
        return _saved(*halves, self.partition_arguments)


def capture(model: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Capture:
    """Trace one training step of `model(*inputs, **kwargs)`, without running it.

    Raises CaptureError if the model breaks into several graphs (naming the line), or if nothing in it needs a gradient.
    """
    forward, example_inputs = forward_graph(model, inputs, kwargs)
    with unset_fake_temporarily():  # Dynamo has a fake mode of its own, beside the one the caller may be under
        canonical, _ = run(copy(forward), example_inputs, passes.FORWARD)
    joint, arguments = _joint_graph(canonical, example_inputs, tracing_table())
    return Capture(forward, joint, tuple(example_inputs), arguments)


def apply(
    gm: fx.GraphModule, example_inputs: Sequence[object], passes: Sequence[Pass] = (*passes.JOINT, decompose)
) -> fx.GraphModule:
    """Run passes on a joint graph of forward and backward, in place, for use inside another compiler.

    `passes` defaults to the exact rewrites and the decompositions of what they leave whole. Where pack_mask is among
    them, `graphopt.passes.lower` spells out what it adds, in the forward and backward graphs made of the joint one.
    Raises PassError, naming the pass that failed.
    """
    return run(gm, example_inputs, tuple(passes))[0]


# under suppress_errors Dynamo does not come back to code on which a backend failed once
_SKIPPED = "If an earlier error was hidden by suppress_errors, torch._dynamo.reset() lets Dynamo try again."


class _Stop(ShortenTraceback):
    """Leaves Dynamo or AOTAutograd once the graph is there."""

    def __init__(self, *found: Any) -> None:
        super().__init__(first_useful_frame=None)
        self.found = found


def forward_graph(
    model: Callable[..., Any], inputs: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[fx.GraphModule, list[Any]]:
    """The one graph Dynamo makes of a call, and the graph's inputs: the model's own parameters are among them."""

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        raise _Stop(gm, example_inputs)

    # a log message in the model would break the graph; the capture runs nothing, so it needs none of them. Asked for at
    # each call: transformers gives Logger more methods when it is imported
    messages = {each for each in vars(logging.Logger).values() if callable(each)}
    try:
        with torch.enable_grad(), dynamo_config.patch(ignore_logging_functions=messages, suppress_errors=False):
            untouched(model, backend=backend, fullgraph=True, dynamic=False)(*inputs, **kwargs)
    except _Stop as stop:
        return stop.found
    except Unsupported as error:
        raise CaptureError(f"the model does not form one graph: {error}") from None
    except RuntimeError as error:
        if "found no compiled frames" not in str(error):
            raise
        raise CaptureError(f"{error}\n{_SKIPPED}") from None
    raise CaptureError(f"the model does no work on tensors that torch.compile could trace. {_SKIPPED}")


def _joint_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], table: Any
) -> tuple[fx.GraphModule, dict[str, Any]]:
    """The joint graph a partitioner is given, after Inductor's own passes on it, and the partitioner's arguments."""

    def partition(joint: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Any:
        with V.set_fake_mode(fake_mode(joint.graph)):
            joint_graph_passes(joint)
        raise _Stop(joint, kwargs)

    def no_gradient(graph: fx.GraphModule, _: Any) -> Any:
        raise CaptureError("nothing that the model returns needs a gradient: there is no backward to save tensors for")

    compiler = aot_autograd(
        fw_compiler=make_boxed_func, inference_compiler=no_gradient, partition_fn=partition, decompositions=table
    )
    try:
        with torch.enable_grad(), unset_fake_temporarily():
            compiler(gm, example_inputs)
    except _Stop as stop:
        return stop.found
    raise GraphoptError("AOTAutograd did not partition the graph")


@contextlib.contextmanager
def _tracing(joint: fx.GraphModule) -> Iterator[None]:
    with unset_fake_temporarily(), tracing(TracingContext(fake_mode(joint.graph))):
        yield


def _saved(forward: fx.GraphModule, backward: fx.GraphModule, arguments: dict[str, Any]) -> tuple[SavedTensor, ...]:
    placeholders = {node.name: node for node in backward.graph.nodes if node.op == "placeholder"}
    nodes = crossing_of((forward, backward), arguments["num_fwd_outputs"]).saved
    return tuple(_describe(node, placeholders.get(node.name)) for node in nodes)


def _describe(node: fx.Node, in_backward: fx.Node | None) -> SavedTensor:
    value, maker = node.meta["val"], _maker(node)
    shape, size = tuple(hint(size) for size in value.shape), storage_bytes([value])
    target = maker.args[0].target if maker.target is operator.getitem else maker.target  # type: ignore[union-attr]
    name = str(getattr(target, "overloadpacket", target))
    name = node.meta.get(ENCODED, name)
    # the state of the random numbers of a checkpointed region goes by another name in backward
    readers = tuple(sorted({module_of(user) for user in in_backward.users})) if in_backward else ()
    return SavedTensor(node.name, shape, value.dtype, size, name, module_of(maker), source_of(maker), readers)


def _maker(node: fx.Node) -> fx.Node:
    """The node that computed the storage a saved tensor is a view of."""
    base = node.args[0] if node.args and node.op == "call_function" else None
    value = tensor(base)
    if isinstance(base, fx.Node) and value is not None and storage(value) == storage(node.meta["val"]):
        return _maker(base)
    return node
