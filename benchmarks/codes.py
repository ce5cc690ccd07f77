"""The gradient error of each derivative code: of one step, and of the mean over many draws, by depth of the network.

    python benchmarks/codes.py                 # writes benchmarks/results/codes.json
    python benchmarks/codes.py --draws 16 --blocks 1 --out /tmp/codes.json

A stack of ViT blocks with LoRA on qkv, whose MLPs are frozen, so that every activation is coded. float32, so that
rounding adds nothing: the error is |g - g0| / |g0| over all trained parameters, g0 from the exact preset on the same
batch. It is given in all, and for the parameters of the first block alone, which all codes stand before. The mean over
draws shows what is bias: an unbiased code's error falls as one over the root of their number, another's stays.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from networks import WIDTH, ViTBlock, with_lora
from provenance import machine, origin
from torch import Tensor, nn
from torch.nn import functional as F

from graphopt.lowering.codes import SCHEMES

RESULTS = Path(__file__).parent / "results" / "codes.json"
BATCH, TOKENS = 4, 64
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu}

Gradients = dict[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the gradient error of derivative codes.")
    parser.add_argument("--blocks", nargs="+", type=int, default=[1, 4, 12], help="depths of the network")
    parser.add_argument("--draws", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rows = []
    for name in ACTIVATIONS:
        for blocks in arguments.blocks:
            for row in measure(name, blocks, arguments.draws):
                rows.append(row)
                print(
                    f"{name:5s} {blocks:2d} blocks  {row['scheme']:9s} error {row['error']:.3f}, "
                    f"first block {row['error_first_block']:.3f}, cosine {row['cosine']:.4f}, "
                    f"mean of {arguments.draws} {row['error_of_mean']:.3f}",
                    flush=True,
                )
    setting = {
        **machine(), **origin(), "torch": torch.__version__, "device": "cpu", "dtype": "float32",
        "tokens": BATCH * TOKENS, "width": WIDTH, "draws": arguments.draws,
    }  # fmt: skip
    arguments.out.write_text(json.dumps({**setting, "rows": rows}, indent=1) + "\n")
    print(f"wrote {arguments.out}")


def measure(name: str, blocks: int, draws: int) -> list[dict[str, Any]]:
    """One row for each scheme, on a network of `blocks` blocks."""
    torch.manual_seed(0)
    layers = [with_lora(ViTBlock(activation=ACTIVATIONS[name]), ("qkv",)) for _ in range(blocks)]
    net, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), *layers), torch.randn(BATCH, TOKENS, WIDTH)
    exact = next(gradients(net, x, None, 1))
    rows = []
    for scheme in SCHEMES:
        first: Gradients = {}
        total: Gradients = {}
        count = draws if scheme == "unbiased" else 1
        for drawn in gradients(net, x, scheme, count):
            first = first or drawn
            total = {key: total.get(key, torch.zeros(())) + value / count for key, value in drawn.items()}
        in_first = [key for key in exact if key.startswith("1.")]
        rows.append({
            "activation": name, "blocks": blocks, "scheme": scheme,
            "error": round(distance(first, exact, list(exact)), 4),
            "error_first_block": round(distance(first, exact, in_first), 4),
            "cosine": round(cosine(first, exact), 5),
            "error_of_mean": round(distance(total, exact, list(exact)), 4),
        })  # fmt: skip
    return rows


def gradients(net: nn.Module, x: Tensor, scheme: str | None, steps: int) -> Any:
    """The gradients of `steps` steps on the same batch, one after the other."""
    torch._dynamo.reset()
    options = {"preset": "exact", "approx_activation": scheme}
    step = torch.compile(net, backend="lowmem_eager", options=options, fullgraph=True)
    for seed in range(steps):
        torch.manual_seed(seed)
        net.zero_grad()
        step(x).square().mean().backward()
        yield {key: p.grad.clone() for key, p in net.named_parameters() if p.grad is not None}


def distance(found: Gradients, exact: Gradients, keys: list[str]) -> float:
    difference = sum((found[key] - exact[key]).double().square().sum().item() for key in keys)
    return math.sqrt(difference / sum(exact[key].double().square().sum().item() for key in keys))


def cosine(found: Gradients, exact: Gradients) -> float:
    def dot(a: Gradients, b: Gradients) -> float:
        return sum((a[key].double() * b[key].double()).sum().item() for key in exact)

    return dot(found, exact) / math.sqrt(dot(found, found) * dot(exact, exact))


if __name__ == "__main__":
    main()
