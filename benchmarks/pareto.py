"""Bytes against time and gradient error of six transformer blocks: lowmem's plans beside torch's own ways to save.

    python benchmarks/pareto.py     # writes benchmarks/results/pareto.json
    python benchmarks/pareto.py --blocks vit-full --steps 2 --out /tmp/pareto.json

Measured as blocks.py does it, all methods of a block in turn in one process, but with one cache of compiled kernels for
all of them. What should hold is printed behind: to each activation_memory_budget a plan with no more bytes that is no
slower, to the fp8 pass one with fewer bytes and less error, and budgets that are kept. report.py draws it.
"""

from typing import Any

import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from blocks import parser, record
from figures.claims import BUDGET, LOWMEM_BUDGET, Answer, against_budgets, against_fp8, broken_promises
from methods import CHECKPOINT, STOCK
from torch._inductor.utils import fresh_cache

METHODS = (
    STOCK,
    *(f"{BUDGET}{fraction}" for fraction in (0.8, 0.5, 0.3, 0.1)),
    "fp8",
    CHECKPOINT,
    *(f"{LOWMEM_BUDGET}{fraction}" for fraction in (0.5, 0.35, 0.25, 0.15, 0.1, 0.06)),
    *(f"lowmem:{preset}" for preset in ("exact", "compressed", "smallest")),
)


def main() -> None:
    arguments = parser("Measure bytes against time and gradient error.", "pareto").parse_args()
    # kernels are kept for the next method, graphs are not: each is compiled under its own settings
    no_graphs = functorch_config.patch(enable_autograd_cache=False), inductor_config.patch(fx_graph_cache=False)
    with fresh_cache(), no_graphs[0], no_graphs[1]:
        results = record(arguments, METHODS, "pareto", cold=False)
    for answer in (*against_budgets(results["rows"]), *against_fp8(results["rows"])):
        print(_line(answer))
    for text in broken_promises(results["rows"]):
        print(f"does not hold: {text}")


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
