"""What an operator costs, in seconds, by its FLOPs and the bytes it moves: the same on every machine.

    seconds = max(FLOPs / rate, bytes / bandwidth)      for matrix products, convolutions, attention
    seconds = bytes / bandwidth                         for all else, where it is written out at all

A plan only compares such figures with one another, so what counts is the ratio of the two rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry, shape_wrapper

from graphopt.graph import hint, nbytes, storage, tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class Rates:
    """FLOPs and bytes a second that large operators reach on a kind of device, and values encoded and decoded."""

    flops: float
    attention_flops: float
    bandwidth: float
    codec: float


# bf16. cuda: half of an H100's peak (989e12, 3.35e12); cpu: two cores with AMX
RATES = {"cuda": Rates(500e12, 250e12, 2.5e12, 1e12), "cpu": Rates(2e12, 0.6e12, 15e9, 4e9)}

_CPU_ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu


def _grouped_product(a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
    """A product for each expert: two matrices, or three, of which the groups share the rows, the columns or the sum."""
    groups = a[0] if len(a) == len(b) == 3 else 1
    return 2 * groups * a[-2] * a[-1] * b[-1]


FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _CPU_ATTENTION: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
    aten._grouped_mm: shape_wrapper(_grouped_product),  # type: ignore[no-untyped-call]
}
ATTENTION = {
    _CPU_ATTENTION, aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention, aten._flash_attention_forward, aten._efficient_attention_forward,
}  # fmt: skip


def packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", node.target)


def is_heavy(node: fx.Node) -> bool:
    """Whether an operator is a kernel of its own that is priced by its FLOPs."""
    return packet(node) in FLOPS


def rates(graph: fx.Graph) -> Rates:
    """Those of the device that most tensors of the graph lie on; of a GPU where the kind is not known."""
    kinds = [value.device.type for node in graph.nodes if (value := tensor(node)) is not None]
    return RATES.get(max(sorted(set(kinds)), key=kinds.count, default="cpu"), RATES["cuda"])


def seconds(node: fx.Node, rate: Rates) -> float:
    """The time of one run of a heavy operator; infinite where its FLOPs are not known."""
    given = fx.map_arg((node.args, node.kwargs), lambda each: _sized(each.meta.get("val")))
    moved = sum(nbytes(value) for each in node.all_input_nodes if (value := tensor(each)) is not None)
    output = node.meta.get("val")
    values = output if isinstance(output, (tuple, list)) else (output,)
    moved += sum(nbytes(value) for value in values if isinstance(value, torch.Tensor))
    flops = rate.attention_flops if packet(node) in ATTENTION else rate.flops
    return max(_flops(node, given, _sized(output)) / flops, moved / rate.bandwidth)


def _flops(node: fx.Node, given: Any, output: Any) -> float:
    try:
        return float(FLOPS[packet(node)](*given[0], **given[1], out_val=output))
    except (TypeError, AssertionError, ValueError, KeyError, IndexError):  # layouts that the formula was not made for
        return math.inf


def _sized(value: Any) -> Any:
    """What a flop formula reads, the shape, with symbolic sizes as numbers."""
    if isinstance(value, (tuple, list)):
        return type(value)(_sized(each) for each in value)
    if isinstance(value, torch.SymInt):
        return hint(value)
    if isinstance(value, torch.Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape):
        return torch.empty([hint(size) for size in value.shape], dtype=value.dtype, device="meta")
    return value


def written_out(node: fx.Node) -> bool:
    """Whether the tensor has to be written to memory: a heavy operator, or one that is not fused, reads or makes it."""
    value = tensor(node)
    if value is None:
        return False
    queue, seen = [node], {node}
    while queue:
        for user in queue.pop().users:
            if is_heavy(user) or user.op == "output":
                return True
            shown = tensor(user)
            if user not in seen and shown is not None and storage(shown) == storage(value):
                seen.add(user)
                queue.append(user)
    return False


def step_seconds(graph: fx.Graph, rate: Rates) -> float:
    """The time of forward and backward as the joint graph has them: heavy operators, and what is written between."""
    total, seen = 0.0, set[int]()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if is_heavy(node) and math.isfinite(time := seconds(node, rate)):
            total += time
        value = tensor(node)
        if value is not None and storage(value) not in seen and not is_heavy(node) and written_out(node):
            seen.add(storage(value))
            total += 2 * nbytes(value) / rate.bandwidth
    return total
