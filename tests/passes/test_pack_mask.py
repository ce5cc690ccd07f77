"""pack_mask: the masks that cross take one bit an element and come back as they were."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from training import distance, step

import graphopt
from graphopt.lowering import formulas
from graphopt.options import Options
from graphopt.passes import lower, pack_mask


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=0, max_size=4), st.sampled_from([1, 2]), st.integers(0, 2**31))
def test_unpack_inverts_pack(shape, bits, seed):
    values = torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    words = formulas.pack(values, bits)
    assert words.nbytes == -(-values.numel() // 16) * 2 * bits
    assert torch.equal(formulas.unpack(words, list(shape), bits, torch.int32), values)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded", "channels last"])
def test_any_layout_packs(layout):
    mask = torch.rand(2, 6, 5, 7) > 0.5
    mask = {
        "contiguous": mask,
        "transposed": mask.transpose(1, 3),
        "expanded": mask[:, :1].expand(2, 6, 5, 7),
        "channels last": mask.to(memory_format=torch.channels_last),
    }[layout]
    assert torch.equal(formulas.unpack(formulas.pack(mask, 1), list(mask.shape), 1, torch.bool), mask)


class Dropout(nn.Module):
    """Nothing but a mask is saved: the linear is frozen."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(40, 40).requires_grad_(False)

    def forward(self, x):
        return F.dropout(self.linear(x), 0.5)


def test_a_dropout_mask_takes_one_bit_an_element():
    x = torch.randn(32, 40, requires_grad=True)
    _, _, saved = step(Dropout(), (x,))
    assert saved == 32 * 40 // 8


@pytest.mark.parametrize("shape", [(3, 7, 40), (1, 40), (129, 40)])
def test_sizes_that_are_no_multiple_of_a_word(shape):
    y, gradients, saved = step(Dropout().eval(), (torch.randn(*shape, requires_grad=True),))
    model, x = Dropout(), torch.randn(*shape, requires_grad=True)
    y, gradients, saved = step(model, (x,))
    words = -(-x.numel() // 16) * 2
    assert saved in (words, x.numel())  # as it is where it is small
    with torch.no_grad():
        kept = y != 0
        expected = (2 * y / y.numel() * 2 * kept) @ model.linear.weight
    # float32: one product over 40 elements, each rounded by 2^-24, in another order
    torch.testing.assert_close(gradients["input 0"], expected, rtol=1e-5, atol=1e-7)


def test_a_mask_comes_back_with_its_strides():
    class Einsum(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.Parameter(torch.randn(3, 32, 4))

        def forward(self, x):
            return torch.einsum("btd,hdk->bhtk", x, self.heads).relu()

    inputs = [torch.randn(4, 8, 32, requires_grad=True)]
    _, gradients, _ = step(Einsum(), inputs)
    model = Einsum()
    _, gradients, _ = step(model, inputs)
    _, expected, _ = step(model, inputs, backend=None)
    assert distance(gradients, expected) < 1e-6  # float32, one matrix product


def test_a_relu_whose_output_is_saved_anyway_saves_no_mask():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    saved, records, _ = graphopt.capture(model, torch.randn(64, 16)).lowmem(Options("exact"))
    assert not any(each.dtype in (torch.bool, torch.int16) for each in saved)
    assert not records[-1].fired


def test_a_relu_before_a_frozen_linear_saves_bits_only():
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16).requires_grad_(False))
    x = torch.randn(64, 16)
    _, gradients, saved = step(model, (x,))
    _, expected, _ = step(model, (x,), backend=None)
    assert saved == 64 * 64 // 8
    assert distance(gradients, expected) < 1e-6  # float32 rounding of one matrix product


def test_a_mask_that_backward_reads_through_what_it_makes_anew():
    """Attention written out: backward makes masked_fill anew, so it reads the mask twice."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(32, 96)

        def forward(self, x, mask):
            q, k, v = self.qkv(x).chunk(3, -1)
            scores = (q @ k.transpose(-1, -2)).masked_fill(mask == 0, -1e4)
            return scores.softmax(-1) @ v

    model, inputs = Attention(), (torch.randn(2, 64, 32), torch.randint(0, 2, (2, 64, 64)).float())
    saved, records, _ = graphopt.capture(model, *inputs).lowmem(Options("exact"))
    assert records[-1].fired and not any(each.dtype == torch.bool for each in saved)
    _, gradients, kept = step(model, inputs)
    _, expected, _ = step(model, inputs, backend=None)
    assert kept == sum(each.bytes for each in saved)
    # float32: some ten roundings of 2^-24 in a row, over sums of 64
    assert distance(gradients, expected) < 2e-6


@pytest.mark.parametrize("masks", [1, 2])
def test_what_fired_crosses_as_words_and_nothing_else(masks):
    class Conditions(nn.Module):
        def forward(self, x, *conditions):
            for condition in conditions:
                x = torch.where(condition > 0, x.sin(), x.tanh())
            return x

    inputs = [torch.randn(64, 64, requires_grad=True), *(torch.randn(64, 64) for _ in range(masks))]
    saved, records, _ = graphopt.capture(Conditions(), *inputs).lowmem(Options("exact"))
    assert bool(records[-1].fired) == any(each.operator == "graphopt.pack" for each in saved)
    assert not (records[-1].fired and any(each.dtype == torch.bool for each in saved))
    _, gradients, _ = step(Conditions(), inputs)
    _, expected, _ = step(Conditions(), inputs, backend=None)
    assert distance(gradients, expected) < 1e-6  # float32, pointwise


def test_it_stands_alone_on_a_graph_with_symbolic_sizes():
    capture = None

    def backend(gm, example_inputs):
        nonlocal capture
        capture = graphopt.tracer._joint_graph(gm, example_inputs, graphopt.lowering.decompose.tracing_table())
        return gm

    torch.compile(Dropout(), backend=backend, dynamic=True)(torch.randn(32, 40, requires_grad=True))
    joint = pack_mask(capture[0])
    assert any(node.target is torch.ops.graphopt.pack.default for node in joint.graph.nodes)


def test_a_pair_that_falls_into_one_graph_cancels():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    joint, records = graphopt.capture(model, torch.randn(64, 16)).rewritten(pack_mask)
    assert records[0].fired
    names = {str(node.target) for node in lower(joint).graph.nodes}
    assert not any("graphopt" in name for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["exact", "compressed"])
@pytest.mark.parametrize("own", [False, True], ids=["of amax", "the user's"])
def test_a_mask_of_equal_values_is_that_of_forward(own, preset):
    """Packed, it was made of values computed anew in another order: none was equal to the maximum, gradients NaN."""
    x = torch.randn(101, 48)

    def function(h):
        a = F.gelu(torch.sin(h * 1.3) + h * torch.sigmoid(h) / 3)
        turned = a.t().contiguous()
        if own:
            return torch.where(turned.t() != a.amax(-1, keepdim=True), a, a * 3) * x
        return a * x + turned.amax(0)[:, None] * x

    start, found = torch.randn(101, 48), {}
    for backend, options in (("eager", None), ("lowmem", {"preset": preset})):
        h = start.clone().requires_grad_()
        torch.compile(function, backend=backend, options=options)(h).square().mean().backward()
        found[backend] = h.grad
    torch.testing.assert_close(found["lowmem"], found["eager"])
