"""The largest batch, or the longest sequence, of which a training step fits in a given memory."""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from graphopt.memory import peak_bytes
from measuring.comparison import first_line
from measuring.steps import Job, Run, Setting

Row = dict[str, Any]
GIB = 2**30
# where the search begins, and what it is a multiple of
VARIED = {"length": (128, 8), "batch": (1, 1)}
OPTIMIZERS = ("none", "adamw")
RESOLUTION = 16  # a trial compiles and trains a model, so the answer is good to a sixteenth


@dataclass(frozen=True)
class Fit:
    """What is asked: the memory in GiB, what is made larger, and the optimizer whose states are in that memory too."""

    gib: float
    vary: str
    optimizer: str = "none"

    @property
    def row(self) -> Row:
        return {"fit_gib": self.gib, "vary": self.vary, "optimizer": self.optimizer, self.vary: None}


def fitted(
    setting: Setting, methods: Sequence[str], device: torch.device, begin: Callable[[str], None], fit: Fit
) -> Iterator[Row]:
    """One row for each method; gradients are not checked here."""
    for method in methods:
        begin(method)
        row = {**setting.row, **fit.row, "method": method, "largest": None, "error": None}
        try:
            row["largest"] = largest(partial(_fits, setting, method, device, fit), *VARIED[fit.vary])
        except Exception as error:  # what is not for want of memory: the other methods go on
            row["error"] = first_line(error)
        yield row


def largest(fits: Callable[[int], bool], start: int, step: int) -> int:
    """The largest multiple of `step` that fits, a sixteenth or one `step` too small at most; 0 if `start` does not.

    `start` is such a multiple. It is doubled until it does not fit, so nothing above twice the answer is tried; then
    the interval is halved. What fits must fit for all smaller numbers too.
    """
    if not fits(start):
        return 0
    low = start
    while fits(2 * low):
        low *= 2
    high = 2 * low  # the smallest that is known not to fit
    while high - low > max(step, low // RESOLUTION):
        middle = (low + high) // 2 // step * step
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def _fits(setting: Setting, method: str, device: torch.device, fit: Fit, value: int) -> bool:
    """Whether steps of this batch or length stay within the memory, everything that training holds included."""
    setting = replace(setting, **{fit.vary: value})
    torch._dynamo.reset()
    try:
        if device.type == "cuda":
            return _within(setting, method, device, fit)
        return needed(setting, method, device, fit.optimizer) <= fit.gib * GIB
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def _within(setting: Setting, method: str, device: torch.device, fit: Fit) -> bool:
    """Two steps on a GPU of which no more may be allocated, so fragments of memory count."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, fit.gib * GIB / total), device)
    try:
        _Training(setting, method, device, fit.optimizer)()
        torch.cuda.synchronize(device)
        return True
    except Exception as error:  # compiled code has it inside of errors of its own
        if "out of memory" in str(error):
            return False
        raise
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def needed(setting: Setting, method: str, device: torch.device, optimizer: str) -> int:
    """The bytes that training takes at its peak: what it holds, and the peak of a step above that."""
    step = _Training(setting, method, device, optimizer)
    return step.held() + peak_bytes(step, device)


class _Training:
    """Steps of a run, with its optimizer's if there is one. Two are made: they compile, and make states."""

    def __init__(self, setting: Setting, method: str, device: torch.device, optimizer: str) -> None:
        self.run = Run.started(Job.of(setting, device), method, cold=False)
        trained = list(self.run.job.trained.values())
        self.optimizer = torch.optim.AdamW(trained, fused=True) if optimizer == "adamw" else None
        self()

    def __call__(self) -> None:
        self.run.step()
        if self.optimizer:
            self.optimizer.step()

    def held(self) -> int:
        """Bytes between two steps: the job's, and the optimizer's states."""
        self.run.job.zero_grad()
        states = self.optimizer.state.values() if self.optimizer else ()
        tensors = [each for state in states for each in state.values() if isinstance(each, torch.Tensor)]
        storages = (each.untyped_storage() for each in (*self.run.job.held, *tensors))
        return sum({each.data_ptr(): each.nbytes() for each in storages}.values())
