"""graphopt::encode and decode: their formulas, whatever runs them."""

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from graphopt.codecs import CODECS, codec, named
from graphopt.lowering import codec_ops  # noqa: F401  (registers the operators)

own = torch.ops.graphopt
SEED = torch.tensor(0x123456789ABCDEF)
NAMES = [*CODECS, *(codec(name, 32, "stochastic", False).name for name in ("int8", "int4"))]


def through(x, name, seed):
    each = named(name)
    parts = own.encode(x, name, seed if each.draws else None)
    return *parts, own.decode([*parts, seed] if each.draws else parts, x.shape, name, x.dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(24, 128), (3, 5, 7), (0,)], ids=str)
def test_the_operators_are_the_formulas(name, shape):
    x, each = torch.randn(shape).bfloat16(), named(name)
    seed = SEED if each.draws else None
    *parts, x_ = through(x, name, SEED)
    expected = each.parts(x, seed)
    assert all(torch.equal(one, other) for one, other in zip(parts, expected, strict=True))
    assert torch.equal(x_, each.decode([*parts, SEED] if each.draws else parts, x.shape, x.dtype))
    given = [*parts, *([SEED] if each.draws else [])]
    torch.library.opcheck(own.encode.default, (x, name, seed), test_utils="test_faketensor")
    torch.library.opcheck(own.decode.default, (given, shape, name, x.dtype), test_utils="test_faketensor")


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(24, 128), (3, 5, 37)], ids=str)
def test_inductor_makes_the_same_codes_and_values(shape):
    def function(x, seed):
        return [each for name in NAMES for each in through(x * 2, name, seed)]

    x = torch.randn(shape).bfloat16()
    found, codes = run_and_get_code(torch.compile(function, fullgraph=True), x, SEED)
    assert "torch.ops.graphopt" not in "".join(codes)  # spelt out, not called
    assert all(torch.equal(one, other) for one, other in zip(found, function(x, SEED), strict=True))
