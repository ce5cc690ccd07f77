"""The report as plain text, 100 columns wide."""

from __future__ import annotations

import textwrap
from collections import Counter
from typing import TYPE_CHECKING

from graphopt.report.grouping import Row, block_names, events_by_text, grouped

if TYPE_CHECKING:
    from graphopt.report import Report

WIDTH = 100
EXAMPLES = 4
HEADINGS = ("saved tensor", "dtype", "shape", "stock", "lowmem", "stock", "lowmem", "read by backward of")
LIMITS = 23, 14, 20, 6, 6


def text(report: Report) -> str:
    """Totals, a table of saved tensors by module, and the passes."""
    plan = [str(report.plan)] if report.plan else []
    return "\n\n".join((_totals(report), _table(report), *plan, _passes(report)))


def size(count: int) -> str:
    """Bytes with their unit: kB, MB and GB are 10^3, 10^6 and 10^9 bytes."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:,.2f} {name}"
    return f"{count} B"


def unit(report: Report) -> tuple[float, str]:
    """What a table of the report counts in: MB, or kB where all of it is less than one."""
    return (1e6, "MB") if max(report.bytes_before, report.bytes_now) >= 1e6 else (1e3, "kB")


def unit_note(report: Report) -> str:
    scale, name = unit(report)
    return f"{name} = {int(scale):,} bytes"


def amount(count: int, scale: float) -> str:
    """A cell of such a table; blank for nothing."""
    if not count:
        return ""
    return f"{count / scale:,.1f}" if count >= 0.05 * scale else "<0.1"


def short(operator: str) -> str:
    """An operator without PyTorch's namespaces; attention by its kernel."""
    return operator.removeprefix("aten.").removeprefix("prims.").removeprefix("_").removeprefix("scaled_dot_product_")


def percent(report: Report) -> str:
    return f"{100 * report.fraction:.1f} % of stock" if report.bytes_before else "stock saves nothing"


def changes(report: Report) -> dict[str, tuple[int, int]]:
    """How many tensors, and bytes, are gone, kept and new."""
    pairs = report.pairs
    found = {}
    for state in ("gone", "kept", "new"):
        sizes = [pair.bytes_now or pair.bytes_before for pair in pairs if pair.state == state]
        found[state] = len(sizes), sum(sizes)
    return found


def where(modules: Counter[str], limit: int | None = None) -> str:
    """Modules by name, with how often."""
    parts = [module + (f" ({count})" if count > 1 else "") for module, count in modules.items()]
    rest = len(parts) - limit if limit else 0
    return ", ".join(parts[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _totals(report: Report) -> str:
    state = ", ".join(f"{name} {count} ({size(total)})" for name, (count, total) in changes(report).items())
    return "\n".join((
        f"graphopt: tensors saved for backward, {report.options}",
        f"  stock Inductor {size(report.bytes_before):>11} in {len(report.before):,}",
        f"  lowmem         {size(report.bytes_now):>11} in {len(report.now):,}, {percent(report)}",
        f"  tensors {state}; {unit_note(report)}",
    ))  # fmt: skip


def _table(report: Report) -> str:
    groups = grouped(report)
    if not groups:
        return "No tensor is saved."
    scale, name = unit(report)
    lines: list[tuple[str, ...]] = [("", "", "", "count", "", name, "", ""), HEADINGS]
    for group in groups:
        lines.append((group.module, "", "", "", "", *(amount(each, scale) for each in group.sizes), ""))
        lines.extend(_cells(row, scale) for row in group.rows)
    total = report.bytes_before, report.bytes_now
    lines.append(("all", "", "", str(len(report.before)), str(len(report.now)), *(amount(n, scale) for n in total), ""))
    return "\n".join(_aligned(lines))


def _cells(row: Row, scale: float) -> tuple[str, ...]:
    counts = (str(count or "") for count in row.counts)
    sizes = (amount(each, scale) for each in row.sizes)
    shape = "x".join(map(str, row.shape)) or "scalar"
    return "  " + short(row.operator), row.dtype, shape, *counts, *sizes, ", ".join(row.readers) or "outside modules"


def _aligned(lines: list[tuple[str, ...]]) -> list[str]:
    """The lines in columns; module names may run on to the bytes, readers go on below themselves."""
    tensors = [line for line in lines if line[0].startswith("  ")]
    widths = [min(max(len(line[i]) for line in (*tensors, HEADINGS)), limit) for i, limit in enumerate(LIMITS)]
    widths += [max(len(line[i]) for line in lines) for i in (5, 6)]
    left = sum(widths[:5]) + 4
    readers = max(WIDTH - left - sum(widths[5:]) - 4, 16)
    shown = []
    for line in lines:
        runs_on = line[1] == line[3] == ""
        cells = (_cut(cell, width).rjust(width) if i > 2 else _cut(cell, width).ljust(width)
                 for i, (cell, width) in enumerate(zip(line, widths[:5])))  # fmt: skip
        start = line[0].ljust(left) if runs_on else " ".join(cells)
        sizes = " ".join(cell.rjust(width) for cell, width in zip(line[5:7], widths[5:]))
        wrapped = textwrap.wrap(line[7], readers, break_long_words=False) or [""]
        shown.append(f"{start} {sizes}  {wrapped[0]}".rstrip())
        shown.extend(" " * (left + sum(widths[5:]) + 4) + more for more in wrapped[1:])
    return shown


def _cut(cell: str, width: int) -> str:
    return cell if len(cell) <= width else cell[: width - 2] + ".."


def _passes(report: Report) -> str:
    names = block_names(report)
    head = f"{'pass':<18}{'fired':>7}{'left alone':>12}{'nodes added':>13}{'removed':>9}{'seconds':>9}"
    lines = [f"{head}{'backward asks for':>26}"]
    for record in report.records:
        counts = f"{len(record.fired):>7}{len(record.left_alone):>12}{record.nodes_added:>13}{record.nodes_removed:>9}"
        asks = f"{size(record.bytes_before)} -> {size(record.bytes_after)}" if record.bytes_before else ""
        lines.append(f"{record.name:<18}{counts}{record.seconds:>9.2f}{asks:>26}")
        for title, events in (("fired", record.fired), ("left alone", record.left_alone)):
            for said, modules in events_by_text(events, names).items():
                lines.extend(_paragraph(f"{title} {modules.total()} x: {said}", 2))
                lines.extend(_paragraph(where(modules, EXAMPLES), 6))
    return "\n".join(lines)


def _paragraph(said: str, indent: int) -> list[str]:
    return textwrap.wrap(said, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * (indent + 4))
