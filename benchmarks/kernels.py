"""Bandwidth of graphopt's Triton kernels on a CUDA device, beside a device copy and Inductor's kernels for the formula.

    python benchmarks/kernels.py               # every kernel, into benchmarks/results/kernels-<device name>.json
    python benchmarks/kernels.py --interpret   # no GPU: tiny sizes, errors only, by Triton's interpreter

GB/s is the bytes a formula has to read and write over the median time of `triton.testing.do_bench`; inputs are random
and rotate through more memory than the L2 cache holds. The error is that against float64, as a multiple of what the
roundings explain: where it exceeds 1 no speed is printed and the exit status is 1. Codes of groups are to be those of
the formula, bit by bit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read where the kernels are decorated

import torch
from provenance import machine, origin
from torch import Tensor

from graphopt.kernels import activation, group_quant, norm
from graphopt.kernels.language import INSTALLED
from graphopt.lowering import formulas
from graphopt.lowering import group_quant as group_formulas
from graphopt.lowering.activations import ACTIVATIONS
from graphopt.lowering.code_tables import CODES
from graphopt.lowering.codes import encode, slope

RESULTS = Path(__file__).parent / "results"
DTYPES = (torch.bfloat16, torch.float32)
UNIT = 2.0**-24  # one rounding of float32
EPS = 1e-5
GROUP = 64
GROUPS = (  # bits, symmetric, dithered
    (8, True, False), (4, True, False), (4, True, True), (4, False, False), (2, True, False), (2, True, True),
)  # fmt: skip


@dataclass
class Case:
    """One kernel on one shape: its inputs, the formula for Inductor, and the error of the kernel's outputs."""

    name: str
    dtype: torch.dtype
    inputs: Callable[[], tuple[Any, ...]]
    kernel: Callable[..., tuple[Tensor, ...]]
    formula: Callable[..., Any]
    error: Callable[..., float]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure graphopt's Triton kernels.")
    parser.add_argument("--interpret", action="store_true", help="errors only, on the CPU, by Triton's interpreter")
    parser.add_argument("--only", default="", help="those whose name contains this")
    parser.add_argument("--out", type=Path, help="the JSON written (default: results/kernels-<device name>.json)")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available() and not arguments.interpret
    if not INSTALLED or not (cuda or arguments.interpret):
        print("no CUDA device: nothing is measured; --interpret checks the errors on the CPU")
        return
    device = torch.device("cuda" if cuda else "cpu")
    elements = 2**26 if cuda else 2**11
    rows, failed = [], []
    copy = copy_bandwidth(device) if cuda else None
    if copy:
        print(f"device copy: {copy:.0f} GB/s")
    for case in cases(elements, device):
        if arguments.only not in case.name:
            continue
        torch.manual_seed(0)
        row = {"kernel": case.name, "dtype": str(case.dtype).removeprefix("torch.")}
        inputs = case.inputs()
        row["error"] = round(case.error(case.kernel(*inputs), *inputs), 3)
        if not row["error"] <= 1:
            failed.append(f"{case.name} {row['dtype']}: error {row['error']} of what rounding explains")
        elif cuda:
            row |= speed(case, inputs, copy)
        rows.append(row)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        torch._dynamo.reset()
    if failed:
        sys.exit("\n".join(["wrong results, no speed:", *failed]))
    if cuda:
        name = torch.cuda.get_device_name(device)
        setting = {**machine(), **origin(), "device": name, "torch": torch.__version__, "copy_gb_s": round(copy)}
        out = arguments.out or RESULTS / f"kernels-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
        out.write_text(json.dumps({**setting, "rows": rows}, indent=1) + "\n")
        print(f"wrote {out}")


def cases(elements: int, device: torch.device) -> Iterator[Case]:
    for dtype in DTYPES:
        for name, scheme in (("gelu", "relu3"), ("silu", "relu3"), ("gelu", "lloyd"), ("gelu", "unbiased")):
            yield _activation_forward(name, scheme, elements, dtype, device)
        yield _activation_backward(elements, dtype, device)
        for bits, symmetric, dithered in GROUPS:
            yield _group_encode(bits, symmetric, dithered, elements, dtype, device)
            yield _group_decode(bits, symmetric, dithered, elements, dtype, device)
        for width in (768, 1024, 4096, 8192, 16384) if device.type == "cuda" else (40, 767):
            shape = (max(2, elements // width), width)
            for centred in (True, False):
                yield _norm_forward(shape, centred, dtype, device)
                for frozen in (False, True):
                    yield _norm_backward(shape, centred, frozen, dtype, device)


def _activation_forward(name: str, scheme: str, elements: int, dtype: torch.dtype, device: torch.device) -> Case:
    function, derivative = ACTIVATIONS[name]
    row = CODES[name][scheme]

    def inputs() -> tuple[Tensor, Tensor]:
        return torch.randn(elements, device=device, dtype=dtype) * 2, torch.tensor(3, device=device)

    def formula(x: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        h = x.float()
        code = encode(h, derivative, scheme, row, lambda: torch.rand_like(h))
        return function(h).to(dtype), formulas.pack(code, 2)

    def error(found: tuple[Tensor, Tensor], x: Tensor, seed: Tensor) -> float:
        y, words = found
        _, expected = activation.reference_forward(x, name, scheme, seed)
        # where rounding decides, codes differ: a few in 10^5
        codes = [formulas.unpack(each, [x.numel()], 2, torch.int32) for each in (words, expected)]
        differ = (codes[0] != codes[1]).double().mean().item() / 1e-4
        wide = x.double()
        return max(differ, _excess(y, function(wide), 16 * UNIT * (1 + wide.abs())))

    run = lambda x, seed: activation.forward(x, name, scheme, seed)  # noqa: E731
    return Case(f"activation.forward {name} {scheme}", dtype, inputs, run, formula, error)


def _activation_backward(elements: int, dtype: torch.dtype, device: torch.device) -> Case:
    levels = CODES["gelu"]["relu3"].levels

    def inputs() -> tuple[Tensor, Tensor]:
        codes = torch.randint(0, 4, (elements,), device=device)
        return torch.randn(elements, device=device, dtype=dtype), formulas.pack(codes, 2)

    def formula(grad: Tensor, words: Tensor) -> Tensor:
        code = formulas.unpack(words, list(grad.shape), 2, torch.int32)
        return (grad.float() * slope(code, levels, torch.float32)).to(dtype)

    def error(found: tuple[Tensor], grad: Tensor, words: Tensor) -> float:
        code = formulas.unpack(words, list(grad.shape), 2, torch.int32)
        expected = grad.double() * slope(code, levels, torch.float64)
        return _excess(found[0], expected, 2 * UNIT * expected.abs())

    run = lambda grad, words: (activation.backward(grad, words, "gelu", "relu3"),)  # noqa: E731
    return Case("activation.backward", dtype, inputs, run, formula, error)


def _group_encode(
    bits: int, symmetric: bool, dithered: bool, elements: int, dtype: torch.dtype, device: torch.device
) -> Case:
    def inputs() -> tuple[Tensor, Tensor | None]:
        return torch.randn(elements, device=device, dtype=dtype), _seed(dithered, device)

    def formula(x: Tensor, seed: Tensor | None) -> tuple[Tensor, ...]:
        return group_formulas.encode(x, bits, GROUP, symmetric, seed)

    def error(found: tuple[Tensor, ...], x: Tensor, seed: Tensor | None) -> float:
        expected = formula(x, seed)
        return 0.0 if all(torch.equal(one, other) for one, other in zip(found, expected)) else math.inf

    run = lambda x, seed: tuple(group_quant.encode(x, bits, GROUP, symmetric, seed))  # noqa: E731
    return Case(f"group_quant.encode {_kind(bits, symmetric, dithered)}", dtype, inputs, run, formula, error)


def _group_decode(
    bits: int, symmetric: bool, dithered: bool, elements: int, dtype: torch.dtype, device: torch.device
) -> Case:
    def inputs() -> tuple[Tensor | None, ...]:
        x, seed = torch.randn(elements, device=device, dtype=dtype), _seed(dithered, device)
        return seed, *group_formulas.encode(x, bits, GROUP, symmetric, seed)

    def formula(seed: Tensor | None, codes: Tensor, *kept: Tensor) -> Tensor:
        return group_formulas.decode(codes, kept, seed, bits, (elements,), dtype)

    def error(found: tuple[Tensor], seed: Tensor | None, codes: Tensor, *kept: Tensor) -> float:
        expected = group_formulas.decode(codes, kept, seed, bits, (elements,), torch.float32).double()
        return _excess(found[0], expected, torch.zeros_like(expected))

    def run(seed: Tensor | None, codes: Tensor, *kept: Tensor) -> tuple[Tensor]:
        return (group_quant.decode(codes, kept, seed, bits, (elements,), dtype),)

    return Case(f"group_quant.decode {_kind(bits, symmetric, dithered)}", dtype, inputs, run, formula, error)


def _seed(dithered: bool, device: torch.device) -> Tensor | None:
    return torch.tensor(3, device=device) if dithered else None


def _kind(bits: int, symmetric: bool, dithered: bool) -> str:
    return f"int{bits}{'' if symmetric else ' asymmetric'}{' dithered' if dithered else ''}"


def _norm_forward(shape: tuple[int, int], centred: bool, dtype: torch.dtype, device: torch.device) -> Case:
    width = shape[1]

    def inputs() -> tuple[Any, ...]:
        x, weight = (torch.randn(size, device=device, dtype=dtype) for size in (shape, width))
        return x, weight, torch.randn_like(weight) if centred else None

    def formula(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        return formulas.norm(x, 1, weight, bias, EPS, centred, dtype)

    def error(found: tuple[Tensor, ...], x: Tensor, weight: Tensor, bias: Tensor | None) -> float:
        wide = [None if each is None else each.double() for each in (x, weight, bias)]
        y, z, rstd = formulas.norm(wide[0], 1, *wide[1:], EPS, centred, torch.float64)
        bound = (8 + width.bit_length()) * UNIT * (1 + (wide[0].abs() * rstd).amax(-1, keepdim=True))
        of_y = bound * wide[1].abs() + 4 * UNIT * (1 + y.abs())
        return max(_excess(found[0], y, of_y), _excess(found[1], z, bound), _excess(found[2], rstd, bound * rstd))

    run = lambda x, weight, bias: norm.forward(x, (width,), weight, bias, EPS, centred, dtype)  # noqa: E731
    return Case(f"norm.forward {'layer' if centred else 'rms'} {width}", dtype, inputs, run, formula, error)


def _norm_backward(
    shape: tuple[int, int], centred: bool, frozen: bool, dtype: torch.dtype, device: torch.device
) -> Case:
    rows, width = shape
    mask = (not frozen, centred and not frozen)

    def inputs() -> tuple[Tensor, ...]:
        grad, z = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        return grad, z, torch.rand(rows, 1, device=device) + 0.5, torch.randn(width, device=device, dtype=dtype)

    def formula(*tensors: Tensor) -> list[Tensor]:
        dx, *sums = formulas.norm_backward(*tensors, 1, centred, dtype)
        return [dx, *(each for each, wanted in zip(sums, mask) if wanted)]

    def error(found: tuple[Tensor, ...], *tensors: Tensor) -> float:
        grad, z, rstd, weight = (each.double() for each in tensors)
        dx, *sums = formulas.norm_backward(grad, z, rstd, weight, 1, centred, torch.float64)
        dz = grad * weight
        terms = dz.abs() + z.abs() * (dz * z).abs().mean(-1, keepdim=True) + dz.abs().mean(-1, keepdim=True)
        errors = [_excess(found[0], dx, 24 * UNIT * terms * rstd)]
        for each, expected, terms, wanted in zip(found[1:], sums, (grad * z, grad), mask):
            if wanted:
                # roundings of a float32 sum over the rows add up like a random walk; four of its standard deviations
                bound = 4 * (math.sqrt(rows) + 4) * UNIT * terms.abs().sum(0)
                errors.append(_excess(each, expected, bound))
        return max(errors)

    run = lambda *tensors: norm.backward(*tensors, 1, centred, dtype, mask)  # noqa: E731
    kind = f"{'layer' if centred else 'rms'} {width}{' frozen' if frozen else ''}"
    return Case(f"norm.backward {kind}", dtype, inputs, run, formula, error)


def _excess(found: Tensor, expected: Tensor, absolute: Tensor) -> float:
    """The largest error as a multiple of `absolute` with the last rounding added; inf for NaN."""
    # the interpreter cuts float32 off to bfloat16
    last = torch.finfo(found.dtype).eps * (1 if found.dtype == torch.bfloat16 and not found.is_cuda else 0.5)
    allowed = absolute + last * (expected.abs() + absolute) + torch.finfo(found.dtype).tiny
    return ((found.double() - expected).abs() / allowed).nan_to_num(math.inf, math.inf).max().item()


def speed(case: Case, inputs: tuple[Any, ...], copy: float) -> dict[str, float]:
    """GB/s of the kernel and of Inductor's kernels for the formula, and the kernel's share of a copy's."""
    outputs = case.kernel(*inputs)
    moved = sum(each.nbytes for each in (*inputs, *outputs) if torch.is_tensor(each))
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    sets = [inputs, *(case.inputs() for _ in range(3 * cache // moved + 1))]
    compiled = torch.compile(case.formula, dynamic=False, fullgraph=True)
    own, stock = (moved / _milliseconds(run, sets) / 1e6 for run in (case.kernel, compiled))
    return {"gb_s": round(own), "of_copy": round(own / copy, 3), "inductor_gb_s": round(stock)}


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of torch's copy, read and write counted."""
    source, target = (torch.empty(2**27, device=device).normal_() for _ in range(2))
    return 2 * source.nbytes / _milliseconds(target.copy_, [(source,)]) / 1e6


def _milliseconds(run: Callable[..., Any], sets: list[tuple[Any, ...]]) -> float:
    from triton.testing import do_bench

    turns = itertools.cycle(sets)
    return float(do_bench(lambda: run(*next(turns)), warmup=50, rep=200, return_mode="median"))


if __name__ == "__main__":
    main()
