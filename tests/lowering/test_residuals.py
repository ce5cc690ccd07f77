"""write_residuals: a residual stream is written once, layers have the same kernels, outputs are no views."""

import re

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from training import EXACT, distance, step

from graphopt.lowering.residuals import WRITE, write_residuals


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(64), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x):
        return x + self.down(torch.nn.functional.silu(self.up(self.norm(x))))


class Decoder(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.embedding, self.layers = nn.Embedding(50, 64), nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return x.mul(2), x


@pytest.fixture
def forwards(monkeypatch):
    """The forward graphs that are compiled."""
    found = []

    def recording(gm, example_inputs=()):
        found.append(write_residuals(gm))
        return found[-1]

    monkeypatch.setattr("graphopt.passes.FORWARD_HALF", (recording,))
    return found


def test_each_sum_that_is_added_to_again_is_written_and_nothing_else(forwards):
    ids = torch.arange(40).view(4, 10)
    compiled = torch.compile(Decoder(3), backend="lowmem_eager", options=EXACT)
    y, x = compiled(ids)
    written = [node.args[0].target for node in forwards[0].graph.find_nodes(op="call_function", target=WRITE)]
    # the last sum is added to by nobody, nor are the norms', whose sums are with numbers
    assert written == [torch.ops.aten.embedding.default, *[torch.ops.aten.add.Tensor] * 2]
    assert not y._is_view() and not x._is_view()
    x.mul_(2)


def test_values_and_gradients_are_those_of_eager(forwards):
    model, x = nn.Sequential(*(Layer() for _ in range(3))), torch.randn(8, 64, requires_grad=True)
    (expected, gradients, _), (found, others, _) = step(model, (x,), None), step(model, (x,), dynamic=True)
    assert forwards[0].graph.find_nodes(op="call_function", target=WRITE)
    torch.testing.assert_close(found, expected)
    assert distance(others, gradients) < 32 * torch.finfo(torch.float32).eps  # a few roundings a layer


def test_sizes_that_are_symbols_are_not_compared(forwards):
    """A guard on them would compile anew where batch and length happen to be the same, or fail on data."""
    position, linear = torch.randn(16, 64, requires_grad=True), nn.Linear(64, 64)

    def added(x):
        x = position[: x.shape[1]] + x
        return x + x.sin()

    def picked(x):
        x = linear(x[x[:, 0] > 0]).sin()
        x = position[0] + x
        return x + x.sin()

    compiled = torch.compile(added, backend="lowmem_eager", dynamic=True, options=EXACT)
    for batch in (8, 3, 4):
        compiled(torch.randn(batch, 4, 64))
    assert len(forwards) == 1
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        x = torch.randn(32, 64)
        found = torch.compile(picked, backend="lowmem_eager", options=EXACT)(x)
    torch.testing.assert_close(found, picked(x))


@pytest.mark.slow
def test_more_layers_take_no_more_kernels():
    def kernels(layers):
        ids = torch.arange(40).view(4, 10)
        compiled = torch.compile(Decoder(layers), backend="lowmem", options=EXACT)
        _, codes = run_and_get_code(lambda: sum(each.sum() for each in compiled(ids)).backward())
        return sum(len(re.findall(r"async_compile\.cpp_pybinding", code)) for code in codes)

    assert kernels(4) == kernels(7)
