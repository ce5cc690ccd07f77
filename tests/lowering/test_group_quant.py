"""Codes of groups inside a graph: they can be spliced, and Inductor's codes are those of eager mode, bit by bit."""

import pytest
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from graphopt.codecs import CODECS, codec
from graphopt.lowering import group_quant
from graphopt.lowering.decompose import inductor_table

VARIANTS = [
    *CODECS.values(), codec("int4", symmetric=False), codec("int2", 32, "stochastic", False), codec("int8", 128)
]  # fmt: skip
SEED = torch.tensor(-0x123456789ABCDEF)
every_codec = pytest.mark.parametrize("each", VARIANTS, ids=lambda each: each.name)


@pytest.fixture(autouse=True)
def one_seed(monkeypatch):
    """The seed an argument of every graph, so that the two can be compared."""
    monkeypatch.setattr("graphopt.lowering.random.seed", lambda device: SEED.to(device))


def functions(each):
    """encode(x, seed) and decode(parts, like), with the seed among the arguments."""

    def encode(x, seed):
        if not each.draws:
            return each.encode(x)
        return *group_quant.encode(x, each.bits, each.group, each.symmetric, seed), seed

    def decode(like, *parts):
        return (each.decode(parts, like.shape, like.dtype),)

    return encode, decode


def traced(function, *example, dynamic=False):
    mode = FakeTensorMode(shape_env=ShapeEnv() if dynamic else None)
    given = [mode.from_tensor(each, static_shapes=not dynamic) for each in example]
    with mode, enable_python_dispatcher():
        return make_fx(function, decomposition_table=dict(inductor_table()))(*given)


def compiled(function, *example):
    with torch.no_grad():
        return compile_fx_inner(traced(function, *example), list(example))(list(example))


@every_codec
@pytest.mark.parametrize("shape", [(24, 128), (3, 5, 7), (64,)], ids=str)
def test_graphs_have_no_constants(each, shape):
    x = torch.randn(shape).bfloat16()
    encode, decode = functions(each)
    forward = traced(encode, x, SEED)
    backward = traced(decode, x, *encode(x, SEED))
    for gm in (forward, backward):
        assert not list(gm.graph.find_nodes(op="get_attr"))
    parts = forward(x, SEED)
    assert all(torch.equal(a, b) for a, b in zip(parts, encode(x, SEED)))
    assert torch.equal(backward(x, *parts)[0], decode(x, *parts)[0])


@every_codec
@pytest.mark.parametrize("width", [128, 37])
def test_one_graph_serves_every_size(each, width):
    encode, decode = functions(each)
    x = torch.randn(24, width).bfloat16()
    forward = traced(encode, x, SEED, dynamic=True)
    backward = traced(decode, x, *encode(x, SEED), dynamic=True)
    for rows in (24, 31, 200):
        x = torch.randn(rows, width).bfloat16()
        parts = forward(x, SEED)
        assert all(torch.equal(a, b) for a, b in zip(parts, encode(x, SEED)))
        assert torch.equal(backward(x, *parts)[0], decode(x, *parts)[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "each",
    [CODECS["int8"], CODECS["int4-unbiased"], CODECS["int8-hashed"], codec("int2", symmetric=False)],
    ids=lambda each: each.name,
)
def test_inductor_makes_the_same_codes_and_values(each):
    """A power of two too: codes of a tensor that is made in the same kernel, which Inductor has not rounded yet."""
    encode, decode = functions(each)
    x = torch.randn(48, 256).bfloat16()
    parts = compiled(lambda x, seed: encode(x * 2, seed), x, SEED)
    assert all(torch.equal(a, b) for a, b in zip(parts, encode(x * 2, SEED)))
    assert torch.equal(compiled(decode, x, *parts)[0], decode(x, *parts)[0])


@pytest.mark.slow
def test_encode_uses_the_scale_that_is_saved():
    """A producer in float32 makes values of 24 bits, whose scale a fused cast to bfloat16 and back would not round.

    Half a step of int8 is 2^-8 of the scale; a scale that is off by 2^-9 puts the largest values another quarter off.
    """
    each = CODECS["int8"]
    x = torch.randn(48, 256)
    codes, scale = compiled(lambda x: each.encode(x * 1.2345678), x)
    exact = (x * 1.2345678).view(-1, 64)
    assert (scale.float() >= exact.abs().amax(1, keepdim=True)).all()
    x_ = each.decode((codes, scale), exact.shape, torch.float32)
    assert ((x_ - exact).abs() <= scale.float() / 127 / 2 * (1 + 2**-10)).all()


@pytest.mark.slow
def test_codes_are_vectorised_on_a_cpu():
    """Scalar loops are ten times slower; in C++ they show as conversions of single numbers to a byte."""
    for each in (CODECS["int8"], CODECS["int4-unbiased"], CODECS["int8-hashed"], CODECS["int2"]):
        encode, decode = functions(each)
        x = torch.randn(48, 256).bfloat16()
        parts, [code] = run_and_get_code(compiled, encode, x, SEED)
        assert "convert<uint8_t,1,float,2>" in code or "convert<uint8_t>" in code
        assert "static_cast<uint8_t>" not in code and "c10::convert<uint8_t>" not in code
        _, [code] = run_and_get_code(compiled, decode, x, *parts)
        assert "convert<at::BFloat16" in code and "static_cast<at::BFloat16>" not in code


@pytest.mark.parametrize("group", [16, 64, 1024])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_both_ways_to_decode_agree(monkeypatch, bits, group):
    each = codec(f"int{bits}", group, "stochastic")
    x = torch.randn(3, 1024)
    parts = each.encode(x)
    sliced = each.decode(parts, x.shape, x.dtype)
    monkeypatch.setattr(group_quant, "sliced", lambda device: False)
    assert torch.equal(each.decode(parts, x.shape, x.dtype), sliced)


def test_noise_is_uniform_in_every_group_and_independent_between_groups():
    """Decoded zeros show u. 2^14 groups: moments are known to 1 / 128, correlations too; 5 of that are 0.04."""
    each = codec("int8", 64, "stochastic")
    codes = torch.zeros(1 << 14, 64, dtype=torch.uint8)
    x_ = each.decode((codes, torch.ones(1 << 14, 1).bfloat16(), SEED), codes.shape, torch.float32)
    u = ((x_ - x_.mean()) / (2 / 255)).double()
    assert (u.mean(0).abs() < 0.04).all() and ((u.square().mean(0) * 12 - 1).abs() < 0.04).all()
    for shift in (1, 2, 3, 4, 8, 16, 32, 64, 256):
        assert ((u[shift:] * u[:-shift]).mean(0).abs() * 12 < 0.04).all()
    other = each.decode((codes, torch.ones(1 << 14, 1).bfloat16(), SEED + 1), codes.shape, torch.float32)
    other = ((other - other.mean()) / (2 / 255)).double()
    assert ((u * other).mean(0).abs() * 12 < 0.04).all()
