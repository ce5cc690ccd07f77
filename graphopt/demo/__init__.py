"""The demo: one small model trained on real data under stock Inductor and under lowmem, in turn."""

import os
import warnings
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

import graphopt
from graphopt.demo import show
from graphopt.demo.data import Data, digits, text
from graphopt.demo.models import LENGTH
from graphopt.demo.train import Run, step_ratio, train
from graphopt.options import parse

BACKENDS = ("inductor", "lowmem")


def run(name: str, *, steps: int, out: Path, seed: int) -> None:
    """Train model `name` under both backends, print how they compare, write the figure, report and results to `out`."""
    quieten()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = load(name, seed)
    console = Console()
    runs = train_in_turn(name, data, steps, seed, device, console)
    ratio = step_ratio(*runs, data.train(steps), device)
    parameters = sum(parameter.numel() for parameter in runs[0].model.parameters())
    precision = "bf16 autocast" if device.type == "cuda" else "fp32"
    options, _ = parse(None)  # those of the environment, where there are any
    title = f"{name}, {parameters / 1e6:.1f} M parameters, {device.type}, {precision}; lowmem: {options}"
    console.print(show.table(*runs, ratio, title))

    out.mkdir(parents=True, exist_ok=True)
    show.figure(*runs, title).savefig(out / "demo.png", dpi=150)
    model = runs[1].model
    inputs = [tensor.to(device) for tensor in data.train(steps)]
    graphopt.explain(model, *inputs).to_html(out / "report.html")
    setting = {
        "model": name,
        "parameters": parameters,
        "input_shape": list(inputs[0].shape),
        "steps": steps,
        "seed": seed,
        "options": str(options),
    }
    setting |= {"device": device.type, "precision": precision, "torch": torch.__version__}
    show.write_results(out / "results.json", setting, runs, ratio)
    for file in ("demo.png", "report.html", "results.json"):
        console.print(f"wrote {out / file}", soft_wrap=True, highlight=False)


def load(name: str, seed: int) -> Data:
    """The data that model `name` trains on, about a thousand tokens a step."""
    return digits(64, seed) if name == "vit" else text(8, LENGTH, seed)


def train_in_turn(
    name: str, data: Data, steps: int, seed: int, device: torch.device, console: Console
) -> tuple[Run, Run]:
    """Both runs, one after the other, under a progress bar each."""
    columns = TextColumn("{task.description:<9}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}")
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        finished = []
        for backend in BACKENDS:
            task = progress.add_task(backend, total=steps, state="compiling")

            def on_step(loss: float, task: TaskID = task) -> None:
                progress.update(task, advance=1, state=f"loss {loss:.3f}")

            finished.append(train(backend, name, data, steps, seed, device, on_step))
    return finished[0], finished[1]


def quieten() -> None:
    """Silence what libraries say that is no news to the reader of a demo."""
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    # the profiler's C++ side announces each start and stop on stderr
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
