"""One training step of the user's own model, tried out: its loss, and the model as it was afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported

from graphopt.compat import ISOLATED
from graphopt.errors import CaptureError


def untouched(model: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """torch.compile that leaves nothing on the model; once Lightning is imported it would keep its arguments there.

    What the model has of its own `compile()` stays, but is not what is called.
    """
    if not isinstance(model, nn.Module):
        return torch.compile(model, **settings)
    own = vars(model)
    before = dict(own)
    function = torch.compile(model, **settings)
    own.clear()
    own.update(before)

    def call(*inputs: Any, **kwargs: Any) -> Any:
        in_place = own.pop("_compiled_call_impl", None)
        try:
            return function(*inputs, **kwargs)
        finally:
            if in_place is not None:
                own["_compiled_call_impl"] = in_place

    return call


def compiled(model: Callable[..., Any], backend: str | Callable[..., Any], options: Any = None) -> Callable[..., Any]:
    """torch.compile into one graph of static shapes; the call raises CaptureError where the model forms several."""
    function = untouched(model, backend=backend, options=options, fullgraph=True, dynamic=False, **ISOLATED)

    def call(*inputs: Any, **kwargs: Any) -> Any:
        try:
            with dynamo_config.patch(suppress_errors=False):
                return function(*inputs, **kwargs)
        except Unsupported as error:
            raise CaptureError(f"the model does not form one graph: {error}") from None

    return call


def loss_of(output: Any) -> Tensor:
    """The loss in what a model returns: `output.loss`, `output["loss"]`, or the one number it returns.

    Of other tensors it is the mean of squares, added up over those that need a gradient. Raises CaptureError if none
    does.
    """
    given = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    tensors = [each for each in pytree.tree_leaves(output if given is None else given) if _needs_gradient(each)]
    if not tensors:
        raise CaptureError("nothing that the model returns needs a gradient: there is no backward to save tensors for")
    if len(tensors) == 1 and tensors[0].numel() == 1:
        return tensors[0].reshape(())  # type: ignore[no-any-return]
    return torch.stack([each.float().square().mean() for each in tensors]).sum()


def _needs_gradient(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and value.is_floating_point()


@contextlib.contextmanager
def as_before(model: Callable[..., Any]) -> Iterator[None]:
    """Afterwards parameters, buffers and modes of the model and torch's random state are as they were.

    A copy of the model's values is kept in the host's memory meanwhile.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    values = [(each, each.detach().to("cpu", copy=True)) for each in tensors]
    buffers = [dict(module._buffers) for module in modules]
    modes = [module.training for module in modules]
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        for module, buffer, mode in zip(modules, buffers, modes):
            module._buffers.clear()
            module._buffers.update(buffer)
            module.training = mode
        with torch.no_grad():
            for each, value in values:
                if not torch.equal(each.cpu(), value):
                    each.copy_(value)
