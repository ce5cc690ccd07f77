"""calibrate(): how much the error of each saved tensor moves the gradient, measured, and the plan that follows from it.

    plan = graphopt.calibrate(model, *batch, options={"memory_budget": 0.2})
    plan.save("plan.json")
    torch.compile(model, backend="lowmem", options={"plan": "plan.json"})

A plan needs to know how the gradient g depends on each value that it may encode; where that was not measured it takes
them all alike. Here the values of one step cross to backward as they are, and backward runs again for each of them,
that one decoded from 4 bits, which gives another gradient g':

    sensitivity = (|g' - g| / |g|)^2 / (|t' - t| / |t|)^2

Codecs are unbiased, so the errors of several tensors are independent, and their squares add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor, fx
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomPartitionerFn

from graphopt import passes
from graphopt.codecs import Codec, codec
from graphopt.crossing import Halves
from graphopt.errors import CaptureError, OptionsError, PlanError
from graphopt.graph import copy, owners
from graphopt.lowering.decompose import tracing_table
from graphopt.options import Options, parse, with_preset
from graphopt.partition import cut_as_tagged
from graphopt.pipeline import bind, run
from graphopt.plan import KEEP, RECOMPUTE, Plan
from graphopt.plan.make import Planning
from graphopt.split import split
from graphopt.step import as_before, compiled, loss_of

# one draw: over thousands of values it is off by some 5 %, and a codec of half the bits has 250 times the squared error
COARSE = codec("int4", rounding="stochastic")
ROUNDS = 3  # a plan made of what was measured may save other tensors, which are measured then


def calibrate(
    model: Callable[..., Any],
    *inputs: Any,
    preset: str | None = None,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Plan:
    """Measure how each saved tensor's error moves the gradient, and plan with that, for the option "plan" of lowmem.

    `model(*inputs, **kwargs)` runs forward once, and backward once more for each tensor that may be encoded, node by
    node and with nothing encoded; and again if that leads to other tensors, at the most three times. It returns a loss,
    an object with a `loss`, or tensors, of which the mean of squares is taken. Its parameters, gradients, buffers and
    the random state stay as they are.
    `options` are those of torch.compile; what is measured matters most under a memory budget. The plan is for these
    shapes; ranks that train one model share one file.

    Raises OptionsError, PlanError for a budget out of reach, and CaptureError as `capture` does.
    """
    own, patches = parse(with_preset(preset, options))
    if own.plan is not None:
        raise OptionsError("option 'plan': calibrate makes a plan, and takes none")
    if not own.planned:
        raise OptionsError(f"there is nothing to calibrate: with {own} no plan is made")
    measured: dict[str, float] = {}
    plan: Plan | None = None
    with as_before(model), torch.enable_grad():
        for _ in range(ROUNDS):
            measuring = _Measuring(replace(own, plan=plan), patches, measured)
            loss = loss_of(compiled(model, measuring.backend)(*inputs, **kwargs))
            if measuring.planning is None:
                raise CaptureError("the model does no work on tensors that torch.compile could trace")
            # not loss.backward(): gradients that are there stay, and no hook of theirs runs
            torch.autograd.grad(loss, measuring.leaves, allow_unused=True)
            measuring.leaves.clear()  # what Dynamo compiled holds on to its backend
            plan = measuring.planned_anew()
            if all(each.node in measured for each in plan.choices if each.decision not in (KEEP, RECOMPUTE)):
                break
    assert plan is not None
    return plan


class _Measuring(CustomPartitionerFn):
    """lowmem with graphs run node by node, nothing encoded, and a backward that adds to what is `measured`.

    As a partitioner it splits a joint graph by the plan among `options`, or the one that lowmem makes.
    """

    def __init__(self, options: Options, patches: Mapping[str, Any], measured: dict[str, float]) -> None:
        self.options, self.patches, self.measured = options, patches, measured
        self.leaves: list[Tensor] = []
        self.planning: Planning | None = None

    def backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        self.leaves = [each for each in example_inputs if isinstance(each, Tensor) and each.requires_grad]
        gm, _ = run(gm, example_inputs, passes.FORWARD, self.options.disable)
        patches = {**self.patches, "custom_partitioner_fn": self}
        with functorch_config.patch(enable_autograd_cache=False):
            return compile_fx(gm, example_inputs, self._as_it_stands, patches, tracing_table(patches))

    def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Halves:
        self.outputs, planning = kwargs["num_fwd_outputs"], split(gm, joint_inputs, self.options, **kwargs).planning
        if planning is None:
            raise PlanError("there is nothing to calibrate: these options make no plan that saves bytes in this model")
        self.planning = planning
        # by their names in backward: values that may be encoded, and views of them
        self.value = {
            node.name: owner.name
            for node, owner in owners(planning.gm.graph).items()
            if owner in planning.problem.graph.values and planning.problem.graph.values[owner].codecs
        }
        kept = {name: KEEP if isinstance(each, Codec) else each for name, each in planning.decisions.items()}
        bound = [bind(each, decisions=kept, num_fwd_outputs=self.outputs) for each in passes.PLANNED]
        gm, _ = run(copy(planning.gm), joint_inputs, bound)
        forward, backward = cut_as_tagged(gm, joint_inputs, **kwargs)
        return run(forward, (), passes.HALVES)[0], run(backward, (), passes.HALVES)[0]

    def uuid(self) -> None:
        return None

    def planned_anew(self) -> Plan:
        """The plan that follows from what is measured."""
        assert self.planning is not None
        settings = replace(self.options.settings(self.planning.stock), sensitivity=self.measured or None)
        return Planning(self.planning.gm, self.outputs, self.planning.stock, settings, states=self.planning.states).plan

    def _as_it_stands(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], *, is_backward: bool = False, **_: Any
    ) -> Any:
        """In the place of Inductor: a graph run node by node."""
        if not is_backward:
            return make_boxed_func(gm.forward)
        names = [node.name for node in gm.graph.find_nodes(op="placeholder")]

        def backward(*given: Any) -> Any:
            gradients = gm.forward(*given)
            for value, places in self._to_measure(names, given).items():
                self.measured[value] = _sensitivity(gm.forward, given, places, gradients)
            return gradients

        return make_boxed_func(backward)

    def _to_measure(self, names: Sequence[str], given: Sequence[Any]) -> dict[str, list[int]]:
        """The values not measured yet, with their places among what backward is given: more than one if views are."""
        places: dict[str, list[int]] = {}
        for place, name in enumerate(names):
            if name in self.value and self.value[name] not in self.measured and isinstance(given[place], Tensor):
                places.setdefault(self.value[name], []).append(place)
        return places


def _sensitivity(
    backward: Callable[..., Any], given: Sequence[Any], places: Sequence[int], gradients: Sequence[Any]
) -> float:
    """The squared relative error of the gradients by that of one storage, which is seen at `places`."""
    changed, views = list(given), [given[place] for place in places]
    values = views[0].new_empty(0).set_(views[0].untyped_storage())
    coarse = COARSE.decode(COARSE.encode(values), values.shape, values.dtype)
    for place, view in zip(places, views):
        changed[place] = coarse.as_strided(view.shape, view.stride(), view.storage_offset())
    error = _squared_error([coarse], [values])
    return _squared_error(backward(*changed), gradients) / error if error else 0.0


def _squared_error(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """(|x - x0| / |x0|)^2 over all tensors together; 0 where x0 is."""
    pairs = [(x, x0) for x, x0 in zip(found, expected) if isinstance(x0, Tensor) and x0.is_floating_point()]
    size = sum(_square(x0) for _, x0 in pairs)
    return sum(_square(x.float() - x0.float()) for x, x0 in pairs) / size if size else 0.0


def _square(x: Tensor) -> float:
    return float(x.float().square().sum(dtype=torch.float64))
