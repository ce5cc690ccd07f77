"""One training step of a model that takes named inputs, in several ways: its loss, gradients and saved bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from models import Built
from torch import Tensor, fx, nn
from torch._dynamo import lookup_backend
from training import EXACT, Gradients

from graphopt.memory import saved_bytes
from graphopt.step import loss_of

# a backend and its options, by name
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "stock": ("aot_eager_decomp_partition", {}),
    "exact": ("lowmem_eager", {"options": EXACT}),
    "compressed": ("lowmem_eager", {"options": {}}),
    "inductor": ("inductor", {}),
    "inductor, compressed": ("lowmem", {"options": {}}),
}


class Step(NamedTuple):
    loss: float
    gradients: Gradients
    saved: int


def eager(built: Built) -> Step:
    model, inputs = built
    return _step(model, model, inputs)


def steps(built: Built, ways: Iterable[str]) -> list[Step]:
    """A step in each way. Dynamo traces the model once: each of its graphs is compiled in all ways."""
    model, inputs = built
    chosen = ""

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        functions = {}
        for way in ways:
            name, settings = WAYS[way]
            functions[way] = lookup_backend(name)(copy.deepcopy(gm), example_inputs, **settings)
        return lambda *args: functions[chosen](*args)

    function = torch.compile(model, backend=backend, dynamic=False)
    found = []
    for way in ways:
        chosen = way
        found.append(_step(model, function, inputs))
    return found


def _step(model: nn.Module, function: Callable[..., Any], inputs: dict[str, Any]) -> Step:
    """From a fixed seed; the model's buffers are as before afterwards."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.zero_grad()
    torch.manual_seed(7)
    losses: list[Tensor] = []
    own = [*model.parameters(), *model.buffers(), *(x for x in inputs.values() if isinstance(x, Tensor))]
    saved = saved_bytes(lambda: losses.append(loss_of(function(**inputs))), own)
    losses[0].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, buffer in model.named_buffers():
        buffer.data.copy_(buffers[name])
    return Step(losses[0].item(), gradients, saved)


def float64(built: Built) -> Built:
    model, inputs = copy.deepcopy(built)
    if hasattr(model, "set_experts_implementation"):  # torch's grouped products have no float64
        model.set_experts_implementation("eager")
    return model.double(), {name: _to_float64(x) for name, x in inputs.items()}


def _to_float64(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
