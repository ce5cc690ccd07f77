"""Seconds of the first call, which compiles, of models of twelve layers: as a whole, and layer by layer.

    python benchmarks/first_call.py     # into benchmarks/results/first_call.json; half an hour on two cores

Each is a process of its own, without any cache. Layer by layer, `layer.compile()` of each, torch compiles the first and
finds the others alike. Seconds of the wall clock count the C++ compiler of the CPU, which runs beside on other cores;
seconds of all cores do too. One run varies by a tenth, so methods take turns for several rounds, another first in each,
and a round's methods are compared with each other.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from architectures import Spec, build
from methods import STOCK, options, warm_up
from provenance import machine, origin, write

from graphopt.memory import saved_bytes

RESULT = Path(__file__).parent / "results" / "first_call.json"
LAYERS, BATCH, LENGTH = 12, 4, 128
MODELS = {
    "gpt2": (Spec("gpt2", "tiny", changes=(("n_layer", LAYERS),)), "transformer.h"),
    "llama": (Spec("llama", "tiny", changes=(("num_hidden_layers", LAYERS),)), "model.layers"),
}
METHODS = (STOCK, "lowmem:exact", "lowmem:compressed")
WHOLE, BY_LAYER = "whole", "layer by layer"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the first call of models of twelve layers.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each method (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULT, help="the JSON written (default: %(default)s)")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "METHOD", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds takes 1 or more")
    if arguments.one:
        print(json.dumps(measure(*arguments.one)))
        return
    results = {**machine(), "layers": LAYERS, "batch": BATCH, "length": LENGTH, "rows": []}
    for model in arguments.models:
        for way in (WHOLE, BY_LAYER):
            runs: dict[str, list[dict[str, float]]] = {method: [] for method in arguments.methods}
            for turn in range(arguments.rounds):
                first = turn % len(runs)
                for method in [*arguments.methods[first:], *arguments.methods[:first]]:
                    runs[method].append(_apart(model, method, way))
                    print(model, way, method, runs[method][-1], flush=True)
            results["rows"] += [_row(model, way, method, found) for method, found in runs.items()]
            write(arguments.out, results)


def measure(model: str, method: str, way: str) -> dict[str, float]:
    """Seconds of one forward and backward of a model that nothing has compiled before, and what is kept between."""
    spec, layers = MODELS[model]
    torch.manual_seed(0)
    network = build(spec)
    ids = torch.randint(network.config.vocab_size, (BATCH, LENGTH))
    for module in [network] if way == WHOLE else network.get_submodule(layers):
        module.compile(backend=method.partition(":")[0], options=options(method) or None, dynamic=False)
    warm_up(method, torch.device("cpu"))
    wall, cores = time.perf_counter(), _seconds_of_cores()
    losses: list[torch.Tensor] = []
    own = [*network.parameters(), *network.buffers(), ids]
    saved = saved_bytes(lambda: losses.append(network(input_ids=ids, labels=ids).loss), own)
    losses[0].backward()
    wall, cores = time.perf_counter() - wall, _seconds_of_cores() - cores
    return {"seconds": wall, "core_seconds": cores, "saved_bytes": saved}


def _row(model: str, way: str, method: str, runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    times = {key: [run[key] for run in runs] for key in ("seconds", "core_seconds")}
    return {"model": model, "way": way, "method": method, **times, "saved_bytes": runs[0]["saved_bytes"], **origin()}


def _apart(model: str, method: str, way: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", model, method, way]
    environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def _seconds_of_cores() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in both)


if __name__ == "__main__":
    main()
