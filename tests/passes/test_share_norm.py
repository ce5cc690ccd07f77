"""share_norm: gradients as before, the norm's backward and the weight gradients read z."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from training import EXACT, distance, step

import graphopt
from graphopt.options import Options
from graphopt.passes import JOINT, decompose, share_norm

# float32: about ten roundings of 2^-24 lie between a norm's input and a weight gradient; sums over 32 tokens add theirs
FLOAT32 = 1e-6
# half precision: rounding z adds one to the four or more roundings on the way to a weight gradient in the stock graph,
# so the error grows by at most sqrt(5/4); the rest of the margin is for the few hundred elements compared here
HALF = 1.25

WIDTH, OUT, SHAPE = 24, 40, (4, 8)


class RMS(nn.Module):
    """Llama's norm."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * h.to(x.dtype)


class Conv1D(nn.Module):
    """GPT-2's linear: the weight is stored as (in, out)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) / 5), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class LoRA(nn.Module):
    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Linear(linear.in_features, 3, bias=False)
        self.up = nn.Linear(3, linear.out_features, bias=False)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


class Block(nn.Module):
    """A linear, so that the norm's input is no input of the graph; the norm; what reads it."""

    def __init__(self, norm: nn.Module, *readers: nn.Module, residual: bool = False):
        super().__init__()
        self.first, self.norm, self.readers = nn.Linear(WIDTH, WIDTH), norm, nn.ModuleList(readers)
        self.residual = residual
        for parameter in norm.parameters():
            nn.init.normal_(parameter, 0.7, 0.5)

    def forward(self, x):
        y = self.norm(self.first(x))
        out = torch.cat([reader(y).tanh() for reader in self.readers], -1)
        return out + y.repeat(1, 1, out.shape[-1] // WIDTH) if self.residual else out


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def linear(bias: bool = True, out: int = OUT) -> nn.Linear:
    return nn.Linear(WIDTH, out, bias=bias)


NORMS = {
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "layer norm, frozen": lambda: frozen(nn.LayerNorm(WIDTH)),
    "layer norm, no affine": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
    "layer norm, no bias": lambda: nn.LayerNorm(WIDTH, bias=False),
    "layer norm, two dims": lambda: nn.LayerNorm((SHAPE[1], WIDTH)),
    "rms norm": lambda: nn.RMSNorm(WIDTH),
    "rms norm, frozen": lambda: frozen(nn.RMSNorm(WIDTH)),
    "rms norm, no affine": lambda: nn.RMSNorm(WIDTH, elementwise_affine=False),
    "llama norm": lambda: RMS(WIDTH),
}
READERS = {
    "linear": lambda: [linear()],
    "no bias": lambda: [linear(bias=False)],
    "q, k, v": lambda: [linear(), linear(), linear()],
    "narrow": lambda: [linear(out=3)],
    "lora": lambda: [LoRA(linear()), LoRA(linear(bias=False))],
    "one frozen": lambda: [linear(), frozen(linear())],
    "all frozen": lambda: [frozen(linear())],
    "frozen weight, trainable bias": lambda: [_frozen_weight()],
    "conv1d": lambda: [Conv1D(WIDTH, OUT)],
    "narrow conv1d": lambda: [Conv1D(WIDTH, 3)],
    "gelu": lambda: [nn.Sequential(nn.GELU(), linear())],
    "gelu beside a linear": lambda: [nn.GELU(), linear()],
    "dropout": lambda: [nn.Sequential(nn.Dropout(0.0), linear())],
}


def _frozen_weight() -> nn.Linear:
    module = linear()
    module.weight.requires_grad_(False)
    return module


def fired(block: nn.Module, x: torch.Tensor) -> int:
    _, records, _ = graphopt.capture(block, x).lowmem(Options("exact"))
    return len(next(record for record in records if record.name == "share_norm").fired)


@pytest.mark.parametrize("readers", READERS)
@pytest.mark.parametrize("norm", NORMS)
def test_float32_gradients_equal_eager(norm, readers):
    block, x = Block(NORMS[norm](), *READERS[readers]()), torch.randn(*SHAPE, WIDTH, requires_grad=True)
    y, gradients, _ = step(block, (x,))
    y0, expected, _ = step(block, (x,), backend=None)
    torch.testing.assert_close(y, y0, rtol=0, atol=FLOAT32 * y0.abs().max().item())
    assert distance(gradients, expected) < FLOAT32
    assert fired(block, x) == (readers != "all frozen" and readers != "frozen weight, trainable bias")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("readers", ["q, k, v", "lora", "narrow", "narrow conv1d", "gelu beside a linear"])
@pytest.mark.parametrize("norm", ["layer norm", "rms norm", "llama norm"])
def test_half_precision_error_is_that_of_stock(norm, readers, dtype):
    block, x = Block(NORMS[norm](), *READERS[readers]()).to(dtype), torch.randn(16, 32, WIDTH).to(dtype)
    _, expected, _ = step(block.float(), (x.float(),), backend=None)
    _, stock, kept = step(block.to(dtype), (x,), backend="aot_eager_decomp_partition")
    _, gradients, saved = step(block, (x,))
    assert distance(gradients, expected) < HALF * distance(stock, expected)
    assert saved <= kept


@pytest.mark.parametrize("norm", ["layer norm", "rms norm"])
def test_under_autocast_z_is_kept_in_the_linears_precision(norm):
    class Autocast(Block):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x.float().cumsum(0))  # float32, and not made anew from the input

    block, x = Autocast(NORMS[norm](), linear(), linear()), torch.randn(*SHAPE, WIDTH)
    block.first = nn.Identity()
    capture = graphopt.capture(block, x.requires_grad_())
    z = [saved for saved in capture.lowmem(Options("exact"))[0] if saved.module == "norm" and saved.shape[-1] == WIDTH]
    assert [saved.dtype for saved in z] == [torch.bfloat16]


@pytest.mark.parametrize("residual", [False, True])
def test_another_reader_of_the_output_keeps_its_gradient(residual):
    block = Block(nn.LayerNorm(WIDTH), linear(out=WIDTH), residual=residual)
    x = torch.randn(*SHAPE, WIDTH, requires_grad=True)
    _, gradients, _ = step(block, (x,))
    _, expected, _ = step(block, (x,), backend=None)
    assert distance(gradients, expected) < FLOAT32


def test_norm_of_a_norm():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH), linear()

        def forward(self, x):
            y = self.a(x * 2)
            return self.c(self.b(y)).sin() * y.exp().mean()

    model, x = Twice(), torch.randn(*SHAPE, WIDTH, requires_grad=True)
    for parameter in model.a.parameters():
        nn.init.normal_(parameter, 0.7, 0.5)
    _, gradients, _ = step(model, (x,))
    _, expected, _ = step(model, (x,), backend=None)
    assert distance(gradients, expected) < FLOAT32


class After(nn.Module):
    """A norm and a function of its output."""

    def __init__(self, function, norm: nn.Module):
        super().__init__()
        self.norm, self.function, self.last = norm, function, linear(out=WIDTH)
        for parameter in norm.parameters():
            nn.init.normal_(parameter, 0.7, 0.5)

    def forward(self, x):
        y = self.norm(x * 2)
        return self.function(y) * self.last(y).mean()


@pytest.mark.parametrize(
    "function",
    [lambda y: y.amax(-1, True), lambda y: y.relu(), lambda y: y.clamp(-0.5, 0.5),
     lambda y: torch.maximum(y, y.roll(1, 0)), lambda y: F.normalize(y, dim=-1),
     lambda y: y.amax(-1, True) - y.amin(-1, True)],
    ids=["amax", "relu", "clamp", "maximum", "normalize", "amax - amin"],
)  # fmt: skip
def test_what_compares_the_output_compares_what_forward_saw(function):
    model, x = After(function, nn.LayerNorm(WIDTH)).bfloat16(), torch.randn(64, 32, WIDTH).bfloat16().requires_grad_()
    _, exact, _ = step(model.double(), (x.double(),), backend=None)
    _, stock, _ = step(model.bfloat16(), (x,), backend="aot_eager_decomp_partition")
    _, gradients, _ = step(model, (x,))
    assert distance(gradients, exact) < HALF * distance(stock, exact)


@pytest.mark.parametrize("norm", ["layer norm", "rms norm"])
def test_a_permuted_input_gives_a_contiguous_output(norm):
    module, x = NORMS[norm](), torch.randn(2, WIDTH, 6, 5, requires_grad=True)
    y = torch.compile(lambda x: module(x.permute(0, 2, 3, 1)), backend="lowmem_eager", options=EXACT)(x)
    assert y.is_contiguous()
    y.view(2, -1).square().sum().backward()
    found, x.grad = x.grad, None
    module(x.permute(0, 2, 3, 1)).square().sum().backward()
    torch.testing.assert_close(found, x.grad, rtol=1e-5, atol=1e-5)  # float32, two sums over the width


def test_float16_gradients_stay_finite_where_those_of_stock_do():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(64), nn.Linear(64, 64)
            nn.init.constant_(self.norm.weight, 1 / 32)

        def forward(self, x):
            return self.linear(self.norm(x * 2))

    model, x = Small().half(), torch.randn(4096, 64).half()
    x[:, 0] = 30  # one column of z is the same everywhere, so that its products add up
    compiled = torch.compile(model, backend="lowmem_eager", options=EXACT)
    (compiled(x).float() * 40).sum().backward()
    assert model.linear.weight.grad.isfinite().all()


@pytest.mark.parametrize("norm", ["layer norm", "rms norm", "llama norm"])
def test_under_torch_func(norm):
    module, x = NORMS[norm](), torch.randn(5, 4, WIDTH)

    def gradient(x):
        return torch.func.vmap(torch.func.grad(lambda x: module(x).sin().sum()))(x)

    compiled = torch.compile(gradient, backend="lowmem_eager", options=EXACT)
    torch.testing.assert_close(compiled(x), gradient(x), rtol=1e-5, atol=1e-5)


def test_z_is_what_is_saved():
    block = Block(nn.LayerNorm(WIDTH), linear(), linear()).bfloat16()
    saved, _, _ = graphopt.capture(block, torch.randn(*SHAPE, WIDTH).bfloat16()).lowmem(Options("exact"))
    assert [(each.module, each.dtype) for each in saved if each.shape[-1] == WIDTH] == [("norm", torch.bfloat16)]


def test_narrow_linears_read_z_itself_and_wide_ones_a_new_output():
    for out, text in ((3, "gradient of 1 weight"), (80, "made anew")):
        block = Block(nn.LayerNorm(WIDTH), linear(out=out))
        _, records = graphopt.capture(block, torch.randn(*SHAPE, WIDTH)).rewritten(share_norm)
        assert text in records[0].fired[0].text


def test_what_it_leaves_alone_it_says():
    block = Block(nn.LayerNorm(WIDTH), frozen(linear()))
    record = graphopt.capture(block, torch.randn(*SHAPE, WIDTH)).rewritten(share_norm)[1][0]
    assert not record.fired and "does not read" in record.left_alone[0].text


def test_the_rewritten_joint_graph_computes_the_same():
    block = Block(nn.LayerNorm(WIDTH), linear(), linear(out=3))
    capture = graphopt.capture(block, torch.randn(*SHAPE, WIDTH))
    inputs = [torch.randn(node.meta["val"].shape) for node in capture.joint.graph.nodes if node.op == "placeholder"]
    expected = capture.rewritten(decompose)[0](*inputs)
    for found, each in zip(capture.rewritten(*JOINT)[0](*inputs), expected):
        assert (found is None) == (each is None)
        if found is not None:
            torch.testing.assert_close(found, each, rtol=1e-5, atol=1e-5)
