"""One training step under a backend: its loss, gradients and saved bytes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.memory import saved_bytes

Gradients = dict[str, Tensor]
EXACT = {"preset": "exact"}  # options of a test on the exact rewrites, or on codes of activations


def step(
    model: nn.Module, inputs: Sequence[Any], backend: str | None = "lowmem_eager", seed: int = 7, **settings: Any
) -> tuple[Tensor, Gradients, int]:
    """The model's output, the gradients of its parameters and float inputs, and the bytes saved, for mean(output^2).

    `settings` are those of torch.compile. Preset "exact" where its options name no other; a `mode` takes no options.
    """
    if backend in ("lowmem", "lowmem_eager") and "mode" not in settings:
        settings["options"] = {**EXACT, **settings.get("options", {})}
    model = copy.deepcopy(model)
    inputs = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)
    function: Callable[..., Tensor] = model if backend is None else torch.compile(model, backend=backend, **settings)
    outputs: list[Tensor] = []
    torch.manual_seed(seed)
    kept = saved_bytes(lambda: outputs.append(function(*inputs)), [*model.parameters(), *model.buffers(), *inputs])
    outputs[0].float().square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients |= {f"input {at}": x.grad for at, x in enumerate(inputs) if x.grad is not None}
    return outputs[0].detach(), gradients, kept


def distance(found: Gradients, expected: Gradients) -> float:
    """||g - g0|| / ||g0|| over all parameters."""
    assert found.keys() == expected.keys()
    difference = sum((found[name].double() - expected[name].double()).square().sum().item() for name in expected)
    return math.sqrt(difference / sum(g.double().square().sum().item() for g in expected.values()))
