"""check(): one step under stock Inductor and under lowmem, compared: what a careful user runs first.

found = graphopt.check(model, *batch, preset="smallest")
print(found)            # loss, gradients, bytes, time, and a verdict
assert found.ok
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from graphopt.errors import CaptureError, OptionsError
from graphopt.memory import saved_bytes
from graphopt.options import parse, with_preset
from graphopt.step import as_before, compiled, loss_of
from graphopt.verdict import LOSS_FLOAT32, ROUNDING, Check, Gradient, limit

SEED = 7
LARGEST_REFERENCE = 2**30  # parameters of a model whose gradients in float32 are computed too

Gradients = dict[str, Tensor]


def check(
    model: nn.Module,
    *inputs: Any,
    preset: str | None = None,
    options: Mapping[str, Any] | None = None,
    steps: int = 5,
    **kwargs: Any,
) -> Check:
    """Run steps of `model(*inputs, **kwargs)` under stock Inductor and under lowmem, and compare.

    The model returns a loss, an object with a `loss`, or tensors, of which the mean of squares is taken. It is compiled
    twice, in one graph of static shapes, and runs a few steps besides the `steps` timed pairs; parameters, gradients,
    buffers and the random state stay as they are. `options` are those of torch.compile; what is Inductor's own goes to
    both. Raises OptionsError, PlanError, CaptureError as `capture` does, and TypeError for what is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"check compares the gradients of a module's parameters; {model!r} is not a torch.nn.Module")
    if type(steps) is not int or steps < 1:
        raise OptionsError(f"steps is a number of at least 1, not {steps!r}")
    given = with_preset(preset, options)
    own, patches = parse(given)
    own_tensors = [each for each in pytree.tree_leaves((inputs, kwargs)) if isinstance(each, Tensor)]
    own_tensors += [*model.parameters(), *model.buffers()]
    with as_before(model), torch.enable_grad():
        exact = _float32(model, inputs, kwargs)
        ways = [
            _Way(model, compiled(model, "inductor", options=patches or None), inputs, kwargs),
            _Way(model, compiled(model, "lowmem", options=given), inputs, kwargs),
        ]
        results = [way.seeded() for way in ways]
        sizes = [saved_bytes(way.forward, own_tensors) for way in ways]
        precision = _precision(model, ways[0].forward)
        _ratio(ways, swap=False)  # not counted: it warms both up
        ratios = [_ratio(ways, swap=bool(i % 2)) for i in range(steps)]
    (stock_loss, stock), (loss, found) = results
    gradients = _compared(found, stock, exact, precision, limit(own))
    distances = None if exact is None else (_distance(stock, exact), _distance(found, exact))
    return Check(
        own, stock_loss, loss, gradients, _distance(found, stock), _cosine(found, stock), distances, sizes[0], sizes[1],
        statistics.median(ratios), precision,
    )  # fmt: skip


@dataclass
class _Way:
    """A way to run a step: gradients are returned, those of the model are not touched and none of its hooks run."""

    model: nn.Module
    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    kwargs: dict[str, Any]

    def forward(self) -> Any:
        return self.function(*self.inputs, **self.kwargs)

    def step(self) -> tuple[float, Gradients]:
        trained = {name: each for name, each in self.model.named_parameters() if each.requires_grad}
        loss = loss_of(self.forward())
        if not trained:
            raise CaptureError("no parameter of the model is trained: there are no gradients to compare")
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        return loss.item(), {name: each for name, each in zip(trained, found) if each is not None}

    def seeded(self) -> tuple[float, Gradients]:
        """A step from a fixed seed, from the state in which the model is given; the first call compiles."""
        with as_before(self.model):
            self.forward()
        with as_before(self.model):
            torch.manual_seed(SEED)
            return self.step()

    def seconds(self) -> float:
        _wait()
        start = time.perf_counter()
        self.step()
        _wait()
        return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _ratio(ways: list[_Way], swap: bool) -> float:
    """Seconds of the second by those of the first, the two run in turn; who goes first alternates."""
    if swap:
        second, first = ways[1].seconds(), ways[0].seconds()
    else:
        first, second = ways[0].seconds(), ways[1].seconds()
    return second / first


def _float32(model: nn.Module, inputs: Any, kwargs: Any) -> Gradients | None:
    """The gradients of an eager float32 step; None if the model is large, cannot be copied or draws random numbers."""
    if sum(each.numel() for each in model.parameters()) > LARGEST_REFERENCE:
        return None
    try:
        reference = copy.deepcopy(model).float()
    except (RuntimeError, TypeError):  # tensors that are not leaves, members that do not copy
        return None
    inputs, kwargs = pytree.tree_map_only(Tensor, _to_float32, (inputs, kwargs))
    way = _Way(reference, reference, inputs, kwargs)
    losses = []
    with torch.autocast(_device(model).type, enabled=False):
        for seed in (SEED, SEED + 1):
            torch.manual_seed(seed)
            loss, gradients = way.step()
            losses.append(loss)
    drawn = abs(losses[0] - losses[1]) > LOSS_FLOAT32 * abs(losses[0])
    return None if drawn else gradients


def _to_float32(x: Tensor) -> Tensor:
    x = x.detach()
    return x.float() if x.is_floating_point() else x


def _device(model: nn.Module) -> torch.device:
    return next((each.device for each in model.parameters()), torch.device("cpu"))


def _precision(model: nn.Module, forward: Callable[[], Any]) -> float:
    """eps of the least precise dtype of a model's parameters and of what it saves."""
    dtypes = {each.dtype for each in model.parameters()}

    def pack(saved: Tensor) -> Tensor:
        dtypes.add(saved.dtype)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        forward()
    return max(torch.finfo(each).eps for each in dtypes if each.is_floating_point and each.itemsize > 1)


def _compared(
    found: Gradients, stock: Gradients, exact: Gradients | None, precision: float, limit: float
) -> tuple[Gradient, ...]:
    rows, whole = [], _norm(stock)
    for name in stock.keys() | found.keys():
        one, other = ({name: each[name]} if name in each else {} for each in (found, stock))
        if not one or not other:  # only one of the two has this gradient
            rows.append(Gradient(name, math.inf, 0.0, limit))
            continue
        rounding = ROUNDING * _distance(other, {name: exact[name]}) if exact and name in exact else precision**0.5
        rounding = math.inf if _norm(other) < precision * whole else max(rounding, ROUNDING * precision)
        rows.append(Gradient(name, _distance(one, other), _cosine(one, other), limit + rounding))
    return tuple(sorted(rows, key=lambda row: (row.ok, -row.error, row.parameter)))


def _distance(found: Gradients, expected: Gradients) -> float:
    """|g - g0| / |g0| over the parameters that both have."""
    pairs = [(found[name], expected[name]) for name in expected if name in found]
    apart = math.sqrt(sum(_square(g.float() - g0.float()) for g, g0 in pairs))
    return apart / (_norm(expected) or 1.0)


def _cosine(found: Gradients, expected: Gradients) -> float:
    pairs = [(found[name].float(), expected[name].float()) for name in expected if name in found]
    product = sum(float((g * g0).sum(dtype=torch.float64)) for g, g0 in pairs)
    size = _norm(found) * _norm(expected)
    return product / size if size else 1.0


def _norm(gradients: Gradients) -> float:
    return math.sqrt(sum(_square(each) for each in gradients.values()))


def _square(x: Tensor) -> float:
    return float(x.float().square().sum(dtype=torch.float64))
