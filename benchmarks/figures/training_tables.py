"""Markdown of results of training: fidelity.json, held-out losses of fine-tuning; train.json, steps of whole models."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from figures.fidelity_claims import STOCK, Change, Estimate, broken_promises, changes, saved_of_stock
from figures.tables import SHOWN, Row, markdown

FAMILIES = {"gpt2": "GPT-2", "llama": "Llama", "bert": "BERT", "vit": "ViT"}


def render_fidelity(results: Row) -> str:
    """One table of held-out losses: a row for each task, stock's mean, and the change under every other method."""
    rows = results["rows"]
    losses = {(each.task, each.method): each for each in changes(rows)}
    accuracy = {each.task: each.stock for each in changes(rows, "accuracy") if each.method == STOCK}
    saved = saved_of_stock(rows)
    methods = [method for method in _methods(rows) if method != STOCK]
    lines = []
    for task in dict.fromkeys(task for task, _ in losses):
        before = statistics.fmean(row["loss_before"] for row in rows if (row["task"], row["method"]) == (task, STOCK))
        stock = f"{_loss(losses[task, STOCK].own)}<br>before: {before:.2f}"
        if task in accuracy:
            stock += f"<br>{_percent(accuracy[task])}"
        found = (losses.get((task, method)) for method in methods)
        cells = ("<br>".join(filter(None, (_difference(each), _share(each, saved)))) if each else "–" for each in found)
        lines.append([task_name(task), stock, *cells])
    return (
        f"Held-out loss after fine-tuning in {_dtype(results)}: mean ± standard error over {_seeds(rows)} "
        "under stock Inductor, the loss before it, and for classifiers the accuracy. Then what a method changes, ± the "
        "standard error of differences seed by seed, and its saved bytes as a share of stock's. Bold: more than two "
        "standard errors of stock's mean. A change of several errors of its own is systematic, however small.\n\n"
        + markdown(["task", f"`{STOCK}`", *(f"`{method}`" for method in methods)], lines)
    )


def render_fidelity_details(results: Row) -> str:
    """One table, a row for each task and method; then what does not hold of the presets."""
    rows = results["rows"]
    accuracy = {(each.task, each.method): each for each in changes(rows, "accuracy")}
    saved = saved_of_stock(rows)
    order = _methods(rows)
    lines, last = [], None
    for each in sorted(changes(rows), key=lambda each: (_tasks(rows).index(each.task), order.index(each.method))):
        right = accuracy.get((each.task, each.method))
        change = ["", ""] if each.method == STOCK else [_difference(each), f"{each.largest:.4f}"]
        lines.append(
            [
                task_name(each.task) if each.task != last else "",
                f"`{each.method}`",
                _loss(each.own),
                *change,
                _percent(right.own) if right else "",
                _share(each, saved),
            ]
        )
        last = each.task
    broken = list(broken_promises(rows))
    head = ["task", "method", "held-out loss", "change", "largest of a seed", "accuracy", "saved, of stock's"]
    return (
        f"Fine-tuning in {_dtype(results)}, {_seeds(rows)}: means ± standard errors. Bold: a change of more "
        f"than two standard errors of stock's mean.\n\n{markdown(head, lines)}"
        + ("\n\nWhat does not hold:\n\n" + "\n".join(f"- {text}" for text in broken) if broken else "")
    )


def render_train(results: Row) -> str:
    """One table of saved bytes, peak and time: a row for each way to train a model, a column for each method SHOWN."""
    rows = results["rows"]
    pairs = " or ".join(map(str, sorted({row["timed_steps"] for row in rows})))
    return (
        "Whole models: saved bytes / peak memory of a step above what is held before it, as shares of stock "
        f"Inductor's / step time as a multiple of stock Inductor's (median of {pairs} pairs):\n\n"
        + _by_setting([row for row in rows if row["method"] in SHOWN], _shares)
    )


def render_train_details(results: Row) -> str:
    """Two tables of every method: bytes; step time, seconds of the first call and gradient error."""
    rows = results["rows"]
    return (
        f"Saved bytes / peak memory of a step above what is held before it, in MiB:\n\n{_by_setting(rows, _bytes)}\n\n"
        "Step time as a multiple of stock Inductor's / seconds of the first call, which compiles / gradient error. A "
        "method may err by twice what its codecs do, beside twice what stock does. In brackets: more than that, so it "
        f"is not timed:\n\n{_by_setting(rows, _costs)}"
    )


def _by_setting(rows: Sequence[Row], cell: Callable[[Row, Row], str]) -> str:
    """A row for each setting, a column for each method; `cell` makes text of a result and stock's in its setting."""
    found = {(_setting(row), row["method"]): row for row in rows}
    methods = _methods(rows)
    lines = []
    for setting in dict.fromkeys(_setting(row) for row in rows):
        family, tuning, precision, size, batch, length = setting
        name = f"{FAMILIES.get(family, family)}, {_tuning(tuning)}, {precision}"
        stock = found.get((setting, STOCK))
        results = (found.get((setting, method)) for method in methods)
        cells = (_cell(row, stock, cell) for row in results)
        lines.append([name, f"{size}, {batch} × {length}", *cells])
    return markdown(["model", "size, batch × length", *(f"`{method}`" for method in methods)], lines)


def _cell(row: Row | None, stock: Row | None, cell: Callable[[Row, Row], str]) -> str:
    if row is None or stock is None:
        return "–"
    return "failed" if row["error"] else cell(row, stock)


def _shares(row: Row, stock: Row) -> str:
    shares = (f"{row[what] / stock[what]:.0%}" if stock[what] else "–" for what in ("saved_bytes", "peak_bytes"))
    return " / ".join([*shares, _ratio(row)])


def _bytes(row: Row, stock: Row) -> str:
    text = " / ".join(f"{row[what] / 2**20:.1f}" for what in ("saved_bytes", "peak_bytes"))
    return f"{text}<br>{row['host_bytes'] / 2**20:.1f} on the host" if row["host_bytes"] else text


def _costs(row: Row, stock: Row) -> str:
    seconds = "–" if row["first_call_seconds"] is None else f"{row['first_call_seconds']:.0f} s"
    error = "–" if row["gradient_error"] is None else f"{row['gradient_error']:.4f}"
    return f"{_ratio(row)} / {seconds} / {error if row['passed'] else f'({error})'}"


def _ratio(row: Row) -> str:
    return "–" if row["step_ratio"] is None else f"{row['step_ratio']:.2f}"


def _setting(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("family", "tuning", "precision", "size", "batch", "length"))


def task_name(name: str) -> str:
    """gpt2-lora: GPT-2, LoRA."""
    family, _, tuning = name.partition("-")
    return f"{FAMILIES.get(family, family)}, {_tuning(tuning)}"


def _tuning(name: str) -> str:
    return "LoRA" if name == "lora" else name


def _methods(rows: Sequence[Row]) -> list[str]:
    """Stock, torch's other ways, presets of lowmem from exact on; each as often as it comes."""
    presets = ("exact", "compressed", "smallest", "paper")

    def place(method: str) -> tuple[bool, bool, int, str]:
        preset = method.split(":")[1] if method.startswith("lowmem:") else ""
        at = presets.index(preset) if preset in presets else len(presets)
        return method != STOCK, method.startswith("lowmem"), at, method

    return sorted({row["method"] for row in rows}, key=place)


def _tasks(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["task"] for row in rows))


def _seeds(rows: Sequence[Row]) -> str:
    count = len({row["seed"] for row in rows})
    return f"{count} {'seed' if count == 1 else 'seeds'}"


def _dtype(results: Row) -> str:
    return "float32 under autocast to bfloat16" if results["dtype"] == "autocast" else str(results["dtype"])


def _loss(found: Estimate) -> str:
    return f"{found.mean:.4f}{_error(found, 1, 4)}"


def _percent(found: Estimate) -> str:
    return f"{100 * found.mean:.1f}{_error(found, 100, 1)}%"


def _error(found: Estimate, scale: int, digits: int) -> str:
    return "" if math.isnan(found.error) else f" ± {scale * found.error:.{digits}f}"


def _share(change: Change, saved: dict[tuple[str, str], float]) -> str:
    """Saved bytes as a share of stock's, where they were measured."""
    found = saved.get((change.task, change.method))
    return "" if found is None else f"{found:.0%}"


def _difference(change: Change) -> str:
    text = f"{change.difference.mean:+.4f}{_error(change.difference, 1, 4)}"
    return text if change.within else f"**{text}**"
