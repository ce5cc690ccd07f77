"""Write the figures of benchmarks/results into the documents, each between its two markers; --check only compares."""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from claims import LOWMEM_BUDGET, NOISE, Answer, against_budgets, against_fp8, broken_promises, budget

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]
NAMES = {
    "vit-full": "ViT, full",
    "vit-dropout": "ViT, dropout 0.1",
    "vit-lora": "ViT, LoRA on all linears",
    "vit-lora-qkv": "ViT, LoRA on qkv only",
    "llama-full": "Llama, full",
    "llama-lora": "Llama, LoRA on all linears",
}


SHOWN = (
    "inductor",
    "budget-0.5",
    "fp8",
    "checkpoint",
    *(f"lowmem:{each}" for each in ("exact", "compressed", "smallest", "paper")),
)


class Place(NamedTuple):
    """Where figures stand: a document, the name of its markers, the files of results and what makes text of one."""

    document: str
    marker: str
    results: str
    render: Callable[[Row], str]

    def filled(self, old: str) -> str | None:
        """The document with the present figures; None where it has no such place."""
        begin, end = f"<!-- {self.marker}:begin -->", f"<!-- {self.marker}:end -->"
        if begin not in old:
            return None
        texts = [self.render(json.loads(path.read_text())) for path in sorted(RESULTS.glob(self.results))]
        if not texts:
            raise FileNotFoundError(f"{self.document} has figures of {self.results}, which benchmarks/results lacks")
        body = "\n\n".join(texts)
        return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{body}\n{end}", old, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the figures of benchmarks/results into the documents.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a document is out of date")
    check = parser.parse_args().check
    wrong = []
    for place in PLACES:
        path = ROOT / place.document
        old = path.read_text()
        try:
            new = place.filled(old)
        except FileNotFoundError as error:
            wrong.append(str(error))
            continue
        if new is None:
            print(f"{place.document} has no <!-- {place.marker}:begin -->: nothing to write")
        elif check and new != old:
            wrong.append(f"the figures of {place.document} are not those of benchmarks/results: make readme")
        elif not check and new != old:
            path.write_text(new)
    if wrong:
        sys.exit("\n".join(wrong))


def render_blocks(results: Row) -> str:
    """Three Markdown tables of one results file, of the methods SHOWN: memory; peak memory; time and gradient error."""
    found = {(row["block"], row["method"]): row for row in results["rows"] if row["method"] in SHOWN}
    rows = dict(sorted(found.items(), key=lambda item: SHOWN.index(item[0][1])))
    return (
        f"{_setting(results)} Saved bytes in units of one hidden state "
        f"({results['unit_bytes'] / 2**20:g} MiB in bfloat16) and as a share of stock Inductor's:\n\n"
        f"{_table(rows, _memory)}\n\n"
        f"Peak memory of a step above what is held before it, in the same units:\n\n{_table(rows, _peak)}\n\n"
        f"Step time as a multiple of stock Inductor's (median of {results['timed_steps']} pairs) / gradient error "
        f"against float32:\n\n{_table(rows, _cost)}"
    )


def _setting(results: Row) -> str:
    device = results["device"].upper() if results["device"] == "cpu" else results["device"]
    dtype = "float32 under autocast to bfloat16" if results["dtype"] == "autocast" else results["dtype"]
    return (
        f"One block, {dtype}, {results['tokens']} tokens, width {results['width']}, torch {results['torch']}, {device}."
    )


def render_budgets(results: Row) -> str:
    """One table of pareto.json: a row for each memory budget, a column for each block."""
    rows = [row for row in results["rows"] if row["method"].startswith(LOWMEM_BUDGET)]
    found = {(row["block"], budget(row)): row for row in rows}
    blocks = dict.fromkeys(row["block"] for row in rows)
    lines = []
    for fraction in sorted({budget(row) for row in rows}, reverse=True):
        cells = (found.get((block, fraction)) for block in blocks)
        lines.append([f"{fraction:g}", *(f"{_memory(row)}<br>{_cost(row)}" if row else "–" for row in cells)])
    return (
        f"{_setting(results)} Saved bytes in units of one hidden state and as a share of stock Inductor's; below, step "
        f"time as a multiple of stock Inductor's (median of {results['timed_steps']} pairs) / gradient error:\n\n"
        + _markdown(["`memory_budget`", *(NAMES[block] for block in blocks)], lines)
    )


def render_answers(results: Row) -> str:
    """What pareto.json says of lowmem beside torch's own ways, claim by claim."""
    rows = results["rows"]
    broken = list(broken_promises(rows))
    kept = (
        "Every budget is kept; none is faster, or has less error, than a larger one."
        if not broken
        else "What does not hold of budgets:\n\n" + "\n".join(f"- {text}" for text in broken)
    )
    return (
        f"{_setting(results)} To each `activation_memory_budget` the fastest plan with no more bytes, which holds "
        f"if it is slower by at most {NOISE:.0%}. Units / step time / gradient error:\n\n"
        f"{_answers(list(against_budgets(rows)))}\n\n"
        "To the fp8 pass the fastest plan with fewer bytes and less error:\n\n"
        f"{_answers(list(against_fp8(rows)))}\n\n{kept}"
    )


def _answers(answers: list[Answer]) -> str:
    def figures(row: Row) -> str:
        return f"{row['saved_units']:.1f} / {_cost(row)}"

    lines = []
    for theirs, ours, holds in answers:
        own = [f"`{ours['method']}`", figures(ours)] if ours else ["–", "–"]
        lines.append([NAMES[theirs["block"]], f"`{theirs['method']}`", figures(theirs), *own, "yes" if holds else "no"])
    return _markdown(["block", "torch", "", "`lowmem`", "", "holds"], lines)


def _table(rows: dict[tuple[str, str], Row], cell: Callable[[Row], str]) -> str:
    blocks, methods = dict.fromkeys(block for block, _ in rows), dict.fromkeys(method for _, method in rows)
    lines = []
    for block in blocks:
        found = (rows.get((block, method)) for method in methods)
        lines.append([NAMES[block], *(cell(row) if row else "–" for row in found)])
    return _markdown(["block", *(f"`{method}`" for method in methods)], lines)


def _markdown(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def _memory(row: Row) -> str:
    return f"{row['saved_units']:.1f} ({row['saved_of_stock']:.0%})"


def _peak(row: Row) -> str:
    return f"{row['peak_units']:.1f}"


def _cost(row: Row) -> str:
    error = "–" if row["gradient_error"] is None else f"{row['gradient_error']:.4f}"
    return f"{row['step_ratio']:.2f} / {error}"


def render_traffic(results: Row) -> str:
    """Markdown tables of the bytes that CUDA code moves: activations; forward, backward and launches of norms."""
    activations = [row for row in results["rows"] if "place" not in row]
    norms = [row for row in results["rows"] if "place" in row]
    mlp = results["mlp"]
    forwards = [row for row in activations if row["half"] == "forward" and not row["variant"].startswith("kernel")]
    loads = sorted({sum(row["x_loads"]) for row in forwards})
    columns = "stock / fused / kernel"
    return (
        f"Inductor's code for an {results['device']}, {results['dtype']}, torch {results['torch']}, triton "
        f"{results['triton']}; generated, not run. Bytes of a whole half of the training graph, matrix products and "
        f"partial sums included, in units of the operator's input.\n\n"
        f"Linear({mlp['width']}, {mlp['hidden']}), activation, frozen Linear({mlp['hidden']}, {mlp['width']}), "
        f"{mlp['tokens']} tokens: units in forward + backward, and launches beside matrix products and seeds. The "
        f"kernels that Inductor writes for forward load x {' or '.join(map(str, loads))} time(s) in all.\n\n"
        f"{_activations(activations)}\n\n"
        f"Norms, backward, {columns}:\n\n{_norms(norms, 'backward', 'units')}\n\n"
        f"Norms, forward, {columns}; frozen ones move the same:\n\n"
        f"{_norms([row for row in norms if not row['frozen']], 'forward', 'units')}\n\n"
        f"Norms, launches in backward, {columns}:\n\n{_norms(norms, 'backward', 'kernels')}"
    )


def _activations(rows: list[Row]) -> str:
    cells: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        name = row["operator"] + (f", dropout {row['dropout']}" if row["dropout"] else "")
        cells.setdefault(name, {}).setdefault(row["variant"], []).append(row)
    variants = dict.fromkeys(row["variant"] for row in rows)
    lines = []
    for name, found in cells.items():
        pairs = ((forward, backward) for forward, backward in (found[variant] for variant in variants))
        lines.append(
            [name, *(f"{f['units']:.2f} + {b['units']:.2f} ({f['kernels']} + {b['kernels']})" for f, b in pairs)]
        )
    return _markdown(["activation", *variants], lines)


def _norms(rows: list[Row], half: str, what: str) -> str:
    cells: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if row["half"] == half:
            name = f"{row['operator']}, {'frozen' if row['frozen'] else 'trained'}, {row['place']}"
            figure = f"{row[what]:.2f}" if what == "units" else str(row[what])
            cells.setdefault(name, {}).setdefault(f"{row['rows']} × {row['width']}", []).append(figure)
    sizes = dict.fromkeys(size for found in cells.values() for size in found)
    lines = [[name, *(" / ".join(found[size]) for size in sizes)] for name, found in cells.items()]
    return _markdown(["norm", *sizes], lines)


def render_block_traffic(results: Row) -> str:
    """One table: saved units, and traffic and launches of both halves, for each block and method."""
    rows = {(row["block"], row["method"]): row for row in results["rows"]}
    methods = dict.fromkeys(method for _, method in rows)
    lines = []
    for block in dict.fromkeys(block for block, _ in rows):
        found = [rows[block, method] for method in methods]
        lines.append([NAMES[block], "saved", *(f"{row['saved'] / results['unit_bytes']:.1f}" for row in found)])
        for half in ("forward", "backward"):
            halves = (row[half] for row in found)
            cells = (
                f"{each['bytes'] / results['unit_bytes']:.1f} ({each['kernels']} + {each['products']})"
                for each in halves
            )
            lines.append(["", half, *cells])
    return (
        f"Inductor's code for an {results['device']}, {results['dtype']}, {results['tokens']} tokens, width "
        f"{results['width']}, torch {results['torch']}, triton {results['triton']}; generated, not run. Bytes saved, "
        "and bytes moved, in units of one hidden state (Triton kernels + matrix products launched):\n\n"
        + _markdown(["block", "", *(f"`{method}`" for method in methods)], lines)
    )


def render_codecs(results: Row) -> str:
    """One table: a row for each codec."""
    head = ["codec", "bits", *results["rows"][0]["error"], "CPU encode + decode", "CUDA forward", "CUDA backward"]
    lines = []
    for row in results["rows"]:
        cuda = (f"{half['units']:+.2f} ({half['kernels'] - half['kernels_without']})" for half in row["cuda"].values())
        cpu = f"{row['cpu']['encode']} + {row['cpu']['decode']}"
        lines.append([f"`{row['codec']}`", str(row["bits"]), *map(str, row["error"].values()), cpu, *cuda])
    return (
        f"torch {results['torch']}. Errors: |x_ - x| / |x|; others: the channels beside those of outliers. CPU: time "
        f"of each kernel over that of gelu, bfloat16, one thread; a copy takes {results['cpu_copy']}. CUDA: units of x "
        "moved beyond what the same without a codec moves (launches added), by the code that Inductor writes.\n\n"
        + _markdown(head, lines)
    )


def render_codes(results: Row) -> str:
    """One table: a row for each activation and depth, the schemes side by side."""
    rows = {(row["activation"], row["blocks"], row["scheme"]): row for row in results["rows"]}
    schemes = list(dict.fromkeys(scheme for _, _, scheme in rows))
    lines = [["network", *(f"`{scheme}`" for scheme in schemes)], ["---"] * (len(schemes) + 1)]
    for activation, blocks in dict.fromkeys((activation, blocks) for activation, blocks, _ in rows):
        found = (rows[activation, blocks, scheme] for scheme in schemes)
        cells = (f"{row['error']:.3f} / {row['error_of_mean']:.3f} / {row['cosine']:.4f}" for row in found)
        lines.append([f"{activation}, {blocks} {'block' if blocks == 1 else 'blocks'}", *cells])
    return (
        f"ViT blocks with LoRA on qkv, all else frozen, {results['dtype']}, {results['tokens']} tokens, width "
        f"{results['width']}, torch {results['torch']}: relative error of the gradient in one step / of the mean over "
        f"{results['draws']} draws / cosine with the exact gradient of one step.\n\n"
        + "\n".join(f"| {' | '.join(line)} |" for line in lines)
    )


def render_cubins(results: Row) -> str:
    """One table: registers of each kernel over its dtypes, sizes and activations, and what they spill."""
    kernels: dict[str, dict[str, list[Row]]] = {}
    for row in results["rows"]:
        kernels.setdefault(row["kernel"], {}).setdefault(row["arch"], []).append(row)
    archs = sorted({row["arch"] for row in results["rows"]})
    lines = [["kernel", *(f"registers, {arch}" for arch in archs), "builds", "bytes spilled"]]
    lines.append(["---"] * len(lines[0]))
    for kernel, by_arch in kernels.items():
        registers = [[row["registers"] for row in by_arch[arch]] for arch in archs]
        rows = [row for arch in archs for row in by_arch[arch]]
        spilled = sum(row["spill_stores"] + row["spill_loads"] for row in rows)
        ranges = [f"{min(each)} to {max(each)}" for each in registers]
        lines.append([f"`{kernel}`", *ranges, str(len(rows)), str(spilled)])
    return f"Triton {results['triton']}.\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


PLACES = (
    Place("README.md", "results", "blocks.json", render_blocks),
    Place("docs/pareto.md", "budgets", "pareto.json", render_budgets),
    Place("docs/pareto.md", "answers", "pareto.json", render_answers),
    Place("docs/pareto.md", "precisions", "blocks-*.json", render_blocks),
    Place("docs/lowering.md", "traffic", "traffic.json", render_traffic),
    Place("docs/lowering.md", "block traffic", "block_traffic.json", render_block_traffic),
    Place("docs/lowering.md", "cubins", "cubins.json", render_cubins),
    Place("docs/codes.md", "codes", "codes.json", render_codes),
    Place("docs/codecs.md", "codecs", "codecs.json", render_codecs),
)


if __name__ == "__main__":
    main()
