"""The report as a matplotlib figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphopt.report.grouping import grouped
from graphopt.report.text import amount, percent, size, unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from graphopt.report import Report

COLOURS = "#9aa0a6", "#1a73e8"
LARGEST = 12


def plot(report: Report) -> Figure:
    """Two bars for each of the modules that save most, in the order of the model; the others are summed below them."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Report.plot() needs matplotlib: pip install "graphopt[plot]"') from error
    scale, name = unit(report)
    labels, before, now = _bars(report)
    figure = Figure(figsize=(9, 1.5 + 0.42 * max(len(labels), 1)), layout="constrained")
    axes = figure.subplots()
    for side, sizes, offset, colour in zip(("stock Inductor", "lowmem"), (before, now), (-0.2, 0.2), COLOURS):
        places = [place + offset for place in range(len(labels))]
        total = size(report.bytes_before if offset < 0 else report.bytes_now)
        bars = axes.barh(places, [each / scale for each in sizes], 0.36, color=colour, label=f"{side}, {total}")
        axes.bar_label(bars, [amount(each, scale) or "0" for each in sizes], padding=3, fontsize=8, color="#555555")
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.set(xlabel=f"{name} saved for backward", title=f"Saved tensors by module: {percent(report)}")
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best")
    return figure


def _bars(report: Report) -> tuple[list[str], list[int], list[int]]:
    groups = grouped(report)
    shown = sorted(groups, key=lambda group: -max(group.sizes))[:LARGEST]
    # an empty bar says nothing: what is below a thousandth of the largest goes with the rest
    shown = [group for group in shown if 1000 * max(group.sizes) >= max(shown[0].sizes)]
    bars = [(group.module, *group.sizes) for group in groups if group in shown]
    rest = [group.sizes for group in groups if group not in shown]
    if rest:
        bars.append((f"{len(rest)} others", sum(each[0] for each in rest), sum(each[1] for each in rest)))
    return [bar[0] for bar in bars], [bar[1] for bar in bars], [bar[2] for bar in bars]
