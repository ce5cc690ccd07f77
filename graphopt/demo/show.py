"""What the demo shows: a table, a figure, a file of results."""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from graphopt.demo.train import Run

MB = 1e6
COLOURS = ("#9aa0a6", "#1a73e8")


def table(base: Run, other: Run, ratio: float, title: str) -> Table:
    """Both runs side by side; the last column divides the second by the first; `ratio` is that of step times."""
    shown = Table(title=title, caption="step time ratio: median of interleaved pairs; MB = 10^6 bytes")
    shown.add_column("")
    shown.add_column(base.backend, justify="right")
    shown.add_column(other.backend, justify="right", style="bold")
    shown.add_column(f"{other.backend} / {base.backend}", justify="right")

    def row(name: str, unit: str, values: tuple[float, float], relative: float | None, digits: int = 1) -> None:
        cells = (f"{value:,.{digits}f}{unit}" for value in values)
        shown.add_row(name, *cells, "" if relative is None else f"{relative:.2f}")

    row("loss of the first step", "", (base.losses[0], other.losses[0]), None, 3)
    row("loss of the last step", "", (base.losses[-1], other.losses[-1]), None, 3)
    row("loss on held-out data", "", (base.held_out_loss, other.held_out_loss), None, 3)
    shown.add_section()
    saved = base.saved_bytes, other.saved_bytes
    row("saved for backward", " MB", (saved[0] / MB, saved[1] / MB), saved[1] / saved[0])
    peak = base.peak_bytes, other.peak_bytes
    row("peak of a step", " MB", (peak[0] / MB, peak[1] / MB), peak[1] / peak[0])
    shown.add_section()
    row("step, median", " ms", (base.step_seconds * 1e3, other.step_seconds * 1e3), ratio)
    compiling = base.compile_seconds, other.compile_seconds
    row("compiling", " s", compiling, compiling[1] / compiling[0])
    return shown


def figure(base: Run, other: Run, title: str) -> Figure:
    """Loss curves of both runs, and bars of their saved and peak memory in MB."""
    shown = Figure(figsize=(10, 4), layout="constrained")
    shown.suptitle(title)
    curves, bars = shown.subplots(1, 2, width_ratios=(3, 2))
    for i, run in enumerate((base, other)):
        steps = range(1, len(run.losses) + 1)
        curves.plot(steps, run.losses, color=COLOURS[i], linewidth=3 - 1.8 * i, label=run.backend)
        heights = [run.saved_bytes / MB, run.peak_bytes / MB]
        bar = bars.bar([k + 0.4 * i - 0.2 for k in range(2)], heights, 0.38, color=COLOURS[i], label=run.backend)
        bars.bar_label(bar, fmt="%.0f", padding=2)
    curves.set(xlabel="step", ylabel="training loss (nats)")
    bars.set(ylabel="MB", xticks=range(2), xticklabels=["saved for backward", "peak of a step"])
    bars.margins(y=0.12)
    curves.legend(frameon=False)
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
    return shown


def write_results(path: Path, setting: dict[str, Any], runs: tuple[Run, Run], ratio: float) -> None:
    """Everything the table and the figure show, as JSON; sizes in bytes, times in seconds."""
    backends = {
        run.backend: {
            "losses": run.losses,
            "held_out_loss": run.held_out_loss,
            "saved_bytes": run.saved_bytes,
            "peak_bytes": run.peak_bytes,
            "step_seconds": run.step_seconds,
            "compile_seconds": run.compile_seconds,
        }
        for run in runs
    }
    path.write_text(json.dumps({**setting, "step_ratio": ratio, "backends": backends}, indent=1) + "\n")
