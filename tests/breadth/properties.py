"""What must hold for one network under every preset: the invariants, as one function that says what does not."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch._inductor.config as inductor_config
from random_networks import Network
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition

from graphopt import partition, split
from graphopt.errors import PlanError
from graphopt.lowering.decompose import inductor_table

PRESETS: dict[str, dict[str, Any]] = {
    "exact": {"preset": "exact"},
    "paper": {"preset": "paper"},
    "compressed": {},
    "smallest": {"preset": "smallest"},
    "budget": {"memory_budget": 0.3},
    "exact budget": {"preset": "exact", "memory_budget": 0.3},
    "two bits": {"codecs": ["int2", "int2-16-unbiased"], "time_slack": 1e9, "recompute": "pointwise"},
}
DRAWN = {
    "smallest": {"rounding": "nearest", "approx_activation": "lloyd"},
    "budget": {"rounding": "nearest"},
    "two bits": {"codecs": ["int2"]},
}
# what approximate presets may change of the gradient; a step in the wrong direction has 1.4
ERRORS = {"paper": 0.99, "compressed": 0.05, "smallest": 0.7, "budget": 0.7, "two bits": 10.0}
ASKED = 3  # what torch saves between checkpointed regions is known only once a plan was cut, and then named
ROUNDINGS = 8  # a formula in another form, a few operators in a row
ORDER = 3  # two orders of the same roundings: neither is nearer to the exact value by more than a factor


@dataclass(frozen=True)
class Result:
    """What one step leaves. `saved` are the tensors that autograd kept, those of the model left out."""

    outputs: list[Tensor]
    gradients: list[Tensor | None]
    buffers: list[Tensor]
    saved: list[Tensor]

    @property
    def bytes(self) -> int:
        return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in self.saved}.values())


def _backend(cut: Callable[..., Any]) -> Callable[..., Any]:
    """Stock Inductor's decompositions, those of its settings at the time, and a cut; the graphs run node by node."""

    def backend(gm: Any, example_inputs: Sequence[Any]) -> Any:
        compiler = aot_autograd(
            fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
            partition_fn=cut,
            decompositions=inductor_table(),
        )
        return compiler(gm, example_inputs)

    return backend


stock = _backend(min_cut_rematerialization_partition)
# stock's cut but for what backward compares for equality, which stock makes anew: wrong if a last bit is another then
stock_but_comparisons = _backend(partial(partition.cut, heuristics=partition.STOCK))


def step(
    network: Network, backend: Any = None, dtype: torch.dtype = torch.float32, options: dict[str, Any] | None = None
) -> Result:
    """One step of a network, from a fixed seed; dropout draws what eager draws."""
    model, inputs = network.build()
    model = model.to(dtype)
    inputs = [x.detach().to(dtype, copy=True).requires_grad_(x.requires_grad) for x in inputs]
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers(), *inputs)}
    saved: list[Tensor] = []

    def pack(each: Tensor) -> Tensor:
        if each.untyped_storage().data_ptr() not in own:
            saved.append(each)
        return each

    with inductor_config.patch(fallback_random=True), torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each):
        function: Callable[..., Any] = model
        if backend is not None:
            function = torch.compile(model, backend=backend, dynamic=network.dynamic, options=options)
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=network.autocast):
            outputs = function(*inputs)
    torch.manual_seed(4)
    weighted = [(each * torch.randn(each.shape).to(each.dtype)).sum() for each in outputs if each.requires_grad]
    leaves = [each for each in (*model.parameters(), *inputs) if each.requires_grad]
    found = torch.autograd.grad(torch.stack(weighted).sum(), leaves, allow_unused=True) if weighted else []
    return Result([each.detach() for each in outputs], list(found), list(model.buffers()), saved)


def violations(network: Network, preset: str, backend: Any = "lowmem_eager") -> list[str]:
    """What one network breaks of the invariants under a preset; of a budget out of reach, under the least in reach."""
    torch._dynamo.reset()
    try:
        eager, precise, reference = step(network), step(network, dtype=torch.float64), step(network, stock)
    except Exception:  # neither eager nor stock takes it, such as a batch norm of one token
        return []
    options = dict(PRESETS[preset])
    if network.draws and preset in DRAWN:
        options |= DRAWN[preset]  # codecs that draw seeds would give a model under fallback_random other masks
    torch._dynamo.reset()
    with patch.object(split, "SLIGHT", 0):  # a budget is a budget, though networks are small
        for _ in range(ASKED):
            try:
                found = step(network, backend, options=options)
                break
            except PlanError as error:
                least = re.search(r"cannot be reached; the least is ([\d,]+) bytes", str(error))
                if not least:
                    return [f"PlanError: {error}"]
                options["memory_budget"] = max(2, int(least[1].replace(",", "")))  # 1 is all of it
                torch._dynamo.reset()
        else:
            return ["the least that an error names cannot be reached"]
    eps = torch.finfo(torch.bfloat16 if network.autocast else torch.float32).eps
    broken = []
    if (apart := _apart(found.outputs, eager.outputs)) > _rounding(eager.outputs, precise.outputs, eps):
        broken.append(f"forward differs from eager by {apart:.3g}")
    if (apart := _apart(found.buffers, eager.buffers)) > _rounding(eager.buffers, precise.buffers, eps):
        broken.append(f"buffers differ from those of eager by {apart:.3g}")
    if any(not _agree(mine, theirs) for mine, theirs in zip(found.gradients, eager.gradients)):
        broken.append("another parameter has a gradient than under eager")
    allowed = max(ERRORS.get(preset, 0.0), _rounding(eager.gradients, precise.gradients, eps))
    if not (apart := _apart(found.gradients, eager.gradients)) <= allowed:
        broken.append(f"gradients differ from those of eager by {apart:.3g}, allowed are {allowed:.3g}")
    budget = options.get("memory_budget", math.inf)
    most = reference.bytes
    if found.bytes > min(budget, 1) * most:
        torch._dynamo.reset()
        most = max(most, step(network, stock_but_comparisons).bytes)
    if found.bytes > most:
        broken.append(f"{found.bytes} bytes are saved, under stock {most}")
    if found.bytes > (allowed := budget * (most if budget <= 1 else 1)):
        broken.append(f"{found.bytes} bytes are saved, the budget is {allowed}")
    # a bias is also what a linear makes of zeros
    weights = [each for name, each in network.build()[0].named_parameters() if not name.endswith("bias")]
    if any(_shows(saved, weight) for saved in found.saved for weight in weights):
        broken.append("a copy of a parameter is saved")
    return broken


def _norm(tensors: Sequence[Tensor | None]) -> float:
    return math.sqrt(sum(float(each.double().square().sum()) for each in tensors if each is not None))


def _apart(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """|x - y| / |y| over all tensors that both have."""
    pairs = [(x.double(), y.double()) for x, y in zip(found, expected) if x is not None and y is not None]
    return _norm([x - y for x, y in pairs]) / (_norm(expected) or 1.0)


def _rounding(single: Sequence[Tensor | None], double: Sequence[Tensor | None], eps: float) -> float:
    """How far a step may be from eager's: ORDER times as far as eager is from float64, and not less than a few eps.

    Where float64 drew other masks, or took another turn at a comparison, that distance says nothing.
    """
    own, few = _apart(single, double), ROUNDINGS * eps
    return max(ORDER * own, few) if own < 16 * few else 16 * few


def _agree(mine: Tensor | None, theirs: Tensor | None) -> bool:
    """Both have a gradient, or neither; zeros count as none."""
    return (mine is None) == (theirs is None) or not any(each.any() for each in (mine, theirs) if each is not None)


def _shows(saved: Tensor, parameter: Tensor) -> bool:
    if saved.numel() != parameter.numel() or parameter.numel() < 8:
        return False
    one, other = (each.detach().flatten().double().sort().values for each in (saved, parameter))
    return torch.equal(one, other)
