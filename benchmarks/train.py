"""Saved bytes, peak memory, time and gradients of steps of whole transformers models, under each way of training them.

    python benchmarks/train.py                                             # four families, full and LoRA, every method
    python benchmarks/train.py --families llama --size 8b --tuning lora --batch 1 2 --length 2048 4096
    python benchmarks/train.py --families gpt2 --size small --fit 24 --vary length       # the longest that fits 24 GiB
    python benchmarks/train.py --quick --out /tmp/train.json               # two steps of a tiny model: does it run?

Methods are those of methods.py, and save_on_cpu (stock Inductor; what it saves moves to the host's memory; on a GPU)
and liger (eager Llama with Liger-Kernel's modules; on a GPU, where it is installed). checkpoint is transformers' own.
bf16: parameters and all else in bfloat16; autocast: float32 parameters, forward in bfloat16.

A step is forward with its loss and backward into fresh gradients, without an optimizer. Bytes are what autograd keeps
on the device between the two, and the step's peak above what is held before it. The time is a ratio to stock Inductor,
the median of pairs of steps run in turn; the first call compiles from an empty cache. Dropout is off and both factors
of LoRA are random, so that all gradients are there and can be compared.

The gradient error is |g - g0| / |g0|, g0 from float32 eager on the same weights and batch; of a model of more than a
billion parameters from stock Inductor. measuring/gate.py says how large it may be; what is further off is not timed.

Rows that the file of results has are not measured again, but for those of methods that failed. If it is of another
machine, or of other versions, it is put aside.
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from architectures import FAMILIES, SIZES
from measuring.baselines import LIGER, OFFLOAD, missing
from measuring.comparison import compared
from measuring.fit import OPTIMIZERS, VARIED, Fit, fitted
from measuring.steps import PRECISIONS, Job, Run, Setting, length_of
from methods import CHECKPOINT, KNOBS, STOCK, warm_up, wrong
from provenance import machine, origin, resumed, write
from rich.console import Console
from rich.progress import Progress

from graphopt.demo import quieten

RESULTS = Path(__file__).parent / "results"
METHODS = (
    STOCK, "eager", "budget-0.5", "aggressive", "fp8", CHECKPOINT, OFFLOAD, LIGER,
    *(f"lowmem:{preset}" for preset in ("exact", "compressed", "smallest", "paper")),
)  # fmt: skip
TUNINGS = ("full", "lora")
QUICK = {"families": ["vit"], "size": "tiny", "tuning": ["full"], "precision": ["bf16"], "batch": [2], "steps": 2}
# what is done once for the first model of a process is no method's first call: a model that is not measured
FIRST = Setting("vit", "tiny", "full", "bf16", batch=2, length=length_of("vit", "tiny", 0), layers=1)
# what makes two rows measure the same; the last three are those of --fit
AXES = ("family", "size", "tuning", "precision", "batch", "length", "fit_gib", "vary", "optimizer")
MIB = 2**20

Row = dict[str, Any]


def main() -> None:
    arguments = parse()
    quieten()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fit = None if arguments.fit is None else Fit(arguments.fit, arguments.vary, arguments.optimizer)
    kinds = ["fit" if fit else "train"] + [device.type] * (device.type != "cpu")
    out = arguments.out or RESULTS / f"{'-'.join(kinds)}.json"
    results = resumed(out, machine())
    methods = list(_available(arguments, device))
    todo = {}
    for setting in dict.fromkeys(_settings(arguments)):
        row = {**setting.row, **(fit.row if fit else {})}
        done = set() if arguments.again else measured(results["rows"], row, None if fit else arguments.steps)
        able = [method for method in methods if not missing(method, device, setting.family)]
        todo[setting] = [method for method in able if method not in done]
    measure = partial(fitted, fit=fit) if fit else partial(compared, steps=arguments.steps, cold=not arguments.quick)
    where = origin()
    console = Console(stderr=True)
    # a limit would mean a silent return to eager; another length is another graph of static shapes
    limits = torch._dynamo.config.patch(
        fail_on_recompile_limit_hit=True, recompile_limit=4 * len(methods), automatic_dynamic_shapes=False
    )
    with limits, Progress(console=console, disable=not console.is_terminal) as progress:
        if any(todo.values()) and not arguments.quick:
            for method in methods:
                if method not in (OFFLOAD, LIGER):  # the first is stock Inductor's, the second compiles nothing
                    warm_up(method, device)
            Run.started(Job.of(FIRST, device), STOCK)
        bar = progress.add_task("", total=sum(map(len, todo.values())))
        for setting, wanted in todo.items():
            title = f"{setting.family}, {setting.tuning}"

            def begin(method: str, title: str = title) -> None:
                progress.update(bar, description=f"{title}, {method}")

            for row in measure(setting, wanted, device, begin) if wanted else ():
                key = _place(row), row["method"]
                others = [each for each in results["rows"] if (_place(each), each["method"]) != key]
                results["rows"] = sorted([*others, {**row, **where}], key=_order)
                write(out, results)
                print(_line_of_fit(row) if fit else _line(row, results["rows"]), flush=True)
                progress.advance(bar)
    print(f"wrote {out}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure steps of transformers models under each way of training.")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--size", default="mini", help=f"{_sizes(FAMILIES)} (default: mini)")
    parser.add_argument("--tuning", nargs="+", choices=TUNINGS, default=list(TUNINGS))
    parser.add_argument("--precision", nargs="+", choices=list(PRECISIONS), default=["bf16"])
    parser.add_argument("--batch", nargs="+", type=int, default=[4], help="sequences or images (default: 4)")
    parser.add_argument("--length", nargs="+", type=int, default=[256], help="tokens of a sequence (default: 256)")
    parser.add_argument("--methods", nargs="+", help="inductor always runs (default: all that this machine has)")
    parser.add_argument("--steps", type=int, default=15, help="steps that are timed, each method in turn")
    parser.add_argument("--fit", type=float, metavar="GIB", help="find the largest batch or length that fits")
    parser.add_argument("--vary", choices=list(VARIED), default="length", help="what is made larger (default: length)")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="none", help="of the steps that are to fit")
    parser.add_argument("--again", action="store_true", help="measure what the file of results has once more")
    parser.add_argument("--quick", action="store_true", help="two steps of one layer: does it run?")
    parser.add_argument("--out", type=Path, help="the JSON written (default: benchmarks/results/train[-cuda].json)")
    arguments = parser.parse_args()
    if arguments.quick:
        if not arguments.out:
            parser.error("--quick measures nothing: it needs --out")
        vars(arguments).update(QUICK)
    lacking = [family for family in arguments.families if arguments.size not in SIZES[family]]
    if lacking:
        parser.error(f"argument --size: there is no {arguments.size!r} of {', '.join(lacking)}; {_sizes(lacking)}")
    if arguments.fit is not None and arguments.vary == "length" and "vit" in arguments.families:
        parser.error("argument --vary: an image has the length that its ViT says; leave vit out, or vary the batch")
    for method in arguments.methods or ():
        why = wrong(method, (*METHODS, *(each for each in KNOBS if each not in METHODS)))
        if why:
            parser.error(f"argument --methods: {method!r} is no method; {why}")
    return arguments


def measured(rows: Sequence[Row], setting: Row, steps: int | None) -> set[str]:
    """The methods that `rows` have figures of in a setting, from as many timed steps."""
    same = (row for row in rows if _place(row) == _place(setting) and row.get("timed_steps") == steps)
    return {row["method"] for row in same if not row["error"]}


def _sizes(families: Sequence[str]) -> str:
    return "; ".join(f"{family} has {', '.join(SIZES[family])}" for family in families)


def _available(arguments: argparse.Namespace, device: torch.device) -> Iterator[str]:
    """Stock Inductor and the methods asked for. What this machine lacks is left out, and named if it was asked for."""
    for method in dict.fromkeys((STOCK, *(arguments.methods or METHODS))):
        why = missing(method, device)
        if not why:
            yield method
        elif arguments.methods:
            print(f"{method} is left out: {why}")


def _settings(arguments: argparse.Namespace) -> Iterator[Setting]:
    axes = arguments.families, arguments.tuning, arguments.precision, arguments.batch, arguments.length
    layers = 1 if arguments.quick else None
    for family, tuning, precision, batch, length in product(*axes):
        length = length_of(family, arguments.size, length)
        yield Setting(family, arguments.size, tuning, precision, batch, length, layers)


def _place(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in AXES)


def _order(row: Row) -> tuple[Any, ...]:
    family, tuning = FAMILIES.index(row["family"]), TUNINGS.index(row["tuning"])
    return family, row["size"], tuning, row["precision"], row["batch"] or 0, row["length"] or 0


def _line(row: Row, rows: list[Row]) -> str:
    if row["error"]:
        return f"{_title(row)} {row['error'][:160]}"
    same = (each for each in rows if _place(each) == _place(row) and each["method"] == STOCK)
    stock = next((each["saved_bytes"] for each in same), None)
    parts = [f"saved {row['saved_bytes'] / MIB:8.2f} MiB" + (f", {row['saved_bytes'] / stock:6.1%}" if stock else "")]
    if row["host_bytes"] is not None:
        parts.append(f"on the host {row['host_bytes'] / MIB:.2f}")
    parts.append(f"peak {row['peak_bytes'] / MIB:8.2f}")
    if not row["passed"]:
        parts.append("gate failed")
    elif row["step_ratio"] is not None:
        parts.append(f"step x{row['step_ratio']:.2f}")
    if row["first_call_seconds"] is not None:
        parts.append(f"first call {row['first_call_seconds']:5.1f} s")
    if row["gradient_error"] is not None:
        parts.append(f"gradient error {row['gradient_error']:.4f}")
    if row["tokens_per_second"] is not None:
        parts.append(f"{row['tokens_per_second']} tokens/s")
    return f"{_title(row)} {'   '.join(parts)}"


def _line_of_fit(row: Row) -> str:
    found = f"{row['vary']} {row['largest']} within {row['fit_gib']:g} GiB"
    return f"{_title(row)} {row['error'] or found}"


def _title(row: Row) -> str:
    shape = " x ".join(str(row[name]) for name in ("batch", "length") if row[name] is not None)
    return f"{row['family']:5s} {row['tuning']:4s} {row['precision']:8s} {shape:9s} {row['method']:18s}"


if __name__ == "__main__":
    main()
