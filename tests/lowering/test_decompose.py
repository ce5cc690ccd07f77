"""What is spelt out once serves all that is alike, and nothing else."""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from training import distance, step

# two orders of the same roundings: neither is nearer to the exact gradient than the other by more than a factor
ORDER = 3


class Norms(nn.Module):
    """Layer norms that differ in which of weight and bias they have."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(torch.rand(16) + each) for each in range(3))

    def forward(self, x):
        a, b, c = list(self.parts)
        for weight, bias in ((a, None), (None, a), (b, None), (None, c), (b, c), (None, None)):
            x = F.gelu(F.layer_norm(x.sin(), (16,), weight, bias))
        return x


def test_operators_that_differ_in_what_they_leave_out_are_told_apart():
    model, x = Norms(), torch.randn(32, 16)
    _, expected, _ = step(copy.deepcopy(model).double(), (x.double(),), backend=None)
    _, eager, _ = step(model, (x,), backend=None)
    _, found, _ = step(model, (x,))
    assert distance(found, expected) < ORDER * distance(eager, expected)


class OneTensorTwice(nn.Module):
    """A layer norm whose weight is its bias, and one whose weight is not."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.rand(16) + each) for each in range(3))

    def forward(self, x):
        return F.layer_norm(F.layer_norm(x, (16,), self.a, self.a).cos(), (16,), self.b, self.c)


def test_an_operator_that_reads_a_tensor_twice_is_not_taken_for_one_that_reads_two():
    model, x = OneTensorTwice(), torch.randn(32, 16)
    expected, _, _ = step(model, (x,), backend=None)
    found, _, _ = step(model, (x,))
    torch.testing.assert_close(found, expected)
