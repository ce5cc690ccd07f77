"""Saved bytes, peak memory, gradient error and step time of six transformer blocks under each way of training them.

    python benchmarks/blocks.py                                                   # every block, every method
    python benchmarks/blocks.py --dtype float32                                   # or --autocast; a file of its own
    python benchmarks/blocks.py --blocks vit-full llama-full --methods inductor lowmem:exact --out /tmp/blocks.json

Methods are those of methods.py. Sizes are in units: tokens x width x 2 bytes, one bf16 hidden state. Saved bytes and
peak are deterministic; time is a ratio to stock Inductor, the median of pairs of steps run in turn; the gradient error
is |g - g0| / |g0|, g0 from float32 eager on the same batch.
"""

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from methods import CHECKPOINT, STOCK, compiled, warm_up
from networks import BLOCKS, WIDTH, build
from provenance import machine, origin, resumed, write
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.utils.checkpoint import checkpoint

from graphopt.memory import peak_bytes, saved_bytes

RESULTS = Path(__file__).parent / "results"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
METHODS = (
    STOCK, "heuristics-off", "aggressive", "budget-0.5", "fp8", CHECKPOINT,
    "lowmem:exact", "lowmem:compressed", "lowmem:smallest", "lowmem:paper",
)  # fmt: skip
BATCH, TOKENS = 4, 256
UNIT = BATCH * TOKENS * WIDTH * 2
SEED = 7
# eager's random numbers are not those of compiled code, so gradients cannot be compared under dropout
INCOMPARABLE = ("vit-dropout",)


@dataclass(frozen=True)
class Setting:
    """Where blocks run: a device, the dtype of parameters and input, and whether forward runs under autocast.

    With `cold` every method compiles from an empty cache, so that the seconds of its first call can be compared.
    """

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    autocast: bool = False
    cold: bool = True

    def __str__(self) -> str:
        return "autocast" if self.autocast else str(self.dtype).removeprefix("torch.")


class Checkpointed(nn.Module):
    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.first, self.block = net

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, self.first(x), use_reentrant=False)


@dataclass
class Run:
    """One block under one method, and the seconds of its steps."""

    method: str
    net: nn.Sequential
    forward: Callable[[Tensor], Tensor]
    first_call: float = 0.0
    seconds: list[float] = field(default_factory=list)

    def step(self, x: Tensor) -> float:
        """Forward and backward into fresh gradients; returns its seconds."""
        self.net.zero_grad()
        _wait(x.device)
        start = time.perf_counter()
        self.forward(x).float().square().mean().backward()
        _wait(x.device)
        return time.perf_counter() - start


def main() -> None:
    arguments = parser("Measure transformer blocks under each way of training them.", "blocks").parse_args()
    record(arguments, METHODS, "blocks")


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """The arguments that `record` takes; `name` is how its file of results begins."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--blocks", nargs="+", choices=list(BLOCKS), default=list(BLOCKS))
    parser.add_argument("--methods", nargs="+", help="inductor always runs (default: those of the tables)")
    parser.add_argument("--steps", type=int, default=15, help="steps that are timed, each method in turn")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="of parameters and input")
    precision.add_argument("--autocast", action="store_true", help="float32 parameters, forward in bfloat16")
    parser.add_argument("--out", type=Path, help=f"the JSON written (default: benchmarks/results/{name}[-...].json)")
    return parser


def record(arguments: argparse.Namespace, methods: Iterable[str], name: str, cold: bool = True) -> dict[str, Any]:
    """Measure what the arguments ask for; the result, which is written after every block."""
    # the profiler's C++ side announces each start and stop on stderr
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if arguments.autocast else DTYPES[arguments.dtype]
    setting = Setting(device, dtype, arguments.autocast, cold)
    kinds = [device.type] * (device.type != "cpu") + [str(setting)] * (str(setting) != "bfloat16")
    out = arguments.out or RESULTS / f"{'-'.join([name, *kinds])}.json"
    methods = list(dict.fromkeys((STOCK, *(arguments.methods or methods))))
    # a limit would mean a silent return to eager
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.recompile_limit = 4 * len(methods)

    for method in methods:
        warm_up(method, device)
    head = {
        **machine(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(setting),
        "tokens": BATCH * TOKENS,
        "width": WIDTH,
        "unit_bytes": UNIT,
        "timed_steps": arguments.steps,
    }
    results = resumed(out, head)
    again = {(block, method) for block in arguments.blocks for method in methods}
    results["rows"] = [row for row in results["rows"] if (row["block"], row["method"]) not in again]
    where = origin()
    for block in arguments.blocks:
        for row in measure(block, methods, arguments.steps, setting):
            results["rows"].append({**row, **where})
            print(_line(row), flush=True)
        results["rows"].sort(key=lambda row: list(BLOCKS).index(row["block"]))
        write(out, results)
    print(f"wrote {out}")
    return results


def measure(name: str, methods: list[str], steps: int, setting: Setting) -> list[dict[str, Any]]:
    """One row for every method on block `name`; stock Inductor is first among the methods."""
    x = torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).to(setting.device)
    exact = Run("float32", *[build(name, torch.float32, setting.device)] * 2)
    exact.step(x)
    x = x.to(setting.dtype)

    torch._dynamo.reset()
    runs = [first_call(method, build(name, setting.dtype, setting.device), x, setting) for method in methods]
    memory = [memory_of(run, x) for run in runs]
    errors = [None if name in INCOMPARABLE else gradient_error(run, exact, x) for run in runs]
    for i in range(steps):
        # who goes first alternates, so that a drift of the machine cancels
        for run in runs if i % 2 else reversed(runs):
            run.seconds.append(run.step(x))

    stock, rows = runs[0], []
    for run, (saved, peak), error in zip(runs, memory, errors, strict=True):
        pairs = zip(run.seconds, stock.seconds, strict=True)
        rows.append(
            {
                "block": name,
                "method": run.method,
                "saved_units": round(saved / UNIT, 3),
                "saved_of_stock": round(saved / memory[0][0], 4),
                "peak_units": round(peak / UNIT, 3),
                "gradient_error": error and round(error, 5),
                "step_ratio": round(statistics.median(own / base for own, base in pairs), 3),
                **({"first_call_seconds": round(run.first_call, 1)} if setting.cold else {}),
            }
        )
    return rows


def first_call(method: str, net: nn.Sequential, x: Tensor, setting: Setting) -> Run:
    """The network under `method` after its first step, which compiles it."""
    forward = compiled(method, Checkpointed(net) if method == CHECKPOINT else net)

    def under_autocast(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return forward(x)

    run = Run(method, net, under_autocast if setting.autocast else forward)
    with fresh_cache() if setting.cold else nullcontext():
        run.first_call = run.step(x)
    return run


def memory_of(run: Run, x: Tensor) -> tuple[int, int]:
    """Bytes saved for backward, and the peak of a step above what is held before it."""
    run.net.zero_grad()
    saved = saved_bytes(lambda: run.forward(x), [x, *run.net.parameters()])
    return saved, peak_bytes(lambda: run.step(x), x.device)


def gradient_error(run: Run, exact: Run, x: Tensor) -> float:
    """Relative distance of all gradients of one step from those that `exact` holds."""
    torch.manual_seed(SEED)
    run.step(x)
    wanted = {key: parameter.grad for key, parameter in exact.net.named_parameters() if parameter.grad is not None}
    found = {key: parameter.grad for key, parameter in run.net.named_parameters() if parameter.grad is not None}
    assert wanted.keys() == found.keys(), f"{run.method}: other parameters have gradients than in eager"
    distance = sum((found[key].float() - wanted[key]).square().sum().item() for key in wanted)
    return math.sqrt(distance / sum(gradient.square().sum().item() for gradient in wanted.values()))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _line(row: dict[str, Any]) -> str:
    error = "" if row["gradient_error"] is None else f"   gradient error {row['gradient_error']:.4f}"
    first_call = f"   first call {row['first_call_seconds']:5.1f} s" if "first_call_seconds" in row else ""
    return (
        f"{row['block']:13s} {row['method']:25s} saved {row['saved_units']:6.2f} units, {row['saved_of_stock']:6.1%}   "
        f"peak {row['peak_units']:6.2f}   step x{row['step_ratio']:.2f}{first_call}{error}"
    )


if __name__ == "__main__":
    main()
