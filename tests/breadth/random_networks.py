"""Random small networks: a list of steps, each of which reads one or two earlier values and makes another like them.

A network is data. Its repr, pasted into a test, is the network again, so that what hypothesis finds can be kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies
from layers import KINDS
from torch import Tensor, nn


@dataclass(frozen=True)
class Step:
    """One step: what it is, the values that it reads, counted from the last, and what becomes of it."""

    kind: str
    first: int = 0
    second: int = 0
    option: int = 0
    frozen: bool = False
    again: bool = False  # its module is applied to its result once more
    returned: bool = False


@dataclass(frozen=True)
class Network:
    """A network and a call of it: inputs float [batch, tokens, width], the last needs a gradient if `trained`.

    It may be called under autocast to bfloat16, and compiled for dynamic shapes.
    """

    steps: tuple[Step, ...]
    batch: int = 4
    tokens: int = 16
    width: int = 32
    inputs: int = 1
    trained: bool = False
    autocast: bool = False
    dynamic: bool = False

    def build(self, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
        torch.manual_seed(seed)
        inputs = tuple(torch.randn(self.batch, self.tokens, self.width) for _ in range(self.inputs))
        inputs[-1].requires_grad_(self.trained)
        module = _Network(self)
        for parameter in module.parameters():  # random norms and biases, so that a forgotten one shows
            if parameter.dim() == 1:
                nn.init.normal_(parameter, 0.5, 0.3)
        return module, inputs

    @property
    def draws(self) -> bool:
        """Whether it may draw random numbers."""
        return any(step.kind in ("mlp", "attention", "dropout", "checkpoint", "write") for step in self.steps)


class _Network(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.steps = network.steps
        self.first = nn.Linear(network.width, network.width)
        self.modules_of_steps = nn.ModuleList(KINDS[step.kind](network.width, step.option) for step in network.steps)
        for step, module in zip(network.steps, self.modules_of_steps):
            module.requires_grad_(not step.frozen)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        values = [*inputs, self.first(inputs[0])]
        returned = []
        for step, module in zip(self.steps, self.modules_of_steps):
            a, b = values[-1 - step.first % len(values)], values[-1 - step.second % len(values)]
            result = module(a, b)
            if step.again:
                result = module(result, b)
            values.append(result)
            if step.returned:
                returned.append(result)
        return [*returned, values[-1]]


def networks(steps: int = 8) -> strategies.SearchStrategy[Network]:
    """Networks of up to `steps` steps; simpler ones first, to which a failure shrinks."""
    few = strategies.integers(0, 3)
    rarely = strategies.sampled_from([False, False, False, True])
    step = strategies.builds(
        Step, strategies.sampled_from(list(KINDS)), few, few, strategies.integers(0, 23), rarely, rarely, rarely
    )
    sizes = [strategies.sampled_from(each) for each in ([4, 1, 3], [16, 1, 7, 33], [32, 8, 64, 24])]
    steps_of_one = strategies.lists(step, min_size=1, max_size=steps).map(tuple)
    inputs = strategies.sampled_from([1, 2])
    return strategies.builds(Network, steps_of_one, *sizes, inputs, strategies.booleans(), rarely, rarely)
