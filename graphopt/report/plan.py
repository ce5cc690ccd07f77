"""A plan, and the curve of plans, as text and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from graphopt.report.grouping import name_blocks
from graphopt.report.text import size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from graphopt.plan import Choice, Plan

HEADINGS = ("value", "shape", "decision", "bytes", "now", "time", "error", "why")
LABELS = {"time": "time beyond a step", "error": "error of the gradient"}


def text(plan: Plan) -> str:
    """Totals, and every choice by module, repeated blocks in one row."""
    share = f", {plan.bytes / plan.stock:.1%} of stock" if plan.stock else ""
    head = (
        f"plan {plan.graph} for {plan.goal}\n"
        f"  saves {size(plan.bytes)}{share}; estimated: {plan.time:.1%} more time, gradient error {plan.error:.2g}"
    )
    return "\n".join((head, "", *_table(plan))) if plan.choices else head


def _table(plan: Plan) -> list[str]:
    names = name_blocks((each.module, (each.operator, each.shape, each.decision)) for each in plan.choices)
    rows: dict[tuple[object, ...], list[Choice]] = {}
    for each in plan.choices:
        rows.setdefault((names[each.module], each.operator, each.shape, each.decision), []).append(each)
    lines: list[tuple[str, ...]] = [HEADINGS]
    module = None
    for key, choices in rows.items():
        if key[0] != module:
            module = key[0]
            lines.append((str(module), *[""] * 7))
        lines.append(_cells(choices))
    widths = [max(len(line[i]) for line in lines if line[1] or line is HEADINGS) for i in range(7)]
    return [line[0] if not line[1] else _row(line, widths) for line in lines]


def _cells(choices: Sequence[Choice]) -> tuple[str, ...]:
    first = choices[0]
    times = f"{len(choices)} x " if len(choices) > 1 else ""
    return (
        f"  {times}{first.operator}", "x".join(map(str, first.shape)) or "scalar", first.decision,
        size(sum(each.bytes for each in choices)), size(sum(each.bytes_now for each in choices)),
        f"{sum(each.time for each in choices):.1%}", f"{sum(each.error**2 for each in choices) ** 0.5:.2g}", first.why,
    )  # fmt: skip


def _row(line: Sequence[str], widths: Sequence[int]) -> str:
    cells = [cell.ljust(width) if i < 3 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))]
    return "  ".join((*cells, line[7])).rstrip()


def frontier_text(plans: Sequence[Plan]) -> str:
    """One line for each plan: bytes, time, error, and how it differs from the one before."""
    lines = [f"{'saved':>10}{'of stock':>10}{'time':>8}{'error':>9}  against the line above"]
    for before, plan in zip((None, *plans), plans):
        share = f"{plan.bytes / plan.stock:.1%}" if plan.stock else ""
        change = _change(before, plan) if before else ""
        lines.append(f"{size(plan.bytes):>10}{share:>10}{plan.time:>8.1%}{plan.error:>9.2g}  {change}".rstrip())
    return "\n".join(lines)


def _change(before: Plan, plan: Plan) -> str:
    found: dict[str, int] = {}
    for here, there in before.diff(plan):
        said = f"{here.decision if here else 'recompute'} -> {there.decision if there else 'recompute'}"
        found[said] = found.get(said, 0) + 1
    parts = [f"{count} {said}" for said, count in found.items() if len(set(said.split(" -> "))) > 1]
    return ", ".join(parts[:3]) + (f" and {len(parts) - 3} more" if len(parts) > 3 else "")


def frontier_plot(plans: Sequence[Plan], chosen: Plan | None) -> Figure:
    """Bytes against time and against error, a dot for each plan and a ring around the one that applies."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Frontier.plot() needs matplotlib: pip install "graphopt[plot]"') from error
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("time", "error")):
        axes.plot(*zip(*(_point(plan, name) for plan in plans)), "o-", ms=4, color="#1a73e8")
        if chosen is not None:
            axes.plot(*_point(chosen, name), "o", ms=11, mfc="none", color="#d93025")
        axes.set(xlabel="saved bytes (% of stock)", ylabel=f"estimated {LABELS[name]} (%)")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _point(plan: Plan, name: str) -> tuple[float, float]:
    return 100 * plan.bytes / max(plan.stock, 1), 100 * float(getattr(plan, name))
