"""Saved bytes, peak memory, gradient error and step time of six transformer blocks under each way of training them.

    python benchmarks/blocks.py                                                   # every block, every method
    python benchmarks/blocks.py --blocks vit-full llama-full --methods inductor lowmem:exact --out /tmp/blocks.json

A method is eager, inductor, one of KNOBS (torch's own settings), checkpoint, lowmem, lowmem:PRESET or
lowmem:PRESET:CODE, the code being one of approx_activation. Sizes are in units: tokens x width x 2 bytes, one bf16
hidden state. Saved bytes and peak are deterministic; time is a ratio to stock Inductor, the median of pairs of steps
run in turn; the gradient error is |g - g0| / |g0|, g0 from float32 eager on the same batch.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch_config
from networks import BLOCKS, WIDTH, build
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx
from torch._inductor.utils import fresh_cache
from torch.utils.checkpoint import checkpoint

from graphopt.memory import peak_bytes, saved_bytes
from graphopt.options import PRESETS

RESULTS = Path(__file__).parent / "results"
STOCK = "inductor"
# torch's own ways to save less, as patches of torch._functorch.config
KNOBS: dict[str, dict[str, Any]] = {
    "heuristics-off": {"ban_recompute_used_far_apart": False, "ban_recompute_materialized_backward": False},
    "aggressive": {"aggressive_recomputation": True},
    "budget-0.5": {"activation_memory_budget": 0.5},
}
METHODS = (STOCK, *KNOBS, "checkpoint", *(f"lowmem:{preset}" for preset in PRESETS), "lowmem:exact:unbiased")
BATCH, TOKENS = 4, 256
UNIT = BATCH * TOKENS * WIDTH * 2
SEED = 7
# eager's random numbers are not those of compiled code, so gradients cannot be compared under dropout
INCOMPARABLE = ("vit-dropout",)


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
    # the profiler's C++ side announces each start and stop on stderr
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description="Measure transformer blocks under each way of training them.")
    parser.add_argument("--blocks", nargs="+", choices=list(BLOCKS), default=list(BLOCKS))
    parser.add_argument("--methods", nargs="+", default=METHODS, help="inductor always runs; default: %(default)s")
    parser.add_argument("--steps", type=int, default=15, help="steps that are timed, each method in turn")
    parser.add_argument("--out", type=Path, help="the JSON written (default: benchmarks/results/blocks[-cuda].json)")
    arguments = parser.parse_args()
    out = arguments.out or RESULTS / ("blocks.json" if device.type == "cpu" else f"blocks-{device.type}.json")
    methods = list(dict.fromkeys((STOCK, *arguments.methods)))
    # a limit would mean a silent return to eager
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._dynamo.config.recompile_limit = 4 * len(methods)

    for method in methods:
        _warm_up(method, device)
    rows = []
    for name in arguments.blocks:
        for row in measure(name, methods, arguments.steps, device):
            rows.append(row)
            print(_line(row), flush=True)
    setting = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": "bfloat16",
        "tokens": BATCH * TOKENS,
        "width": WIDTH,
        "unit_bytes": UNIT,
        "timed_steps": arguments.steps,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**setting, "rows": rows}, indent=1) + "\n")
    print(f"wrote {out}")


def measure(name: str, methods: list[str], steps: int, device: torch.device) -> list[dict[str, Any]]:
    """One row for every method on block `name`; stock Inductor is first among the methods."""
    x = torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).to(device)
    exact = Run("float32", *[build(name, torch.float32, device)] * 2)
    exact.step(x)
    x = x.bfloat16()

    torch._dynamo.reset()
    runs = [first_call(method, build(name, torch.bfloat16, device), x) for method in methods]
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
                "first_call_seconds": round(run.first_call, 1),
            }
        )
    return rows


def first_call(method: str, net: nn.Sequential, x: Tensor) -> Run:
    """The network under `method` after its first step, which compiles it from an empty cache."""
    run = Run(method, net, _compiled(method, Checkpointed(net) if method == "checkpoint" else net))
    with fresh_cache():
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


def _compiled(method: str, function: Callable[..., Any]) -> Callable[..., Any]:
    if method == "eager":
        return function
    if method in KNOBS:
        return torch.compile(function, backend=_patched(KNOBS[method]), fullgraph=True)
    backend, *settings = (STOCK if method == "checkpoint" else method).split(":")
    options = dict(zip(("preset", "approx_activation"), settings, strict=False))
    # fullgraph, so that nothing runs in eager unnoticed
    return torch.compile(function, backend=backend, options=options or None, fullgraph=True)


def _patched(knob: dict[str, Any]) -> Callable[..., Any]:
    """Stock Inductor under other settings of functorch; a backend of its own, so that Dynamo keeps them apart."""

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        with functorch_config.patch(knob):
            return compile_fx(gm, example_inputs)

    return backend


def _warm_up(method: str, device: torch.device) -> None:
    """Compile one line: the imports and probes of a first use are not a block's first call."""
    x = torch.ones(8, device=device, requires_grad=True)
    _compiled(method, lambda x: x.sin().sum())(x).backward()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _line(row: dict[str, Any]) -> str:
    error = "" if row["gradient_error"] is None else f"   gradient error {row['gradient_error']:.4f}"
    return (
        f"{row['block']:13s} {row['method']:18s} saved {row['saved_units']:6.2f} units, {row['saved_of_stock']:6.1%}   "
        f"peak {row['peak_units']:6.2f}   step x{row['step_ratio']:.2f}   "
        f"first call {row['first_call_seconds']:5.1f} s{error}"
    )


if __name__ == "__main__":
    main()
