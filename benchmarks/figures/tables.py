"""Markdown of results of whole blocks: blocks.json and pareto.json. What every table needs is here too."""

from collections.abc import Callable, Iterable
from statistics import median

from figures.claims import LOWMEM_BUDGET, NOISE, Answer, Row, against_budgets, against_fp8, broken_promises, budget
from figures.fidelity_claims import STOCK

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


def markdown(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def measured_on(results: Row, packages: Iterable[str]) -> str:
    """Where figures come from, in a small line: hardware, versions, commits, command; "" where it is not known."""
    if "hardware" not in results:
        return ""
    versions = (f"{name} {results['versions'][name]}" for name in packages if name in results["versions"])
    where = [results, *results["rows"]]
    commits = dict.fromkeys(each["commit"] for each in where if each.get("commit"))
    commands = dict.fromkeys(each["command"] for each in where if each.get("command"))
    if len(commands) > 1:  # without their arguments
        commands = dict.fromkeys(" ".join(command.split()[:2]) for command in commands)
    by = ", ".join(f"`{command}`" for command in commands)
    if commits:
        by = f"{'commit' if len(commits) == 1 else 'commits'} {', '.join(commits)}{by and f': {by}'}"
    parts = (results["hardware"], ", ".join(versions), by)
    return f"<sub>Measured on {'; '.join(part for part in parts if part)}</sub>"


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


def render_glance(results: Row) -> str:
    """One table, a row for each method SHOWN: the least and the most that it shows over all blocks."""
    stock = {row["block"]: row for row in results["rows"] if row["method"] == STOCK}
    lines = []
    for method in SHOWN[1:]:
        own = [row for row in results["rows"] if row["method"] == method]
        calls = [row["first_call_seconds"] / stock[row["block"]]["first_call_seconds"] for row in own]
        errors = [row["gradient_error"] for row in own if row["gradient_error"] is not None]
        spans = (
            _span([row["saved_of_stock"] for row in own], ".0%"),
            _span([row["step_ratio"] for row in own], ".2f"),
            _span(errors, ".3f"),
            _span(calls, ".1f"),
        )
        lines.append([f"`{method}`", *spans])
    blocks = f"{len(stock)} transformer blocks"
    return (
        f"{blocks}, {results['dtype']}, torch {results['torch']}, {results['device'].upper()}: saved bytes, step time "
        "and seconds of the first call, which compiles, by stock Inductor's, and gradient error against float32; the "
        "least and the most of the blocks.\n\n"
        + markdown(["method", "saved bytes", "step time", "gradient error", "first call"], lines)
    )


def _span(values: list[float], form: str) -> str:
    least, most = (format(each, form) for each in (min(values), max(values)))
    return least if least == most else f"{least} – {most}"


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
        + markdown(["`memory_budget`", *(NAMES[block] for block in blocks)], lines)
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
    return markdown(["block", "torch", "", "`lowmem`", "", "holds"], lines)


def _table(rows: dict[tuple[str, str], Row], cell: Callable[[Row], str]) -> str:
    blocks, methods = dict.fromkeys(block for block, _ in rows), dict.fromkeys(method for _, method in rows)
    lines = []
    for block in blocks:
        found = (rows.get((block, method)) for method in methods)
        lines.append([NAMES[block], *(cell(row) if row else "–" for row in found)])
    return markdown(["block", *(f"`{method}`" for method in methods)], lines)


def _memory(row: Row) -> str:
    return f"{row['saved_units']:.1f} ({row['saved_of_stock']:.0%})"


def _peak(row: Row) -> str:
    return f"{row['peak_units']:.1f}"


def _cost(row: Row) -> str:
    error = "–" if row["gradient_error"] is None else f"{row['gradient_error']:.4f}"
    return f"{row['step_ratio']:.2f} / {error}"


def render_first_call(results: Row) -> str:
    """One table of first_call.json: a row for each model and way to compile it, a column for each method."""
    found = {(row["model"], row["way"], row["method"]): row for row in results["rows"]}
    methods = list(dict.fromkeys(method for _, _, method in found))
    lines = []
    for model, way in dict.fromkeys((model, way) for model, way, _ in found):
        stock = found[model, way, STOCK]

        def cell(row: Row, stock: Row = stock) -> str:
            ratios = [own / other for own, other in zip(row["seconds"], stock["seconds"])]
            compared = "" if row is stock else f" ({median(ratios):.2f})"
            return f"{median(row['seconds']):.0f}{compared} / {row['saved_bytes'] / 2**20:.1f}"

        lines.append([f"{model}, {way}", *(cell(found[model, way, method]) for method in methods)])
    rounds = len(results["rows"][0]["seconds"])
    return (
        f"Seconds of the first forward and backward of models of {results['layers']} layers, {results['batch']} × "
        f"{results['length']} tokens, no cache; in brackets by stock Inductor's of the same round / saved MiB; "
        f"the median of {rounds} round{'s' * (rounds > 1)}:\n\n"
        + markdown(["model", *(f"`{method}`" for method in methods)], lines)
    )
