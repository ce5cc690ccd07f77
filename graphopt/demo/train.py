"""Training under one backend, and what it cost."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache

from graphopt.demo.data import Batch, Data
from graphopt.demo.models import WithLoss, build
from graphopt.memory import peak_bytes, saved_bytes

PAIRS = 9


@dataclass
class Run:
    """A model in training: the loss of every step, seconds per step, and the measures taken at the end."""

    backend: str
    model: WithLoss
    compiled: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    held_out_loss: float = 0.0
    saved_bytes: int = 0
    peak_bytes: int = 0

    @property
    def step_seconds(self) -> float:
        """Median seconds of a step, the first one left out where there are others."""
        return statistics.median(self.seconds[1:] or self.seconds)

    @property
    def compile_seconds(self) -> float:
        """Seconds of the first step beyond those of a usual one."""
        return self.seconds[0] - self.step_seconds

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step of training on a batch; returns its loss."""
        self.optimizer.zero_grad()
        loss = self.compiled(x, y)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()

    def timed_step(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        """The loss of one step and its seconds; reading the loss waits for the GPU."""
        start = time.perf_counter()
        loss = self.step(x, y).item()
        return loss, time.perf_counter() - start


def warm_up(backend: str, device: torch.device) -> None:
    """Compile one line under `backend`: the imports and probes of a first use are not the model's compile time."""
    x = torch.ones(8, device=device, requires_grad=True)
    torch.compile(lambda x: x.sin().sum(), backend=backend)(x).backward()


def train(
    backend: str, name: str, data: Data, steps: int, seed: int, device: torch.device, on_step: Callable[[float], None]
) -> Run:
    """Train model `name` for `steps` steps under `backend`, then measure; `on_step` hears the loss of every step."""
    model = build(name, seed).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    # ten steps of warm-up, then straight down to zero
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 10, 1 - i / steps))
    run = Run(backend, model, torch.compile(model, backend=backend), optimizer)
    torch.manual_seed(seed)
    # an empty cache, so that neither backend profits from kernels compiled before
    with fresh_cache():
        warm_up(backend, device)
        for i in range(steps):
            loss, seconds = run.timed_step(*_to(data.train(i), device))
            schedule.step()
            run.losses.append(loss)
            run.seconds.append(seconds)
            on_step(loss)
    x, y = _to(data.train(steps), device)
    optimizer.zero_grad()
    run.saved_bytes = saved_bytes(lambda: run.compiled(x, y), [x, y, *model.parameters(), *model.buffers()])
    run.peak_bytes = peak_bytes(lambda: run.step(x, y), device)
    run.held_out_loss = held_out_loss(model, _to(data.held_out, device))
    return run


@torch.no_grad()
def held_out_loss(model: WithLoss, batch: Batch) -> float:
    """Mean loss of `batch` without dropout, in eager mode: no third graph to compile."""
    model.eval()
    loss = model(*batch).item()
    model.train()
    return float(loss)


def step_ratio(base: Run, other: Run, batch: Batch, device: torch.device) -> float:
    """How many times as long `other` takes for a step as `base`: interleaved steps, median of pairs."""
    x, y = _to(batch, device)
    ratios = []
    for i in range(PAIRS):
        # who goes first alternates, so that a drift of the machine cancels
        order = (base, other) if i % 2 else (other, base)
        seconds = {run.backend: run.timed_step(x, y)[1] for run in order}
        ratios.append(seconds[other.backend] / seconds[base.backend])
    return statistics.median(ratios)


def _to(batch: Batch, device: torch.device) -> Batch:
    return batch[0].to(device), batch[1].to(device)
