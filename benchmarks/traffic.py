"""Memory traffic of activations and norms on CUDA, by the code that Inductor writes for them: no GPU is needed.

    python benchmarks/traffic.py           # every case, into benchmarks/results/traffic.json
    python benchmarks/traffic.py --quick   # two cases, printed only

For each operator that graphopt rewrites the bytes of two lowerings, and of stock Inductor: "fused", plain formulas that
Inductor makes kernels of together with what is around them, which is what the backend hands over; and "kernel", the
hand-written kernels of graphopt.kernels called as they stand. Bytes are those of the whole half of a training graph,
matrix products included, in units of the operator's input; with them the partial sums of a parameter's gradient that
a kernel writes out and a second one adds up. Deterministic. Nothing is timed here.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from offline_cuda import PROPERTIES, Generated, generate
from provenance import machine, origin
from torch import Tensor, fx, nn
from torch._inductor.fx_passes.replace_random import fuse_seed_creation_pass
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from graphopt import passes
from graphopt.graph import fake_mode, outputs_of
from graphopt.kernels import norm
from graphopt.lowering import formulas
from graphopt.lowering.codes import SCHEMES
from graphopt.passes.approx_activation import SLOPES
from graphopt.pipeline import Pass, fired
from graphopt.splicing import splice

RESULT = Path(__file__).parent / "results" / "traffic.json"
DTYPE = torch.bfloat16
TOKENS, WIDTH, HIDDEN = 1024, 512, 2048
SIZES = ((4096, 1024), (16384, 1024), (8192, 4096))
aten, own = torch.ops.aten, torch.ops.graphopt


@dataclass(frozen=True)
class Variant:
    """One way to compile a case: the backend with options beside preset "exact", passes in the place of its own."""

    name: str
    backend: str = "lowmem"
    options: Mapping[str, Any] | None = None
    instead: Mapping[str, tuple[Pass, ...]] | None = None

    def generate(self, module: nn.Module, x: Tensor) -> list[Generated]:
        options = None if self.backend == "inductor" else {"preset": "exact", **(self.options or {})}
        with mock.patch.dict(vars(passes), self.instead or {}):
            return generate(module, [x], self.backend, options)


def kernel_codes(gm: fx.GraphModule, example_inputs: Sequence[object] = (), *, scheme: str) -> fx.GraphModule:
    """approx_activation by the hand-written kernels: f and the code are one operator, and so is the gradient."""

    def seed(x: Tensor) -> Tensor | None:
        return torch.ops.prims.inductor_seed(x.device).view(1) if scheme == "unbiased" else None

    for node in [node for node in gm.graph.nodes if node.target in SLOPES]:
        found = SLOPES[node.target](node)
        forward = next(user for user in found.read.users if user.target in (aten.gelu.default, aten.silu.default))
        y, words = splice(
            gm.graph, forward, lambda x, name=found.name: own.activation_forward(x, name, scheme, seed(x)),
            (found.read,), like=forward,
        )  # fmt: skip
        grad = splice(
            gm.graph, node, lambda *given, name=found.name: own.activation_backward(*given, name, scheme),
            (node.args[0], words), like=node,
        )  # fmt: skip
        forward.replace_all_uses_with(y)
        node.replace_all_uses_with(grad)
        gm.graph.erase_node(node)
        fired(node, "f, its code and its gradient are kernels of their own")
    with V.set_fake_mode(fake_mode(gm.graph)):
        fuse_seed_creation_pass(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def kernel_norms(gm: fx.GraphModule, example_inputs: Sequence[object] = ()) -> fx.GraphModule:
    """share_norm by the hand-written kernels in the place of the two formulas."""

    def forward(x: Tensor, ndim: int, *rest: Any) -> Any:
        return own.norm_forward(x, x.shape[-ndim:], *rest)

    def backward(*given: Any) -> Any:
        return own.norm_backward(*given, [True, True])

    with mock.patch.multiple(formulas, norm=forward, norm_backward=backward):
        gm = passes.share_norm(gm, example_inputs)
    for node in gm.graph.find_nodes(op="call_function", target=own.norm_backward.default):
        read = outputs_of(node)
        node.args = (*node.args[:-1], [index in read and bool(read[index].users) for index in (1, 2)])
    return gm


STOCK = Variant("stock", backend="inductor")
ACTIVATION_VARIANTS = (
    STOCK,
    Variant("exact"),
    *(Variant(f"fused {scheme}", options={"approx_activation": scheme}) for scheme in SCHEMES),
    *(
        Variant(f"kernel {scheme}", options={"approx_activation": scheme}, instead={"APPROXIMATE": (kernel_codes,)})
        for scheme in ("relu3", "unbiased")
    ),
)
NORM_VARIANTS = (STOCK, Variant("fused"), Variant("kernel", instead={"JOINT": (kernel_norms,)}))


class MLP(nn.Module):
    """Linear, activation, frozen linear: backward has x for the slope alone."""

    def __init__(self, activation: Callable[[Tensor], Tensor], dropout: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN, dtype=DTYPE), nn.Linear(HIDDEN, WIDTH, dtype=DTYPE)
        self.down.requires_grad_(False)
        self.activation, self.dropout = activation, nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(self.activation(self.up(x))))


class Normed(nn.Module):
    """A norm between two linears: alone, ahead of a residual sum, or between two."""

    def __init__(self, place: str, kind: type[nn.Module], width: int, frozen: bool) -> None:
        super().__init__()
        self.place = place
        # a residual sum behind a bias is not part of the matrix product
        self.before = nn.Linear(width, width, bias=place == "between residuals", dtype=DTYPE)
        self.after = nn.Linear(width, width, bias=False, dtype=DTYPE)
        self.norm = kind(width, dtype=DTYPE).requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        if self.place == "between residuals":
            h = x + h
        y = self.after(self.norm(h))
        return y if self.place == "chain" else h + y


PLACES = ("chain", "residual", "between residuals")
NORMS = {"LayerNorm": nn.LayerNorm, "RMSNorm": nn.RMSNorm}
FUNCTIONS = {"gelu": F.gelu, "silu": F.silu}


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the bytes that Inductor's CUDA code moves.")
    parser.add_argument("--quick", action="store_true", help="two cases, and no file")
    parser.add_argument("--out", type=Path, default=RESULT, help="the JSON written (default: %(default)s)")
    arguments = parser.parse_args()
    rows = []
    for row in itertools.chain(activations(arguments.quick), norms(arguments.quick)):
        rows.append(row)
        print(_line(row), flush=True)
    if not arguments.quick:
        setting = {
            **machine(),
            **origin(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "device": PROPERTIES.name,
            "dtype": str(DTYPE).removeprefix("torch."),
            "mlp": {"tokens": TOKENS, "width": WIDTH, "hidden": HIDDEN},
        }
        arguments.out.write_text(_json({**setting, "rows": rows}))
        print(f"wrote {arguments.out}")


def activations(quick: bool) -> Iterator[dict[str, Any]]:
    """The MLP: two rows, forward and backward, of every variant."""
    cases = list(itertools.product(FUNCTIONS, (0.0, 0.1)))
    for name, dropout in cases[:1] if quick else cases:
        with FakeTensorMode():
            module, x = MLP(FUNCTIONS[name], dropout), torch.empty(TOKENS, WIDTH, dtype=DTYPE)
            for variant in ACTIVATION_VARIANTS:
                for half in variant.generate(module, x):
                    about = {"operator": name, "dropout": dropout, "variant": variant.name}
                    if not half.is_backward:
                        about["x_loads"] = [kernel.loads.get(half.products[0], 0) for kernel in half.kernels]
                    yield {**about, **_counts(half, TOKENS * HIDDEN)}


def norms(quick: bool) -> Iterator[dict[str, Any]]:
    """The norms: two rows, forward and backward, of every variant."""
    cases = list(itertools.product(PLACES, NORMS, (False, True), SIZES))
    for place, name, frozen, (rows, width) in cases[:1] if quick else cases:
        with FakeTensorMode():
            module, x = Normed(place, NORMS[name], width, frozen), torch.empty(rows, width, dtype=DTYPE)
            for variant in NORM_VARIANTS:
                for half in variant.generate(module, x):
                    about = {"operator": name, "place": place, "frozen": frozen, "rows": rows, "width": width}
                    gradients = 0 if frozen else 2 if name == "LayerNorm" else 1
                    yield {**about, "variant": variant.name, **_counts(half, rows * width, rows, gradients)}


def _counts(half: Generated, numel: int, rows: int = 0, gradients: int = 0) -> dict[str, Any]:
    partial, launches = half.workspace_bytes, len(half.kernels) + half.workspace_sums + len(half.operators)
    if "norm_backward" in half.operators:
        partial += _partial_sums(rows, numel // rows, gradients)
        launches += 2 * gradients  # a sum and a cast each
    return {
        "half": "backward" if half.is_backward else "forward",
        "kernels": launches,
        "bytes": half.bytes,
        "partial_sums": partial,
        "units": round((half.bytes + partial) / (numel * DTYPE.itemsize), 2),
    }


def _partial_sums(rows: int, width: int, gradients: int) -> int:
    """Bytes of the sums that every program of the norm's backward kernel leaves, written and read."""
    processors = PROPERTIES.multi_processor_count
    if norm.fused(width):
        programs = norm.backward_programs(rows, norm.backward_blocks(width), processors)
    else:
        programs = norm.sums_programs(rows, norm.sums_blocks(), width, processors)
    return 2 * programs * width * torch.float32.itemsize * gradients


def _line(row: dict[str, Any]) -> str:
    if "place" in row:
        case = f"{row['operator']}{' frozen' if row['frozen'] else ''}, {row['place']}, {row['rows']}x{row['width']}"
    else:
        case = f"{row['operator']}, dropout {row['dropout']}"
    loads = f", loads of x {row['x_loads']}" if "x_loads" in row else ""
    return (
        f"{case:48} {row['variant']:14} {row['half']:9} {row['kernels']:2} kernels {row['units']:6.2f} units, "
        f"{row['bytes'] / 1e6:7.2f} MB + {row['partial_sums'] / 1e6:.2f} of partial sums{loads}"
    )


def _json(result: dict[str, Any]) -> str:
    # one row to a line
    rows = ",\n  ".join(json.dumps(row) for row in result["rows"])
    head = ", ".join(f'"{name}": {json.dumps(value)}' for name, value in result.items() if name != "rows")
    return f'{{{head},\n "rows": [\n  {rows}\n]}}\n'


if __name__ == "__main__":
    main()
