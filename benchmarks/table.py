"""Write the figures of benchmarks/results into the README, between its two markers; --check only compares."""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"

Row = dict[str, Any]
NAMES = {
    "vit-full": "ViT, full",
    "vit-dropout": "ViT, dropout 0.1",
    "vit-lora": "ViT, LoRA on all linears",
    "vit-lora-qkv": "ViT, LoRA on qkv only",
    "llama-full": "Llama, full",
    "llama-lora": "Llama, LoRA on all linears",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the figures of benchmarks/results into the README.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the README is out of date")
    check = parser.parse_args().check
    old = README.read_text()
    if BEGIN not in old:
        print(f"README.md has no {BEGIN}: nothing to write")
        return
    tables = [render(json.loads(path.read_text())) for path in sorted(RESULTS.glob("blocks*.json"))]
    if not tables:
        sys.exit("README.md has a place for figures and benchmarks/results has none: make bench")
    body = "\n\n".join(tables)
    new = re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{body}\n{END}", old, flags=re.DOTALL)
    if check and new != old:
        sys.exit("the figures of README.md are not those of benchmarks/results: make readme")
    if not check:
        README.write_text(new)


def render(results: Row) -> str:
    """Two Markdown tables of one results file: memory; time and gradient error."""
    rows = {(row["block"], row["method"]): row for row in results["rows"]}
    device = results["device"].upper() if results["device"] == "cpu" else results["device"]
    return (
        f"One block, {results['dtype']}, {results['tokens']} tokens, width {results['width']}, "
        f"torch {results['torch']}, {device}. Saved bytes in units of one hidden state "
        f"({results['unit_bytes'] / 2**20:g} MiB) and as a share of stock Inductor's:\n\n"
        f"{_table(rows, _memory)}\n\n"
        f"Peak memory of a step above what is held before it, in the same units:\n\n{_table(rows, _peak)}\n\n"
        f"Step time as a multiple of stock Inductor's (median of {results['timed_steps']} pairs) / gradient error "
        f"against float32:\n\n{_table(rows, _cost)}"
    )


def _table(rows: dict[tuple[str, str], Row], cell: Callable[[Row], str]) -> str:
    blocks, methods = dict.fromkeys(block for block, _ in rows), dict.fromkeys(method for _, method in rows)
    lines = [["block", *(f"`{method}`" for method in methods)], ["---"] * (len(methods) + 1)]
    for block in blocks:
        found = (rows.get((block, method)) for method in methods)
        lines.append([NAMES[block], *(cell(row) if row else "–" for row in found)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _memory(row: Row) -> str:
    return f"{row['saved_units']:.1f} ({row['saved_of_stock']:.0%})"


def _peak(row: Row) -> str:
    return f"{row['peak_units']:.1f}"


def _cost(row: Row) -> str:
    error = "–" if row["gradient_error"] is None else f"{row['gradient_error']:.4f}"
    return f"{row['step_ratio']:.2f} / {error}"


if __name__ == "__main__":
    main()
