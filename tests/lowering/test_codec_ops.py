"""graphopt::encode and decode: their formulas, whatever runs them."""

import gc
from dataclasses import replace

import pytest
import torch
import torch._inductor.config as inductor_config
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import run_and_get_code

from graphopt.codecs import CODECS, Codec, codec, is_named, named
from graphopt.errors import OptionsError
from graphopt.lowering import codec_ops  # noqa: F401  (registers the operators)

own = torch.ops.graphopt
SEED = torch.tensor(0x123456789ABCDEF)
NAMES = [*CODECS, *(codec(name, 32, "stochastic", False).name for name in ("int8", "int4"))]


def through(x, name, seed):
    each = named(name)
    parts = own.encode(x, range(x.dim()), name, seed if each.draws else None)
    return *parts, own.decode([*parts, seed] if each.draws else parts, x.shape, name, x.dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(24, 128), (3, 5, 7), (0,), ()], ids=str)
def test_the_operators_are_the_formulas(name, shape):
    x, each = torch.randn(shape).bfloat16(), named(name)
    seed = SEED if each.draws else None
    *parts, x_ = through(x, name, SEED)
    expected = each.parts(x, seed)
    assert all(torch.equal(one, other) for one, other in zip(parts, expected, strict=True))
    assert torch.equal(x_, each.decode([*parts, SEED] if each.draws else parts, x.shape, x.dtype))
    given = [*parts, *([SEED] if each.draws else [])]
    torch.library.opcheck(own.encode.default, (x, range(x.dim()), name, seed), test_utils="test_faketensor")
    torch.library.opcheck(own.decode.default, (given, shape, name, x.dtype), test_utils="test_faketensor")


def test_a_seed_is_for_what_draws():
    x = torch.randn(64)
    with pytest.raises(OptionsError, match="takes no seed"):
        own.encode(x, [0], "int8", SEED)
    with pytest.raises(OptionsError, match="takes a seed"):
        own.encode(x, [0], "int8-unbiased", None)


def test_a_codec_of_ones_own_is_not_taken_for_the_one_of_its_name():
    assert all(is_named(named(name)) for name in NAMES)
    assert not is_named(Codec("mine", 8, 0.005, group=32))
    assert not is_named(replace(CODECS["int8"], group=32))


@pytest.mark.parametrize("settings", [{"disable_cpp_codegen": True}, {}], ids=str)
def test_inductor_calls_what_it_cannot_generate(settings):
    """Where the code generator is off, or sizes are symbolic."""
    x, dynamic = torch.randn(24, 128), not settings
    with inductor_config.patch(settings):
        compiled = torch.compile(lambda x: through(x * 2, "int8", None), dynamic=dynamic, fullgraph=True)
        found, codes = run_and_get_code(compiled, x)
    assert ("torch.ops.graphopt.encode.default(" in codes[0]) == dynamic
    assert ("cpp_fused" in codes[0]) == dynamic
    assert all(torch.equal(one, other) for one, other in zip(found, through(x * 2, "int8", None), strict=True))


def test_parts_may_be_one_tensor():
    codes, low = torch.randint(255, (4, 64), dtype=torch.uint8), torch.rand(4, 1).bfloat16()
    arguments = ([codes, low, low], [4, 64], "int8-asymmetric", torch.float32)
    found = torch.compile(lambda codes, low: own.decode([codes, low, low], *arguments[1:]))(codes, low)
    torch.testing.assert_close(found, own.decode(*arguments))


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "dtype"), [((24, 128), torch.float32), ((3, 5, 37), torch.bfloat16)], ids=str)
def test_inductor_makes_the_same_codes_and_values(shape, dtype):
    def encode(x, seed):
        y, order = (x * 2).transpose(0, 1), range(x.dim())
        return [own.encode(y, order, name, seed if named(name).draws else None) for name in NAMES]

    def decode(parts, seed):
        given = [[*each, seed] if named(name).draws else each for name, each in zip(NAMES, parts)]
        return [own.decode(each, shape, name, dtype) for name, each in zip(NAMES, given)]

    x = torch.randn(shape).to(dtype)
    x[0, 0], x[-1, -1] = torch.nan, torch.inf
    parts, codes = run_and_get_code(torch.compile(encode, fullgraph=True), x, SEED)
    values, more = run_and_get_code(torch.compile(decode, fullgraph=True), parts, SEED)
    assert "torch.ops.graphopt" not in "".join(codes + more)  # spelt out, not called
    torch.testing.assert_close(parts, encode(x, SEED), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(values, decode(parts, SEED), rtol=0, atol=0, equal_nan=True)


def test_inductor_encodes_in_the_order_in_memory():
    def encode(x, seed):
        y = (x * 2).transpose(0, 1)
        return own.encode(y, (1, 0, 2), "int8", None), own.encode(y, (1, 0, 2), "int4-unbiased", seed)

    x = torch.randn(3, 5, 32)
    parts = torch.compile(encode, fullgraph=True)(x, SEED)
    # no tolerance: eager and C++ run one formula, whose operators are each rounded once, so a bit apart is an error
    torch.testing.assert_close(parts, encode(x, SEED), rtol=0, atol=0)
    assert torch.equal(parts[0][0], own.encode(x * 2, (0, 1, 2), "int8", None)[0])


@pytest.mark.parametrize("cpp_wrapper", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_products_have_written_is_encoded_by_functions_that_sizes_share(cpp_wrapper):
    """The C++ compiler takes long over a kernel for each tensor; what is fused is not written to memory for it."""
    names = ["int8"] * 12 + ["int4-unbiased"] * 12 + ["fp8"]

    def encode(x, seed):
        products = [x @ x * 0.1, *(x @ (x * i) for i in range(1, len(names)))]
        drawn = [seed if named(name).draws else None for name in names]
        given = [(y.t(), [1, 0]) if i % 3 == 2 else (y, [0, 1]) for i, y in enumerate(products)]
        return [own.encode(y, order, name, each) for (y, order), name, each in zip(given, names, drawn)]

    x = torch.randn(64, 64)
    with inductor_config.patch(cpp_wrapper=cpp_wrapper):
        parts, codes = run_and_get_code(torch.compile(encode, fullgraph=True), x, SEED)
    torch.testing.assert_close(parts, encode(x, SEED))
    made, called = codes[0].count("def encode_"), codes[0].count(" = encode_")
    assert (made, called) == ((0, 0) if cpp_wrapper else (2, 23))  # the first is fused, the last is the only one


def test_what_was_generated_is_freed():
    """Functions belong to the graph they are of: a store beside it kept every graph that was ever compiled."""

    def alive():
        gc.collect()
        return sum(isinstance(each, GraphLowering) for each in gc.get_objects())

    before = alive()
    torch.compile(lambda x: [own.encode(x @ (x * i), [0, 1], "int8", None) for i in range(13)], fullgraph=True)(
        torch.ones(64, 64)
    )
    torch._dynamo.reset()
    assert alive() <= before
