"""Does it still train? Fine-tuning on real data under stock Inductor and under lowmem, seed by seed.

    python benchmarks/fidelity.py                                     # every task, every method, five seeds
    python benchmarks/fidelity.py --workers 2                         # two at a time, of one thread each
    python benchmarks/fidelity.py --tasks vit-lora --methods inductor lowmem:exact --seeds 0 1
    python benchmarks/fidelity.py --quick --out /tmp/fidelity.json    # a few steps: does it run?

Tasks are those of finetuning/tasks.py, methods those of methods.py. All runs of one seed start from the same weights
and see the same batches in the same order, in float32 unless --autocast is given: there exact has to equal stock, and
the error of a codec does not hide behind bf16's. What is compared at the end is the loss, and the accuracy, on held-out
data.

Runs that the file of results has are not run again. If it is of another machine, or of other versions, it is put aside.
Pre-trained weights are kept in build/fidelity.
"""

import argparse
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from architectures import build
from finetuning.tasks import TASKS, Task, Training, Weights
from methods import KNOBS, STOCK, compiled, wrong
from provenance import machine, origin, resumed, write
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from graphopt.demo import quieten
from graphopt.demo.data import Batch, Data
from graphopt.demo.models import WithLoss
from graphopt.memory import saved_bytes

ROOT = Path(__file__).parent.parent
PRESETS = tuple(f"lowmem:{preset}" for preset in ("exact", "compressed", "smallest", "paper"))
CODES = tuple(f"lowmem:paper:{code}" for code in ("unbiased", "lloyd"))  # relu3 is the paper's own
BIN = 10  # steps whose mean training loss is one point of a curve
QUICK = 4  # steps of a quick run


@dataclass(frozen=True)
class Cell:
    """The runs of one task under one method, which share what is compiled; one for each seed."""

    task: Task
    method: str
    seeds: tuple[int, ...]
    device: torch.device
    autocast: bool
    threads: int


def main() -> None:
    arguments = parse()
    quieten()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kinds = [device.type] * (device.type != "cpu") + ["autocast"] * arguments.autocast
    out = arguments.out or ROOT / "benchmarks" / "results" / f"{'-'.join(['fidelity', *kinds])}.json"
    results = resumed(out, {**machine(), "dtype": "autocast" if arguments.autocast else "float32"})
    tasks = {name: quick(TASKS[name]) if arguments.quick else TASKS[name] for name in arguments.tasks}
    # what was measured of a task that was another then is measured anew
    keys = {name: key(task) for name, task in tasks.items()}
    results["rows"] = [
        row
        for row in results["rows"]
        if row["task"] in TASKS and (row["task"] not in keys or row.get("key") == keys[row["task"]])
    ]
    done = {(row["task"], row["method"], row["seed"]) for row in results["rows"]}
    threads = max(1, torch.get_num_threads() // arguments.workers)
    cells = []
    for name, task in tasks.items():
        for method in arguments.methods or methods(task):
            seeds = tuple(seed for seed in arguments.seeds if (name, method, seed) not in done)
            if seeds:
                cells.append(Cell(task, method, seeds, device, arguments.autocast, threads))
    for task in {cell.task.before: cell.task for cell in cells}.values():
        pretrained(task.before, device)

    where = origin()
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("runs", total=sum(len(cell.seeds) for cell in cells))
        for rows in every(cells, arguments.workers):
            results["rows"] += [{**row, **where} for row in rows]
            results["rows"].sort(key=_order)
            write(out, results)
            for row in rows:
                progress.console.print(_line(row), highlight=False, soft_wrap=True)
            progress.advance(bar, len(rows))
    print(f"wrote {out}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune under stock Inductor and under lowmem, seed by seed.")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", help="default: inductor, every preset, every code")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--autocast", action="store_true", help="forward in bfloat16; a file of its own")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the cores")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} steps of each: does it run?")
    parser.add_argument("--out", type=Path, help="the JSON written (default: benchmarks/results/fidelity[-...].json)")
    arguments = parser.parse_args()
    if arguments.quick and not arguments.out:
        parser.error("--quick measures nothing: it needs --out")
    if arguments.workers < 1:
        parser.error("argument --workers: at least one")
    for method in arguments.methods or ():
        why = wrong(method, (STOCK, "eager", *KNOBS))
        if why:
            parser.error(f"argument --methods: {method!r} is no method; {why}")
    return arguments


def methods(task: Task) -> tuple[str, ...]:
    """What a task is trained under; codes where they are made, which is not in Llama: SwiGLU keeps both factors."""
    return STOCK, *PRESETS, *(CODES if task.tuning.spec.family != "llama" else ())


def every(cells: list[Cell], workers: int) -> Iterator[list[dict[str, Any]]]:
    """Rows as soon as they are there: of each run, or with several workers of each cell."""
    if workers == 1:
        for cell in cells:
            yield from ([row] for row in measure(cell))
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(measured, cell) for cell in cells]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def measured(cell: Cell) -> list[dict[str, Any]]:
    return list(measure(cell))


def measure(cell: Cell) -> Iterator[dict[str, Any]]:
    """One row for each seed of a cell."""
    quieten()
    torch.set_num_threads(cell.threads)
    torch._dynamo.reset()
    task, weights = cell.task, pretrained(cell.task.before, cell.device)
    model = task.model(0, weights).to(cell.device)
    model.autocast = cell.autocast
    function = compiled(cell.method, model)
    for seed in cell.seeds:
        model.load_state_dict(task.model(seed, weights).state_dict())
        data = task.tuning.data(seed)
        before, _ = evaluate(model, data.held_out, cell.device)
        torch.manual_seed(seed)
        losses = train(model, function, data, task.tuning, cell.device)
        x, y = _to(data.train(0), cell.device)
        own = [x, y, *model.parameters(), *model.buffers()]
        saved = saved_bytes(lambda x=x, y=y: function(x, y), own)  # of what is trained, with its dropout
        loss, accuracy = evaluate(model, data.held_out, cell.device)
        bins = [losses[i : i + BIN] for i in range(0, len(losses), BIN)]
        yield {
            "task": task.name,
            "key": key(task),
            "method": cell.method,
            "seed": seed,
            "loss_before": round(before, 4),
            "loss": round(loss, 6) if math.isfinite(loss) else None,  # diverged
            "accuracy": round(accuracy, 5) if task.classifies else None,
            "saved_bytes": saved,
            "steps_per_loss": BIN,
            "losses": [round(mean, 4) if math.isfinite(mean) else None for mean in map(fmean, bins)],
        }


def pretrained(training: Training, device: torch.device) -> Weights:
    """The weights after a pre-training in eager mode; kept on disk, by all that decides them."""
    path = ROOT / "build" / "fidelity" / f"{training.spec.family}-{digest(about(training), machine())}.pt"
    if not path.exists():
        torch.manual_seed(0)
        model = WithLoss(build(training.spec), autocast=False).to(device)
        data = training.data(0)
        losses = train(model, model, data, training, device)
        print(f"pre-trained {training.spec.family}: loss {losses[0]:.3f} to {losses[-1]:.3f}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        torch.save(model.model.state_dict(), part)
        os.replace(part, path)
    weights: Weights = torch.load(path, map_location="cpu")
    return weights


def train(
    model: WithLoss, function: Callable[..., Tensor], data: Data, training: Training, device: torch.device
) -> list[float]:
    """Train what needs gradients; `function` is the model, compiled. Returns the loss of every step."""
    model.train()
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 10, 1 - i / training.steps))
    losses = []
    for i in range(training.steps):
        loss = function(*_to(data.train(i), device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def evaluate(model: WithLoss, batch: Batch, device: torch.device) -> tuple[float, float]:
    """Mean loss and share of right answers on held-out data; in eager mode, the same for every method."""
    model.eval()
    x, y = _to(batch, device)
    logits = torch.cat([model.logits(part) for part in x.split(64)])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), y.flatten())
    right = (logits.argmax(-1) == y).double().mean()
    return loss.item(), right.item()


def key(task: Task) -> str:
    """What tells a task from one of the same name with other steps, rates, data or sizes."""
    return digest(about(task.before), about(task.tuning))


def about(training: Training) -> dict[str, Any]:
    config = training.spec.config().to_diff_dict()
    return {**vars(training), "corpus": training.corpus.__name__, "config": config}


def digest(*facts: object) -> str:
    return sha256(repr(facts).encode()).hexdigest()[:12]


def quick(task: Task) -> Task:
    """The task with next to no steps."""
    return replace(task, before=replace(task.before, steps=QUICK), tuning=replace(task.tuning, steps=QUICK))


def _order(row: dict[str, Any]) -> tuple[int, str, int]:
    return list(TASKS).index(row["task"]), row["method"], row["seed"]


def _to(batch: Batch, device: torch.device) -> Batch:
    return batch[0].to(device), batch[1].to(device)


def _line(row: dict[str, Any]) -> str:
    accuracy = "" if row["accuracy"] is None else f"   accuracy {row['accuracy']:6.1%}"
    loss = "diverged" if row["loss"] is None else f"loss {row['loss']:.4f}"
    saved = row["saved_bytes"] / 1e6
    return f"{row['task']:10s} {row['method']:21s} seed {row['seed']}   {loss}{accuracy}   {saved:.2f} MB"


if __name__ == "__main__":
    main()
