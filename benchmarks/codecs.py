"""Codecs of saved tensors: their error on several kinds of data, the time of their CPU kernels, and their CUDA kernels.

    python benchmarks/codecs.py                     # writes benchmarks/results/codecs.json
    python benchmarks/codecs.py --pairs 20 --out /tmp/codecs.json

error    |x_ - x| / |x| of 1024 x 2048 float32 numbers, and of those of "outliers" that are not in an outlier channel.
CPU      time of Inductor's kernel for encode or decode of 1024 x 2048 bfloat16 numbers on one thread, as a ratio to
         that of gelu; each timed in turn, a low quantile of all runs. copy is x + 1.
CUDA     launches and bytes of Inductor's code, made without a GPU, of linear, gelu and encode of gelu's input; and of
         decode and gelu's gradient. Bytes are those beyond what the same without a codec moves, in units of x.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import torch
from offline_cuda import Generated, generate
from provenance import machine, origin
from torch import Tensor
from torch._inductor.compile_fx import compile_fx_inner
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from graphopt.codecs import CODECS, Codec, codec
from graphopt.lowering import group_quant
from graphopt.lowering.decompose import inductor_table
from graphopt.lowering.random import fuse_seeds

RESULTS = Path(__file__).parent / "results" / "codecs.json"
SHAPE = (1024, 2048)
WIDTH = 512
MEASURED = [
    *CODECS.values(),
    *(codec(name, 64, rounding, False) for name in ("int8", "int4") for rounding in ("nearest", "stochastic")),
    *(codec("int4", group) for group in (32, 128)),
    codec("int8", rounding="hashed"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure codecs of saved tensors.")
    parser.add_argument("--pairs", type=int, default=100, help="timings of each kernel")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    times = cpu_times(arguments.pairs)
    rows = []
    for each in MEASURED:
        row = {
            "codec": each.name, "bits": round(8 * each.bytes(SHAPE[0] * SHAPE[1]) / (SHAPE[0] * SHAPE[1]), 3),
            "error": errors(each), "cpu": times[each.name], "cuda": cuda(each),
        }  # fmt: skip
        rows.append(row)
        print(row, flush=True)
    setting = {**machine(), **origin(), "torch": torch.__version__, "shape": SHAPE, "cpu_copy": times["copy"]}
    arguments.out.write_text(json.dumps({**setting, "rows": rows}, indent=1) + "\n")
    print(f"wrote {arguments.out}")


def data() -> dict[str, Tensor]:
    """Normal; with heavy tails; with 1 % of channels 30 times as large; gelu and relu of normal numbers."""
    torch.manual_seed(0)
    normal = torch.randn(SHAPE)
    outliers = torch.randn(SHAPE)
    outliers[:, outlying()] *= 30
    heavy = torch.distributions.StudentT(3.0).sample(torch.Size(SHAPE))
    return {"normal": normal, "heavy": heavy, "outliers": outliers, "gelu": F.gelu(normal), "relu": normal.relu()}


def outlying() -> Tensor:
    return torch.arange(SHAPE[1]) % 100 == 7


def errors(each: Codec) -> dict[str, float]:
    found = {}
    for name, x in data().items():
        x_ = each.decode(each.encode(x), x.shape, x.dtype)
        found[name] = round(((x_ - x).norm() / x.norm()).item(), 4)
        if name == "outliers":
            rest = ~outlying()
            found["others"] = round(((x_ - x)[:, rest].norm() / x[:, rest].norm()).item(), 4)
    return found


def cpu_times(pairs: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(SHAPE).bfloat16()
    kernels: dict[tuple[str, str], tuple[Callable[..., Any], tuple[Any, ...]]] = {
        ("gelu", ""): (compiled(F.gelu, x), (x,)),
        ("copy", ""): (compiled(lambda x: x + 1, x), (x,)),
    }
    for each in MEASURED:
        parts = each.encode(x)
        kernels[each.name, "encode"] = compiled(each.encode, x), (x,)
        kernels[each.name, "decode"] = (
            compiled(lambda *parts, each=each: each.decode(parts, SHAPE, x.dtype), *parts),
            parts,
        )
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in kernels}
    for _ in range(pairs):
        for key, (kernel, given) in kernels.items():
            start = time.perf_counter()
            kernel(*given)
            seconds[key].append(time.perf_counter() - start)
    low = {key: sorted(values)[len(values) // 5] for key, values in seconds.items()}
    ratio = {key: round(value / low["gelu", ""], 2) for key, value in low.items()}
    return {
        "copy": ratio["copy", ""],
        **{each.name: {half: ratio[each.name, half] for half in ("encode", "decode")} for each in MEASURED},
    }


def compiled(function: Callable[..., Any], *given: Tensor) -> Callable[..., Any]:
    """Inductor's kernel alone: Dynamo's guards would be timed too."""

    def outputs(*given: Tensor) -> tuple[Tensor, ...]:
        result = function(*given)
        return result if isinstance(result, tuple) else (result,)

    gm = make_fx(outputs, decomposition_table=dict(inductor_table()), tracing_mode="fake")(*given)
    fuse_seeds(gm)
    with torch.no_grad():
        kernel = compile_fx_inner(gm, list(given))
    return lambda *given: kernel(list(given))


def cuda(each: Codec) -> dict[str, Any]:
    def forward(x: Tensor, weight: Tensor, encoded: bool = True) -> Any:
        h = x @ weight
        return (F.gelu(h), *each.encode(h)) if encoded else (F.gelu(h), h)

    def backward(grad: Tensor, *parts: Tensor) -> Any:
        return torch.ops.aten.gelu_backward(grad, each.decode(parts, grad.shape, grad.dtype))

    def stock(grad: Tensor, h: Tensor) -> Any:
        return torch.ops.aten.gelu_backward(grad, h)

    with FakeTensorMode(), mock.patch.object(group_quant, "sliced", lambda device: False):
        x, weight = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((SHAPE[0], WIDTH), (WIDTH, SHAPE[1])))
        grad, h = (torch.empty(SHAPE, dtype=torch.bfloat16) for _ in range(2))
        parts = each.encode(h)
        halves = {
            "forward": (generate(forward, [x, weight]), generate(partial(forward, encoded=False), [x, weight])),
            "backward": (generate(backward, [grad, *parts]), generate(stock, [grad, h])),
        }  # fmt: skip
    return {half: more(*found) for half, found in halves.items()}


def more(with_codec: list[Generated], without: list[Generated]) -> dict[str, Any]:
    unit = SHAPE[0] * SHAPE[1] * torch.bfloat16.itemsize
    return {
        "kernels": len(with_codec[0].kernels), "kernels_without": len(without[0].kernels),
        "units": round((with_codec[0].bytes - without[0].bytes) / unit, 2),
    }  # fmt: skip


if __name__ == "__main__":
    main()
