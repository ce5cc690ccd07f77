"""Build every Triton kernel of graphopt for sm_80 and sm_90, no GPU needed: registers, spills, shared memory of each.

    python benchmarks/cubins.py           # all of them, into benchmarks/results/cubins.json
    python benchmarks/cubins.py --quick   # a few; and whether the file is about the present kernels

Exit status 1 if a kernel spills registers, or --quick finds the file out of date. The figures are those of the `ptxas`
that comes with Triton. Sizes and strides are taken to be divisible by 16, as they are in most networks, but in rows
named "unaligned" and in norms of other widths.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

if os.environ.get("TRITON_INTERPRET", "0") != "0":
    sys.exit("TRITON_INTERPRET is set: there is nothing to build then")

import torch  # before triton
import triton
from provenance import machine, origin
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from graphopt.kernels import activation, group_quant, norm
from graphopt.lowering.activations import ACTIVATIONS

RESULT = Path(__file__).parent / "results" / "cubins.json"
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
TARGETS = {"sm_80": 80, "sm_90": 90}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WIDTHS = (64, 768, 767, 1024, 2048, 4096, 4095, 8192, 8191, 16384, 32768)
# the values of a row of codes change no more than literals
ROW = {"L0": 0.0, "L1": -0.05, "L2": 1.05, "L3": 1.0, "T0": -3.0, "T1": 0.01, "T2": 3.0}
QUICK = 14


class Build(NamedTuple):
    """One kernel with the types of its arguments, its constants and its launch."""

    kernel: str
    variant: str
    dtype: str
    arch: str
    types: dict[str, str]
    constants: dict[str, Any]
    block: tuple[int, ...]
    warps: int
    aligned: bool = True
    fused: bool = True  # products with sums

    @property
    def about(self) -> dict[str, Any]:
        return {
            "kernel": self.kernel, "variant": self.variant, "dtype": self.dtype, "arch": self.arch,
            "block": list(self.block), "warps": self.warps,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Build graphopt's Triton kernels without a GPU.")
    parser.add_argument("--quick", action="store_true", help=f"build {QUICK} of them and check the committed file")
    parser.add_argument("--out", type=Path, default=RESULT, help="the JSON written (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    arguments = parser.parse_args()
    every = builds()
    wanted = every[:: -(-len(every) // QUICK)] if arguments.quick else every
    with ProcessPoolExecutor(arguments.processes) as pool:
        rows = list(pool.map(build, wanted, chunksize=4))
    for row in rows:
        print(_line(row))
    wrong = [_line(row) for row in rows if row["spill_stores"] or row["spill_loads"]]
    if arguments.quick:
        wrong += out_of_date(every)
    else:
        result = {**machine(), **origin(), "triton": triton.__version__, "kernels": sources(), "rows": rows}
        arguments.out.write_text(_json(result))
        print(f"wrote {len(rows)} builds into {arguments.out}")
    if wrong:
        sys.exit("\n".join(["wrong:", *wrong]))


def builds() -> list[Build]:
    """Every kernel for every dtype, target and representative launch."""
    found = []
    for arch in TARGETS:
        for dtype in DTYPES:
            found += [*_activations(dtype, arch), *_norms(dtype, arch), *_groups(dtype, arch)]
    return found


def _activations(dtype: str, arch: str) -> list[Build]:
    words, warps = activation.blocks()
    found = []
    for name in ACTIVATIONS:
        for scheme in ("relu3", "unbiased", "lloyd"):
            types = {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "code_ptr": "*i32", "seed_ptr": "*i64", "numel": "i32"}
            constants = {"ACTIVATION": name, "SCHEME": scheme, **ROW, "WORDS": words}
            if scheme != "unbiased":
                constants |= {"seed_ptr": types.pop("seed_ptr") and None}
            for aligned in (True, False) if name == "gelu" else (True,):
                variant = f"{name} {scheme}{'' if aligned else ' unaligned'}"
                found.append(
                    Build("activation.forward", variant, dtype, arch, types, constants, (words, 16), warps, aligned)
                )
    types = {"grad_ptr": f"*{dtype}", "code_ptr": "*i32", "dx_ptr": f"*{dtype}", "numel": "i64"}
    constants = {**{name: value for name, value in ROW.items() if name[0] == "L"}, "WORDS": words}
    for aligned in (True, False):
        variant = "aligned" if aligned else "unaligned"
        found.append(Build("activation.backward", variant, dtype, arch, types, constants, (words, 16), warps, aligned))
    return found


def _norms(dtype: str, arch: str) -> list[Build]:
    found = []
    common = {"rows": "i32", "width": "i32"}
    for width in WIDTHS:
        for centred in (True, False):
            variant = f"{'layer' if centred else 'rms'} {width}"
            pointer, aligned = f"*{dtype}", width % 16 == 0
            block, rows, warps = norm.forward_blocks(width)
            types = {"x_ptr": pointer, "weight_ptr": pointer, "y_ptr": pointer, "z_ptr": pointer, "rstd_ptr": "*fp32"}
            types |= {**common, "x_stride": "i32", "eps": "fp32"} | ({"bias_ptr": pointer} if centred else {})
            constants = {"CENTRED": centred, "BLOCK": block, "ROWS": rows} | ({} if centred else {"bias_ptr": None})
            found.append(Build("norm.forward", variant, dtype, arch, types, constants, (rows, block), warps, aligned))

            block, rows, warps = norm.backward_blocks(width)
            types = {"grad_ptr": pointer, "z_ptr": pointer, "rstd_ptr": "*fp32", "weight_ptr": pointer}
            types |= {"dx_ptr": pointer, **common, "grad_stride": "i32", "z_stride": "i32"}
            types |= {"dweight_ptr": "*fp32"} | ({"dbias_ptr": "*fp32"} if centred else {})
            constants = {"CENTRED": centred, "BLOCK": block, "ROWS": rows} | ({} if centred else {"dbias_ptr": None})
            name = "norm.backward" if norm.fused(width) else "norm.wide_backward"
            found.append(Build(name, variant, dtype, arch, types, constants, (rows, block), warps, aligned))
    block, rows, warps = norm.sums_blocks()
    types = {"grad_ptr": f"*{dtype}", "z_ptr": f"*{dtype}", "dweight_ptr": "*fp32", "dbias_ptr": "*fp32", **common}
    types |= {"grad_stride": "i32", "z_stride": "i32"}
    constants = {"BLOCK": block, "ROWS": rows}
    found.append(Build("norm.sums", "layer", dtype, arch, types, constants, (rows, block), warps))
    return found


def _groups(dtype: str, arch: str) -> list[Build]:
    found = []
    for bits, symmetric, dithered in itertools.product(group_quant.BITS, (True, False), (False, True)):
        kind = f"int{bits}{'' if symmetric else ' asymmetric'}{' dithered' if dithered else ''}"
        types = {"x_ptr": f"*{dtype}", "codes_ptr": "*u8", "scale_ptr": "*bf16", "numel": "i64"}
        types |= ({} if symmetric else {"low_ptr": "*bf16"}) | ({"seed_ptr": "*i64"} if dithered else {})
        missing = {name: None for name in ("low_ptr", "seed_ptr") if name not in types}
        for group, aligned in ((8, True), (64, True), (1024, True), (64, False)):
            if not (aligned or bits == 4):
                continue
            rows, width, warps = group_quant.blocks(bits, group, DTYPES[dtype])
            constants = group_quant.constants(bits, group, symmetric, dithered) | missing
            constants |= {"ROWS": rows, "WIDTH": width}
            variant = f"{kind} {group}{'' if aligned else ' unaligned'}"
            for name in ("group_quant.encode", "group_quant.decode"):
                found.append(
                    Build(name, variant, dtype, arch, types, constants, (rows, width), warps, aligned, fused=False)
                )
    return found


def build(each: Build) -> dict[str, Any]:
    """The row of one kernel: what it is, and what ptxas says of it."""
    module, name = each.kernel.split(".")
    modules = {"activation": activation, "norm": norm, "group_quant": group_quant}
    kernel = getattr(modules[module], f"{name}_kernel")
    signature, constants, attributes = {}, {}, {}
    for at, argument in enumerate(kernel.arg_names):
        signature[argument] = each.types.get(argument, "constexpr")
        if argument not in each.types:
            constants[(at,)] = each.constants[argument]
        elif each.types[argument].startswith("*") or (each.aligned and argument not in ("eps", "rows")):
            attributes[(at,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", TARGETS[each.arch], 32),
        options={"num_warps": each.warps, "enable_fp_fusion": each.fused},
    )
    said = _ptxas(compiled.asm["ptx"], each.arch, each.fused)
    return {
        **each.about,
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spill_stores": int(re.search(r"(\d+) bytes spill stores", said)[1]),
        "spill_loads": int(re.search(r"(\d+) bytes spill loads", said)[1]),
        "shared": compiled.metadata.shared,
    }


def _ptxas(ptx: str, arch: str, fused: bool) -> str:
    target = re.search(r"\.target (\w+)", ptx)[1]
    assert target.startswith(arch)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [PTXAS, "-v", f"--gpu-name={target}", f"--fmad={str(fused).lower()}", file.name, "-o", os.devnull]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def sources() -> str:
    """A hash of the source of every device function."""
    found = {
        f"{module.__name__}.{name}": value.src
        for module in (activation, norm, group_quant)
        for name, value in vars(module).items()
        if isinstance(value, JITFunction)
    }
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def out_of_date(every: list[Build]) -> list[str]:
    """What the committed file says of other kernels or launches than the present ones."""
    known = json.loads(RESULT.read_text())
    found = []
    if known["kernels"] != sources():
        found.append(f"{RESULT.name} is about other kernels: run benchmarks/cubins.py")
    if [{name: row[name] for name in every[0].about} for row in known["rows"]] != [each.about for each in every]:
        found.append(f"{RESULT.name} is about other launches: run benchmarks/cubins.py")
    return found + [_line(row) for row in known["rows"] if row["spill_stores"] or row["spill_loads"]]


def _line(row: dict[str, Any]) -> str:
    block = "x".join(map(str, row["block"]))
    return (
        f"{row['arch']} {row['dtype']} {row['kernel']:19} {row['variant']:30} {block:>8} x {row['warps']:2} warps: "
        f"{row['registers']:3} registers, {row['shared']:5} bytes shared, "
        f"spills {row['spill_stores']} + {row['spill_loads']}"
    )


def _json(result: dict[str, Any]) -> str:
    # one row to a line
    rows = ",\n  ".join(json.dumps(row) for row in result["rows"])
    head = ", ".join(f'"{name}": {json.dumps(value)}' for name, value in result.items() if name != "rows")
    return f'{{{head},\n "rows": [\n  {rows}\n]}}\n'


if __name__ == "__main__":
    main()
