"""Every method on one model and batch: bytes, peak, gradients, and steps in turn with stock Inductor's."""

import gc
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from methods import STOCK

from measuring.gate import allowed_error
from measuring.steps import Gradients, Job, Run, Setting, distance, norm

Row = dict[str, Any]
MEASURED = ("saved_bytes", "host_bytes", "peak_bytes", "first_call_seconds", "gradient_error", "allowed_error")


def compared(
    setting: Setting,
    methods: Sequence[str],
    device: torch.device,
    begin: Callable[[str], None],
    steps: int,
    cold: bool = True,
) -> Iterator[Row]:
    """One row for each method, as soon as it is measured; stock Inductor runs in any case. `begin` hears what is next.

    With `cold` each compiles from an empty cache, so that the seconds of first calls can be compared.
    """
    torch._dynamo.reset()
    job = Job.of(setting, device)
    wanted = job.reference()
    reference = STOCK if wanted is None else "float32"
    begin(STOCK)
    stock_row, stock, gradients = _first(job, STOCK, wanted, None, cold)
    wanted = gradients if wanted is None else wanted
    for method in methods:
        row, run = stock_row, stock
        if method != STOCK:
            begin(method)
            row, run, _ = _first(job, method, wanted, stock_row["gradient_error"], cold)
        yield {**row, "reference": reference, **_times(run, stock, steps), "timed_steps": steps}


def _first(
    job: Job, method: str, wanted: Gradients | None, stock_error: float | None, cold: bool
) -> tuple[Row, Run | None, Gradients | None]:
    """A method's row but for times, its gradients, and its run if it may be timed; what it raises is in the row."""
    row: Row = {**job.setting.row, "method": method, **dict.fromkeys(MEASURED), "passed": False, "error": None}
    try:
        run = Run.started(job, method, cold)
        row["first_call_seconds"] = round(run.first_call, 1) if cold else None
        row |= run.memory()
        gradients = run.gradients()
        if wanted is not None:
            error = distance(gradients, wanted)
            row["gradient_error"] = _digits(error)
        if method == STOCK:  # its own bound
            row["passed"] = math.isfinite(norm(gradients.values()))
        elif wanted is not None:
            allowed = allowed_error(method, stock_error, torch.bfloat16)
            row |= {"allowed_error": _digits(allowed), "passed": error <= allowed}
        return row, run if row["passed"] else None, gradients
    except Exception as error:  # such as out of memory: the other methods go on
        row["error"] = first_line(error)
    job.zero_grad()
    gc.collect()
    torch.cuda.empty_cache()
    return row, None, None


def _times(run: Run | None, stock: Run | None, steps: int) -> Row:
    """The ratio to stock Inductor of a method that may be timed, their steps in turn; of stock itself the seconds."""
    ratio = seconds = rate = None
    if run and stock and steps:
        pairs = [_pair(run, stock, i) for i in range(steps)]
        ratio = round(statistics.median(own / base for own, base in pairs), 3)
        if run is stock:
            seconds = statistics.median(own for own, _ in pairs)
            rate = round(run.job.setting.batch * run.job.setting.length / seconds)
    return {"step_ratio": ratio, "step_seconds": seconds and _digits(seconds), "tokens_per_second": rate}


def _pair(run: Run, stock: Run, i: int) -> tuple[float, float]:
    """Seconds of a step of each. Who goes first alternates, so that a drift of the machine cancels."""
    if run is stock:
        own = stock.step()
        return own, own
    if i % 2:
        own, base = run.step(), stock.step()
    else:
        base, own = stock.step(), run.step()
    return own, base


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _digits(value: float) -> float | None:
    """Four digits; None of what is no number, which JSON has no word for."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
