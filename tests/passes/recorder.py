"""A backend that runs canonicalize alone and records what it did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphopt.passes import canonicalize
from graphopt.pipeline import PassRecord, run


class Recorder:
    """A backend that keeps the operations before and after the pass, and the pass's record."""

    def __init__(self) -> None:
        self.before: list[str] = []
        self.after: list[str] = []
        self.records: list[PassRecord] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.before += operations(gm)
        gm, records = run(gm, example_inputs, (canonicalize,))
        self.after += operations(gm)
        self.records += records
        return gm.forward

    @property
    def fired(self) -> list[str]:
        return [event.text for record in self.records for event in record.fired]

    @property
    def left(self) -> list[str]:
        return [event.text for record in self.records for event in record.left_alone]


def operations(gm: fx.GraphModule) -> list[str]:
    calls = [node for node in gm.graph.nodes if node.op.startswith("call")]
    return [str(node.target if isinstance(node.target, str) else node.target.__name__) for node in calls]


def compiled(function: Callable[..., Any], **settings: Any) -> tuple[Callable[..., Any], Recorder]:
    torch._dynamo.reset()
    recorder = Recorder()
    return torch.compile(function, backend=recorder, fullgraph=True, **settings), recorder
