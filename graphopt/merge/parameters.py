"""Which parameters a merge may change: plain ones in a dtype it can round to, held once and read once.

A parameter that a second module holds, that overlaps another's memory or that a second node of the graph reads would
be changed for that reader too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from graphopt.graph import module_of, source_of

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Refused(Exception):
    """Why one norm cannot be merged."""


def unfit(parameter: Any) -> str | None:
    """Why a parameter's values cannot be scaled in place."""
    if type(parameter) is not nn.Parameter:
        return f"is a {type(parameter).__name__}, not a plain Parameter"
    if parameter.is_meta:
        return "is on the meta device and has no values"
    if parameter.dtype not in DTYPES or parameter.layout != torch.strided:
        return f"is {short(parameter.dtype)}: quantised, or no floating point"
    if parameter.is_inference():
        return "was made in inference mode and cannot be changed"
    if any(size > 1 and stride == 0 for size, stride in zip(parameter.shape, parameter.stride())):
        return "is expanded: several of its elements are one in memory"
    return None


class Parameters:
    """The parameters of a model's forward graph, and where they live: `given` are the graph's inputs."""

    def __init__(self, root: nn.Module, graph: fx.Graph, given: Sequence[Any]) -> None:
        self.modules = dict(root.named_modules())
        self._owners: dict[Tensor, list[tuple[str, str]]] = defaultdict(list)
        for path, module in self.modules.items():
            for name, each in (*module._parameters.items(), *module._buffers.items()):
                if each is not None:
                    self._owners[each].append((path, name))
        self._memory = {each: span for each in self._owners if (span := _memory(each)) is not None}
        self._of = {
            node: each
            for node, each in zip(graph.find_nodes(op="placeholder"), given)
            if isinstance(each, nn.Parameter) and each in self._owners
        }

    def owner(self, node: fx.Node) -> tuple[str, str] | None:
        """The path of the module that holds the parameter a node stands for, and its name there; None for others."""
        return self._owners[self._of[node]][0] if node in self._of else None

    def only_read_by(self, reader: fx.Node, chain: Sequence[fx.Node], what: str) -> tuple[nn.Parameter, str, str]:
        """The parameter at a chain's end and its owner, if it may be changed for its one reader; raises Refused."""
        parameter = self._of.get(chain[-1])
        if parameter is None:
            raise Refused(f"{what} is no parameter of the model, but computed (parametrized, say) or a buffer")
        if why := unfit(parameter):
            raise Refused(f"{what} {why}")
        owners = [owner for each in (parameter, *self._overlapping(parameter)) for owner in self._owners[each]]
        path, name = owners[0]
        if isinstance(self.modules[path], parametrize.ParametrizationList):
            raise Refused(f"{what} is parametrized")
        if len(owners) > 1:
            names = [".".join(filter(None, owner)) for owner in owners]
            raise Refused(f"{what} is tied: {', '.join(map(repr, names))} share their memory")
        for each in chain:
            for user in each.users:
                if user not in chain and user is not reader:
                    raise Refused(f"{what} is also read by {text(user)}")
        return parameter, path, name

    def _overlapping(self, parameter: Tensor) -> list[Tensor]:
        device, start, end = self._memory.get(parameter, (None, 0, 0))
        return [
            other
            for other, (place, first, last) in self._memory.items()
            if other is not parameter and place == device and first < end and start < last
        ]


def _memory(each: Tensor) -> tuple[torch.device, int, int] | None:
    """The device and the first and last address of a plain tensor."""
    if type(each) not in (Tensor, nn.Parameter) or each.is_meta or each.layout != torch.strided or not each.numel():
        return None
    span = 1 + sum((size - 1) * stride for size, stride in zip(each.shape, each.stride()))
    return each.device, each.data_ptr(), each.data_ptr() + span * each.element_size()


def called(node: fx.Node) -> str:
    """The name of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


def text(node: fx.Node) -> str:
    """A node as errors name it: what it calls, in which module, on which line."""
    where = f" in {module_of(node)!r}" if module_of(node) else ""
    return f"{called(node)}{where}" + (f" ({source_of(node)})" if source_of(node) else "")


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
