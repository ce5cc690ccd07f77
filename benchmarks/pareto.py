"""Bytes against time and gradient error of six transformer blocks: lowmem's plans beside torch's own ways to save.

    python benchmarks/pareto.py                            # benchmarks/results/pareto.json and docs/pareto.svg
    python benchmarks/pareto.py --draw                     # the picture again, from the JSON
    python benchmarks/pareto.py --blocks vit-full --steps 2 --out /tmp/pareto.json   # and /tmp/pareto.svg

Measured as blocks.py does it, all methods of a block in turn in one process, but with one cache of compiled kernels for
all of them. What should hold is printed behind: to each activation_memory_budget a plan with no more bytes that is no
slower, to the fp8 pass one with fewer bytes and less error, and budgets that are kept.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from blocks import RESULTS, parser, record
from claims import BUDGET, LOWMEM_BUDGET, Answer, Row, against_budgets, against_fp8, broken_promises
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from methods import CHECKPOINT, STOCK
from table import NAMES
from torch._inductor.utils import fresh_cache

PICTURE = Path(__file__).parent.parent / "docs" / "pareto.svg"
METHODS = (
    STOCK,
    *(f"{BUDGET}{fraction}" for fraction in (0.8, 0.5, 0.3, 0.1)),
    "fp8",
    CHECKPOINT,
    *(f"{LOWMEM_BUDGET}{fraction}" for fraction in (0.5, 0.35, 0.25, 0.15, 0.1, 0.06)),
    *(f"lowmem:{preset}" for preset in ("exact", "compressed", "smallest")),
)
GREY, ORANGE, BLUE = "#666666", "#d9730d", "#1f5fbf"
# label, colour, marker, line, and which methods
SERIES: tuple[tuple[str, str, str, str, Callable[[str], bool]], ...] = (
    ("Inductor", GREY, "o", "", lambda method: method == STOCK),
    ("activation_memory_budget", ORANGE, "s", "-", lambda method: method.startswith(BUDGET)),
    ("fp8 pass", ORANGE, "X", "", lambda method: method == "fp8"),
    ("checkpoint", ORANGE, "^", "", lambda method: method == CHECKPOINT),
    ("lowmem, memory_budget", BLUE, "o", "-", lambda method: method.startswith(LOWMEM_BUDGET)),
    ("lowmem:exact", BLUE, "v", "", lambda method: method == "lowmem:exact"),
    ("lowmem:compressed", BLUE, "D", "", lambda method: method == "lowmem:compressed"),
    ("lowmem:smallest", BLUE, "*", "", lambda method: method == "lowmem:smallest"),
)


def main() -> None:
    arguments_of = parser("Measure bytes against time and gradient error.", "pareto")
    arguments_of.add_argument("--draw", action="store_true", help="measure nothing, draw the results that are there")
    arguments = arguments_of.parse_args()
    arguments.out = arguments.out or RESULTS / "pareto.json"
    if arguments.draw:
        results = json.loads(arguments.out.read_text())
    else:
        # kernels are kept for the next method, graphs are not: each is compiled under its own settings
        no_graphs = functorch_config.patch(enable_autograd_cache=False), inductor_config.patch(fx_graph_cache=False)
        with fresh_cache(), no_graphs[0], no_graphs[1]:
            results = record(arguments, METHODS, "pareto", cold=False)
    picture = PICTURE if arguments.out == RESULTS / "pareto.json" else arguments.out.with_suffix(".svg")
    # without a date and with text as text: the same figures make the same small file
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pareto", "font.size": 8}):
        draw(results["rows"]).savefig(picture, metadata={"Date": None})
    print(f"wrote {picture}")
    for answer in (*against_budgets(results["rows"]), *against_fp8(results["rows"])):
        print(_line(answer))
    for text in broken_promises(results["rows"]):
        print(f"does not hold: {text}")


def draw(rows: Sequence[Row]) -> Figure:
    """One column for each block: bytes against time above, against gradient error below."""
    blocks = list(dict.fromkeys(row["block"] for row in rows))
    figure = Figure(figsize=(2.1 * max(len(blocks), 3), 4.8), layout="constrained", facecolor="white")
    panels = figure.subplots(2, len(blocks), sharex=True, sharey="row", squeeze=False)
    for block, (above, below) in zip(blocks, panels.T):
        own = [row for row in rows if row["block"] == block]
        above.set_title(NAMES[block], fontsize=8)
        _panel(above, own, "step_ratio")
        _panel(below, [row for row in own if row["gradient_error"]], "gradient_error")
        below.set_xlabel("saved bytes, of stock's")
        if not below.lines:
            below.text(0.5, 0.5, "not comparable", ha="center", color=GREY, transform=below.transAxes)
    panels[0, 0].set_ylabel("step time, of stock's")
    panels[1, 0].set_ylabel("gradient error")
    panels[1, 0].set_yscale("log")
    panels[0, 0].set_xscale("log")
    ticks = (0.05, 0.1, 0.2, 0.5, 1)
    panels[0, 0].set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
    panels[0, 0].minorticks_off()
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    return figure


def _panel(panel: Axes, rows: Sequence[Row], what: str) -> None:
    for label, colour, marker, line, belongs in SERIES:
        found = sorted((row["saved_of_stock"], row[what]) for row in rows if belongs(row["method"]))
        if found:
            panel.plot(*zip(*found), label=label, color=colour, marker=marker, linestyle=line or "none", markersize=4,
                       linewidth=1)  # fmt: skip
    panel.grid(color="#e5e5e5", linewidth=0.5)
    panel.spines[["top", "right"]].set_visible(False)


def _line(answer: Answer) -> str:
    about = f"{answer.theirs['block']:13s} {_figures(answer.theirs):60s}"
    if answer.ours is None:
        return f"{about} does not hold: no plan"
    return f"{about} {'holds' if answer.holds else 'does not hold'}: {_figures(answer.ours)}"


def _figures(row: dict[str, Any]) -> str:
    error = "" if row["gradient_error"] is None else f", error {row['gradient_error']:.4f}"
    return f"{row['method']} {row['saved_units']:.2f} units, step x{row['step_ratio']:.2f}{error}"


if __name__ == "__main__":
    main()
