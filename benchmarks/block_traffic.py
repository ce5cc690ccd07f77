"""Kernels and memory traffic of whole transformer blocks on CUDA, by the code that Inductor writes: no GPU is needed.

    python benchmarks/block_traffic.py     # every block, into benchmarks/results/block_traffic.json

The blocks of networks.py with attention without its softmax, q (k^T v): the graph is traced on a CPU, whose attention
operator has another layout. What is saved for it, and that a matrix product makes and reads it, is the same. Plans may
cost any time, since the estimate would be that of a CPU. Bytes are those of the whole half of a training graph, matrix
products included, in units of tokens x width x 2 bytes. Deterministic. Nothing is timed here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from networks import WIDTH, build
from offline_cuda import PROPERTIES, Generated, generate
from provenance import machine, origin
from torch import Tensor
from torch.nn import functional as F

import graphopt
from graphopt.lowering import group_quant
from graphopt.plan import KEEP, RECOMPUTE

RESULT = Path(__file__).parent / "results" / "block_traffic.json"
DTYPE = torch.bfloat16
BATCH, TOKENS = 4, 256
UNIT = BATCH * TOKENS * WIDTH * DTYPE.itemsize
BLOCKS = ("vit-full", "vit-dropout", "vit-lora", "llama-full", "llama-lora")
STOCK = "inductor"
METHODS: Mapping[str, Mapping[str, Any]] = {
    "lowmem:exact": {"preset": "exact"},
    "lowmem:compressed": {"preset": "compressed", "time_slack": 10},
    "lowmem:smallest": {"preset": "smallest", "time_slack": 10},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Count kernels and bytes of Inductor's CUDA code for whole blocks.")
    parser.add_argument("--blocks", nargs="+", choices=BLOCKS, default=BLOCKS)
    parser.add_argument("--out", type=Path, default=RESULT, help="the JSON written (default: %(default)s)")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.blocks:
        for method in (STOCK, *METHODS):
            rows.append(traffic(name, method))
            print(rows[-1], flush=True)
    setting = {
        **machine(), **origin(), "torch": torch.__version__, "triton": triton.__version__,
        "device": PROPERTIES.name, "dtype": str(DTYPE).removeprefix("torch."), "tokens": BATCH * TOKENS, "width": WIDTH,
        "unit_bytes": UNIT,
    }  # fmt: skip
    # one row to a line
    lines = ",\n  ".join(map(json.dumps, rows))
    arguments.out.write_text(f'{json.dumps(setting)[:-1]},\n "rows": [\n  {lines}\n]}}\n')
    print(f"wrote {arguments.out}")


def traffic(name: str, method: str) -> dict[str, Any]:
    """One block under one method: what is saved, and for each half its launches beside products, and its bytes.

    `encoded` are the bytes of the tensors that a plan encodes, each before and after.
    """
    with _for_cuda():
        net, x = build(name, DTYPE, torch.device("cpu")), torch.empty(BATCH, TOKENS, WIDTH, dtype=DTYPE)
        options = METHODS.get(method)
        halves = generate(net, [x], "inductor" if method == STOCK else "lowmem", options)
        report = graphopt.explain(net, x, options=options or {"preset": "exact"})
    coded = [each for each in report.plan.choices if each.decision not in (KEEP, RECOMPUTE)] if report.plan else []
    return {
        "block": name,
        "method": method,
        "saved": report.bytes_before if method == STOCK else report.bytes_now,
        "encoded": [(each.bytes, each.bytes_now) for each in coded],
        **{"backward" if half.is_backward else "forward": _counts(half) for half in halves},
    }


def _counts(half: Generated) -> dict[str, int]:
    return {
        "kernels": len(half.kernels) + half.workspace_sums,
        "products": len(half.products),
        "bytes": half.bytes + half.workspace_bytes,
    }


@contextmanager
def _for_cuda() -> Iterator[None]:
    """Formulas in their form for CUDA, and attention that is the same on every device."""

    def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
        return q @ (k.transpose(-2, -1) @ v)

    with (
        mock.patch.object(group_quant, "sliced", lambda device: False),
        mock.patch.object(F, "scaled_dot_product_attention", attention),
    ):
        yield


if __name__ == "__main__":
    main()
