"""Codes of groups: bit by bit those of the formulas, whose errors tests/test_codecs.py bounds."""

import math

import pytest
import torch

from graphopt.codecs import codec
from graphopt.kernels import group_quant
from graphopt.kernels.group_quant import BITS, GROUPS, decode, encode, reference_decode, reference_encode

# numpy speaks up where the interpreter divides by zero, and casts NaN, as the GPU does
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEED = -0x123456789ABCDEF
VARIANTS = [(bits, symmetric, seed) for bits in BITS for symmetric in (True, False) for seed in (None, SEED)]
every_variant = pytest.mark.parametrize(
    "bits, symmetric, seed",
    VARIANTS,
    ids=[f"{bits}-{'symmetric' if s else 'asymmetric'}-{'nearest' if seed is None else 'dithered'}"
         for bits, s, seed in VARIANTS],
)  # fmt: skip


def sample(*shape, dtype=torch.float32, device="cpu"):
    """Outliers, a group of zeros and one of equal numbers among normal ones."""
    x = torch.randn(shape).mul(2).add(0.3)
    flat = x.view(-1)
    flat[::97] *= 30
    flat[1024:1088], flat[2048:2112] = 0.0, 1.5
    return x.to(device, dtype)


def seeded(seed, device):
    return None if seed is None else torch.tensor(seed, device=device)


def rounded(x, dtype):
    """float32 -> dtype as the kernel's last rounding has it: Triton's interpreter cuts float32 off to bfloat16."""
    if dtype == torch.bfloat16 and x.device.type == "cpu":
        return (x.view(torch.int32) & -0x10000).view(torch.float32).to(dtype)
    return x.to(dtype)


def same(found, expected):
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape) and found.is_contiguous()
    assert torch.equal(found.nan_to_num(nan=math.pi), expected.nan_to_num(nan=math.pi))


def check(x, bits, group, symmetric, seed):
    """The parts and the decoded values are those of the formulas."""
    seed = seeded(seed, x.device)
    parts, expected = encode(x, bits, group, symmetric, seed), reference_encode(x, bits, group, symmetric, seed)
    for part, model in zip(parts, expected):
        same(part, model)
    assert len(parts) == len(expected)
    codes, *kept = expected
    x_ = decode(codes, kept, seed, bits, x.shape, x.dtype)
    if x.dtype == torch.bfloat16:
        same(x_, rounded(reference_decode(codes, kept, seed, bits, x.shape, torch.float32), x.dtype))
    else:
        same(x_, reference_decode(codes, kept, seed, bits, x.shape, x.dtype))
    return parts


@every_variant
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_and_values_are_those_of_the_formulas(dtype, bits, symmetric, seed, device):
    check(sample(5, 743, dtype=dtype, device=device), bits, 64, symmetric, seed)


@every_variant
def test_any_group_size(bits, symmetric, seed, device):
    x = sample(2100, device=device)
    for group in GROUPS:
        check(x, bits, group, symmetric, seed)


@pytest.mark.parametrize("numel", [0, 1, 31, 32, 33, 1023, 1024, 1025, 4096, 4111])
def test_any_size(numel, device):
    for variant in ((8, True, None), (4, True, None), (2, False, SEED)):
        bits, *rest = variant
        check(sample(numel, dtype=torch.bfloat16, device=device), bits, 32, *rest)


@every_variant
@pytest.mark.parametrize("exponent", [-140, -126, -118, -20, 60, 126])
def test_any_magnitude(exponent, bits, symmetric, seed, device):
    # from where all is rounded to zero, past steps without an inverse, to where a range is no number any more
    check(
        torch.randn(700, device=device).mul(2.0 ** (exponent / 2)).mul(2.0 ** (exponent / 2)), bits, 16, symmetric, seed
    )


def test_ties_are_rounded_to_even(device):
    # halves of a step in every group, at scales that bfloat16 has
    x = torch.arange(-16, 16, device=device).repeat(33) / 2
    for bits, symmetric in ((4, True), (8, False), (4, False), (2, True)):
        check(x, bits, 32, symmetric, None)
    x[::32] = 127
    codes, _ = check(x, 8, 32, True, None)
    assert codes[0, 12:21].tolist() == [125, 126, 126, 126, 127, 128, 128, 128, 129]  # of -2, -1.5, ... 2


def test_the_largest_magnitude_has_code_zero(device):
    x = torch.randn(40, 64, device=device)
    x[:20, 7], x[20:, 9] = 5.0, -5.0
    x[0, 8], x[30, 3] = -5.0, 5.0  # of both signs: the scale is positive
    codes, scale = check(x, 4, 64, True, None)
    expected = torch.where(torch.arange(40, device=device) >= 20, 5.0, -5.0)
    expected[0] = 5.0
    assert torch.equal(scale[:, 0].float(), expected)
    assert (codes[1:20, 7] & 15 == 0).all() and (codes[20:, 9] & 15 == 0).all()


@every_variant
def test_inf_and_nan_stay_in_their_groups(bits, symmetric, seed, device):
    x, seed = torch.randn(40, 64, device=device), seeded(seed, device)
    clean = encode(x, bits, 64, symmetric, seed)
    wrong = {1: math.nan, 5: -math.nan, 9: math.inf, 13: -math.inf, 17: 2e38, 21: -2e38}
    for row, value in wrong.items():
        x[row, row] = value
    x[25, :2] = torch.tensor([math.inf, -math.inf])
    x[29] = math.nan
    rows = [*wrong, 25, 29]
    others = [row for row in range(40) if row not in rows]
    parts, expected = encode(x, bits, 64, symmetric, seed), reference_encode(x, bits, 64, symmetric, seed)
    same(parts[-1], expected[-1])
    assert parts[-1][rows].isnan().all()
    for part, one, model in zip(parts, clean, expected):
        assert torch.equal(part[others], one[others]) and torch.equal(part[others], model[others])
    for dtype in DTYPES:
        x_ = decode(parts[0], parts[1:], seed, bits, x.shape, dtype)
        assert x_[rows].isnan().all() and x_[others].isfinite().all()


def test_zeros_are_zero_whatever_their_sign(device):
    x = torch.zeros(8, 64, device=device)
    x[1] = -0.0
    x[2, ::2] = -0.0
    x[3, 1] = 1e-40
    for bits in BITS:
        for symmetric in (True, False):
            codes, *kept = check(x, bits, 64, symmetric, None)
            assert not decode(codes, kept, None, bits, x.shape, x.dtype)[:3].any()


def test_float16_stays_finite(device):
    x = torch.full((2, 64), 65504.0, dtype=torch.float16, device=device)
    x[1, ::3] = -65504.0
    for bits, symmetric, seed in VARIANTS:
        codes, *kept = check(x, bits, 64, symmetric, seed)
        assert decode(codes, kept, seeded(seed, device), bits, x.shape, x.dtype).isfinite().all()


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1),
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "sliced": lambda x: x[:, :, 1:, ::2],
    "offset": lambda x: x[1:],
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "scalar": lambda x: x[0, 0, 0, 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_is_read_in_row_major_order(layout, device):
    x = LAYOUTS[layout](torch.randn(3, 5, 7, 11).to(device))
    check(x, 4, 16, False, SEED)
    assert torch.equal(encode(x, 4, 16, True)[0], encode(x.contiguous(), 4, 16, True)[0])


def test_parts_of_any_layout_are_decoded(device):
    x = torch.randn(1000, device=device)
    codes, *kept = encode(x, 4, 64, False)
    expected = decode(codes, kept, None, 4, x.shape, x.dtype)
    codes, *kept = (torch.stack([each, each], 2)[..., 0] for each in (codes, *kept))
    assert not codes.is_contiguous() and torch.equal(decode(codes, kept, None, 4, x.shape, x.dtype), expected)


def test_noise_follows_every_part_of_the_seed(device):
    x = torch.randn(640, device=device)
    seeds = [0, *(1 << shift for shift in (0, 15, 16, 31, 32, 47, 48, 62)), -1]
    codes = [check(x, 8, 64, True, seed)[0] for seed in seeds]
    assert all(not torch.equal(one, other) for i, one in enumerate(codes) for other in codes[:i])


def test_noise_of_many_groups(device):
    # an index of more than 16 bits: the upper half of the hash is not zero
    x, seed = torch.randn(8 * 66_000, device=device), seeded(SEED, device)
    assert torch.equal(encode(x, 2, 8, True, seed)[0], reference_encode(x, 2, 8, True, seed)[0])


@every_variant
def test_a_codec_decodes_what_the_kernel_encodes(bits, symmetric, seed, device):
    each = codec(f"int{bits}", 128, "nearest" if seed is None else "stochastic", symmetric)
    x, seed = torch.randn(9, 333, device=device), seeded(seed, device)
    drawn = [] if seed is None else [seed]
    parts = [*encode(x, bits, 128, symmetric, seed), *drawn]
    assert sum(part.nbytes for part in parts) == each.bytes(x.numel())
    codes, *kept = parts[: len(parts) - len(drawn)]
    assert torch.equal(each.decode(parts, x.shape, x.dtype), decode(codes, kept, seed, bits, x.shape, x.dtype))


def test_references_take_float64():
    x = torch.randn(100, dtype=torch.double)
    codes, *kept = reference_encode(x, 8, 32, True)
    assert not group_quant.supports(torch.float64, 4) and group_quant.supports(torch.float32, 4)
    assert not group_quant.supports(torch.float32, 2**31)
    assert reference_decode(codes, kept, None, 8, x.shape, x.dtype).dtype == torch.double


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="more than 2^31 elements take 13 GB of GPU memory")
@pytest.mark.parametrize("bits, symmetric, seed", [(8, True, None), (4, False, SEED), (2, True, None)])
def test_more_than_int32_elements(bits, symmetric, seed, device):
    torch.utils.deterministic.fill_uninitialized_memory = False
    head, tail = 2**31, 64 * 500 + 5
    x = torch.empty(head + tail, dtype=torch.bfloat16, device=device)
    x[head:] = sample(tail, dtype=torch.bfloat16, device=device)
    seed = seeded(seed, device)
    codes, *kept = encode(x, bits, 64, symmetric, seed)
    end = x[head:].clone()
    del x
    x_ = decode(codes, kept, seed, bits, (head + tail,), end.dtype)[head:]
    if seed is None:
        expected = reference_encode(end, bits, 64, symmetric)
        assert all(torch.equal(part[head // 64 :], model) for part, model in zip((codes, *kept), expected))
        same(x_, reference_decode(expected[0], expected[1:], None, bits, end.shape, end.dtype))
    else:
        # half a step, of a range below twice the largest magnitude and rounded up; then a rounding to bfloat16
        largest = torch.nn.functional.pad(end, (0, -tail % 64)).view(-1, 64).abs().amax(1).float()
        half = (largest / (2**bits - 1) * (1 + 2**-6)).repeat_interleave(64)[:tail]
        assert ((x_.float() - end.float()).abs() <= half + 2**-8 * (end.float().abs() + half)).all()
