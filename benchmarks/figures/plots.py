"""The plots of the documents, each for a light and a dark page; the figures they are drawn from stand in the file.

The same figures make the same file: SVG keeps text as text, its ids come from a fixed salt, and no file has a date.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures.claims import BUDGET, LOWMEM_BUDGET, Row
from figures.fidelity_claims import STOCK
from figures.tables import NAMES
from figures.training_tables import task_name


class Theme(NamedTuple):
    """Colours of one kind of page; backgrounds are GitHub's."""

    background: str
    text: str
    grid: str
    grey: str
    blue: str
    orange: str
    green: str
    pink: str
    purple: str
    yellow: str


THEMES = {
    "light": Theme(
        "#ffffff", "#1f2328", "#e5e5e5", "#666666", "#1f5fbf", "#d9730d", "#1a7f37", "#bf3989", "#8250df", "#9a6700"
    ),
    "dark": Theme(
        "#0d1117", "#e6edf3", "#2b3138", "#9198a1", "#58a6ff", "#f0883e", "#3fb950", "#f778ba", "#bc8cff", "#e3b341"
    ),
}
Draw = Callable[[Sequence[Row], Theme], Figure]
# label, colour, marker, line, and which methods
SERIES: tuple[tuple[str, str, str, str, Callable[[str], bool]], ...] = (
    ("Inductor", "grey", "o", "", lambda method: method == STOCK),
    ("activation_memory_budget", "orange", "s", "-", lambda method: method.startswith(BUDGET)),
    ("fp8 pass", "orange", "X", "", lambda method: method == "fp8"),
    ("checkpoint", "orange", "^", "", lambda method: method == "checkpoint"),
    ("lowmem, memory_budget", "blue", "o", "-", lambda method: method.startswith(LOWMEM_BUDGET)),
    ("lowmem:exact", "blue", "v", "", lambda method: method == "lowmem:exact"),
    ("lowmem:compressed", "blue", "D", "", lambda method: method == "lowmem:compressed"),
    ("lowmem:smallest", "blue", "*", "", lambda method: method == "lowmem:smallest"),
)
# colour of each method's losses; stock's line is wide and lies below
LOSSES = {
    STOCK: "grey",
    "lowmem:exact": "blue",
    "lowmem:compressed": "green",
    "lowmem:smallest": "orange",
    "lowmem:paper": "pink",
    "lowmem:paper:unbiased": "purple",
    "lowmem:paper:lloyd": "yellow",
}
PANELS = 4  # in a row


def write(draw: Draw, results: Row, theme: str, path: Path) -> None:
    """Draw results in one theme, and name in the file which they were."""
    colours = THEMES[theme]
    style = {
        "svg.fonttype": "none", "svg.hashsalt": path.stem, "font.size": 8, "text.color": colours.text,
        "figure.facecolor": colours.background, "axes.facecolor": colours.background,
        "axes.edgecolor": colours.grey, "axes.labelcolor": colours.text, "grid.color": colours.grid,
        "xtick.color": colours.grey, "ytick.color": colours.grey,
        "xtick.labelcolor": colours.text, "ytick.labelcolor": colours.text,
    }  # fmt: skip
    # a PNG names the software, an SVG the date, unless told not to
    unwanted = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    with matplotlib.rc_context(style):
        draw(results["rows"], colours).savefig(path, dpi=110, metadata={"Description": _figures(results), **unwanted})


def is_of(results: Row, path: Path) -> bool:
    """Whether a plot is there and was drawn from these results."""
    return path.exists() and _figures(results).encode() in path.read_bytes()


def _figures(results: Row) -> str:
    rows = json.dumps(results["rows"], sort_keys=True)
    return f"figures {hashlib.sha256(rows.encode()).hexdigest()}"


def draw_pareto(rows: Sequence[Row], theme: Theme) -> Figure:
    """One column for each block: bytes against time above, against gradient error below."""
    blocks = list(dict.fromkeys(row["block"] for row in rows))
    figure = Figure(figsize=(2.1 * max(len(blocks), 3), 4.8), layout="constrained")
    panels = figure.subplots(2, len(blocks), sharex=True, sharey="row", squeeze=False)
    for block, (above, below) in zip(blocks, panels.T):
        own = [row for row in rows if row["block"] == block]
        above.set_title(NAMES[block], fontsize=8)
        _methods(above, own, "step_ratio", theme)
        _methods(below, [row for row in own if row["gradient_error"]], "gradient_error", theme)
        below.set_xlabel("saved bytes, of stock's")
        if not below.lines:
            below.text(0.5, 0.5, "not comparable", ha="center", color=theme.grey, transform=below.transAxes)
    panels[0, 0].set_ylabel("step time, of stock's")
    panels[1, 0].set_ylabel("gradient error")
    panels[1, 0].set_yscale("log")
    panels[0, 0].set_xscale("log")
    ticks = (0.05, 0.1, 0.2, 0.5, 1)
    panels[0, 0].set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
    panels[0, 0].minorticks_off()
    _legend(figure, panels[0, 0])
    return figure


def _methods(panel: Axes, rows: Sequence[Row], what: str, theme: Theme) -> None:
    for label, colour, marker, line, belongs in SERIES:
        found = sorted((row["saved_of_stock"], row[what]) for row in rows if belongs(row["method"]))
        if found:
            panel.plot(*zip(*found), label=label, color=getattr(theme, colour), marker=marker,
                       linestyle=line or "none", markersize=4, linewidth=1)  # fmt: skip
    _plain(panel)


def draw_fidelity(rows: Sequence[Row], theme: Theme) -> Figure:
    """Two panels for each task: training loss by step under every method, the mean over seeds; below, less stock's."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    columns = min(PANELS, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = Figure(figsize=(2.1 * max(columns, 3), 3 * lines + 0.5), layout="constrained")
    panels = figure.subplots(2 * lines, columns, squeeze=False)
    for place in range(lines * columns):
        above, below = panels[2 * (place // columns) : 2 * (place // columns) + 2, place % columns]
        if place < len(tasks):
            _losses(above, below, [row for row in rows if row["task"] == tasks[place]], theme)
            above.set_title(task_name(tasks[place]), fontsize=8)
            below.set_xlabel("step")
        else:
            above.set_visible(False)
            below.set_visible(False)
    for above, below in zip(panels[::2, 0], panels[1::2, 0]):
        above.set_ylabel("training loss")
        below.set_ylabel("less stock's")
    _legend(figure, panels[0, 0])
    return figure


def _losses(above: Axes, below: Axes, rows: Sequence[Row], theme: Theme) -> None:
    stock = _means(rows, STOCK)
    for method, colour in LOSSES.items():
        means = _means(rows, method)
        steps = [rows[0]["steps_per_loss"] * (i + 0.5) for i in range(len(means))]
        style = {"color": getattr(theme, colour), "linewidth": 1.0}
        if method == STOCK:  # below the others
            style |= {"linewidth": 4.0, "alpha": 0.5}
        if means:
            above.plot(steps, means, label=method, **style)
        if means and stock:
            below.plot(steps, [own - base for own, base in zip(means, stock)], **style)
    _plain(above)
    _plain(below)


def _means(rows: Sequence[Row], method: str) -> list[float]:
    """Of each point of the curves of a method's seeds; NaN from where one diverged."""
    curves = [[math.nan if loss is None else loss for loss in row["losses"]] for row in rows if row["method"] == method]
    return [sum(each) / len(each) for each in zip(*curves)]


def _plain(panel: Axes) -> None:
    panel.grid(linewidth=0.5)
    panel.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, panel: Axes) -> None:
    figure.legend(*panel.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
