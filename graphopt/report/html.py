"""The report as HTML: a fragment for notebooks, a page to keep. No scripts; folds are <details>, bars are divs."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from graphopt.pipeline import Event, PassRecord
from graphopt.report.grouping import OUTSIDE, Group, Pair, block_names, events_by_text, grouped
from graphopt.report.text import amount, changes, percent, short, size, unit, unit_note, where

if TYPE_CHECKING:
    from graphopt.report import Report

STYLE = """
.graphopt{--ink:#1f2328;--soft:#656d76;--line:#d8dee4;--ground:#fff;--stock:#9aa0a6;--lowmem:#1a73e8;
 color:var(--ink);background:var(--ground);font:14px/1.45 system-ui,sans-serif;padding:1em;max-width:88em}
@media (prefers-color-scheme:dark){.graphopt{--ink:#e6edf3;--soft:#8d96a0;--line:#30363d;--ground:#0d1117;
 --stock:#6e7681;--lowmem:#58a6ff}}
.graphopt h2{font-size:1.25em;margin:0 0 .6em}.graphopt h3{font-size:1em;margin:1.6em 0 .4em}
.graphopt p{margin:.3em 0}.graphopt .soft{color:var(--soft)}
.graphopt code{font:12px/1.4 ui-monospace,monospace;background:none;color:inherit;overflow-wrap:anywhere}
.graphopt details{border-top:1px solid var(--line)}.graphopt details details{border:0;margin-left:1em}
.graphopt summary{cursor:pointer;padding:.3em 0}
.graphopt .module{display:inline-grid;grid-template-columns:24em minmax(4em,1fr) 5em 5em;gap:0 1em;
 align-items:center;width:calc(100% - 1.5em);vertical-align:middle}
@media (max-width:56em){.graphopt .module{grid-template-columns:12em minmax(2em,1fr) 4em 4em}}
.graphopt .number{text-align:right;font-variant-numeric:tabular-nums}
.graphopt .bar{height:7px;margin:1px 0;min-width:1px;border-radius:2px}
.graphopt .bar.stock{background:var(--stock)}.graphopt .bar.lowmem{background:var(--lowmem)}
.graphopt .wide{overflow-x:auto;margin:0 0 .8em 1em}
.graphopt table{border-collapse:collapse;font-size:12px;background:none;color:inherit;margin:0}
.graphopt th,.graphopt td{text-align:left;padding:2px 10px 2px 0;border:0;
 vertical-align:top;background:none;color:inherit;
 white-space:nowrap}.graphopt .text{white-space:normal;min-width:14em}
.graphopt th{color:var(--soft);font-weight:normal}.graphopt th.number,.graphopt td.number{text-align:right}
.graphopt .gone{text-decoration:line-through;color:var(--soft)}.graphopt .new{color:var(--lowmem)}
"""


def page(report: Report) -> str:
    """A whole document around the fragment."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        '<meta name="viewport" content="width=device-width"><title>graphopt: saved tensors</title>'
        "<style>body{margin:0}@media (prefers-color-scheme:dark){body{background:#0d1117}}"
        ".graphopt{margin:auto}</style>"
        f"</head><body>{fragment(report)}</body></html>\n"
    )


def fragment(report: Report) -> str:
    """Totals, a bar and a fold for each module with every tensor in it, and the passes."""
    return f'<div class="graphopt"><style>{STYLE}</style>{_totals(report)}{_modules(report)}{_passes(report)}</div>'


def _totals(report: Report) -> str:
    largest = max(report.bytes_before, report.bytes_now)
    sides = (
        ("stock Inductor", report.bytes_before, len(report.before), ""),
        ("lowmem", report.bytes_now, len(report.now), percent(report)),
    )
    lines = "".join(
        f"<p><b>{name}</b> {size(count)} in {tensors:,} tensors{', ' + note if note else ''}</p>"
        for name, count, tensors, note in sides
    )
    state = ", ".join(f"{name} {count:,} ({size(total)})" for name, (count, total) in changes(report).items())
    bars = _bars((report.bytes_before, report.bytes_now), largest)
    note = f'<p class="soft">{escape(str(report.options))}; tensors {state}; {unit_note(report)}</p>'
    return f"<h2>Tensors saved for backward</h2>{lines}{bars}{note}"


def _modules(report: Report) -> str:
    groups, (scale, name) = grouped(report), unit(report)
    if not groups:
        return "<p>No tensor is saved.</p>"
    largest = max(max(group.sizes) for group in groups)
    heading = (
        '<p class="soft"><span class="module"><span>made in</span><span></span>'
        f'<span class="number">{name}, stock</span><span class="number">lowmem</span></span></p>'
    )
    return f"<h3>By module</h3>{heading}" + "".join(_module(group, largest, scale) for group in groups)


def _module(group: Group, largest: int, scale: float) -> str:
    cells = "".join(f'<span class="number">{escape(amount(each, scale))}</span>' for each in group.sizes)
    summary = f"<code>{escape(group.module)}</code><div>{_bars(group.sizes, largest)}</div>{cells}"
    heads = "".join(f"<th{_number(head)}>{head}</th>" for head in ("", *_COLUMNS, "stock", "lowmem", *_LAST))
    rows = "".join(_tensor(pair, scale) for row in group.rows for pair in row.pairs)
    table = f'<div class="wide"><table><tr>{heads}</tr>{rows}</table></div>'
    return f'<details><summary><span class="module">{summary}</span></summary>{table}</details>'


_COLUMNS = "operator", "dtype", "shape"
_LAST = "module", "read by backward of", "source"


def _number(head: str) -> str:
    return ' class="number"' if head in ("stock", "lowmem") else ""


def _tensor(pair: Pair, scale: float) -> str:
    facts = pair.as_dict()
    shape = " x ".join(map(str, facts["shape"])) or "scalar"
    cells = (short(facts["operator"]), facts["dtype"], shape)
    sizes = (amount(facts["bytes_before"], scale), amount(facts["bytes_now"], scale))
    readers = ", ".join(facts["readers"]) or OUTSIDE
    inner = f'<td class="{facts["state"]}">{facts["state"]}</td>'
    inner += "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    inner += "".join(f'<td class="number">{escape(cell)}</td>' for cell in sizes)
    inner += f"<td><code>{escape(facts['module'] or OUTSIDE)}</code></td>"
    inner += "".join(f'<td class="text"><code>{escape(cell)}</code></td>' for cell in (readers, facts["source"]))
    return f"<tr>{inner}</tr>"


def _bars(sizes: tuple[int, int], largest: int) -> str:
    widths = (100 * each / largest if largest else 0 for each in sizes)
    return "".join(
        f'<div class="bar {side}" style="width:{width:.1f}%"></div>' if width else ""
        for side, width in zip(("stock", "lowmem"), widths)
    )


def _passes(report: Report) -> str:
    names = block_names(report)
    return "<h3>Passes</h3>" + "".join(_pass(record, names) for record in report.records)


def _pass(record: PassRecord, names: dict[str, str]) -> str:
    title = (
        f"<b>{escape(record.name)}</b> fired {len(record.fired)} times, left {len(record.left_alone)} alone "
        f'<span class="soft">{record.nodes_added} nodes added, {record.nodes_removed} removed, '
        f"{record.seconds:.2f} s</span>"
    )
    inner = _events("fired", record.fired, names) + _events("left alone", record.left_alone, names)
    return f"<details><summary>{title}</summary>{inner}</details>"


def _events(title: str, events: list[Event], names: dict[str, str]) -> str:
    said = []
    for text, modules in events_by_text(events, names).items():
        summary = f"{title} {modules.total()} times: {escape(text)}<br><code>{escape(where(modules))}</code>"
        rows = "".join(
            f"<tr><td><code>{escape(event.module or OUTSIDE)}</code></td><td><code>{escape(event.node)}</code></td>"
            f"<td><code>{escape(event.source)}</code></td></tr>"
            for event in events
            if event.text == text
        )
        table = f'<div class="wide"><table>{rows}</table></div>'
        said.append(f"<details><summary>{summary}</summary>{table}</details>")
    return "".join(said)
