# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""Activations that leave behind a code of two bits an element.

forward    y = f(x), code = words of int32, 16 codes each, made from one read of x
backward   dx = dy * levels[code]

x, y, dx, dy: any shape; code: int32[ceil(numel / 16)], laid out as by `formulas.pack`. What a code means is a scheme of
`graphopt.lowering.codes`. f and f' are computed in float32, y is rounded once. NaN has code 0; at +-infinity f' is its
limit, while f there is what the formula gives: NaN at -inf for those that end in x * 0, as in torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from graphopt.graph import memory_order
from graphopt.kernels.language import DTYPES, INSTALLED, jit, tl, triton
from graphopt.lowering.activations import ACTIVATIONS
from graphopt.lowering.code_tables import CODES
from graphopt.lowering.codes import BITS, Code, encode, slope
from graphopt.lowering.formulas import WORD, compute_dtype, pack, unpack


def dense(x: Tensor) -> Tensor:
    """x if its elements fill a stretch of memory, in whatever order of the dims; otherwise x made contiguous."""
    return x if x.permute(memory_order(x)).is_contiguous() else x.contiguous()


def reference_forward(x: Tensor, activation: str, scheme: str, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y of x's dtype, and the code of x's elements as they lie in memory (row-major if x is not dense).

    `seed`: int64, one element, on x's device; read by the scheme "unbiased" only.
    """
    function, derivative = ACTIVATIONS[activation]
    x = dense(x)
    h = x.to(compute_dtype(x.dtype))
    flat = h.permute(memory_order(x)).reshape(-1)

    def drawn() -> Tensor:
        assert seed is not None
        return noise(seed, flat.shape[0]).to(flat.dtype)

    return function(h).to(x.dtype), pack(encode(flat, derivative, scheme, CODES[activation][scheme], drawn), BITS)


def reference_backward(grad: Tensor, code: Tensor, activation: str, scheme: str) -> Tensor:
    """dx of grad's dtype, row-major; code i is that of element i of grad in row-major order."""
    dtype = compute_dtype(grad.dtype)
    step = slope(unpack(code, list(grad.shape), BITS, torch.int32), CODES[activation][scheme].levels, dtype)
    return (grad.contiguous().to(dtype) * step).to(grad.dtype)


def noise(seed: Tensor, numel: int) -> Tensor:
    """float32[numel] in [0, 1): the numbers that the kernel draws, `tl.rand4x(seed, i // 4)[i % 4]`.

    Philox4x32-10 (Salmon et al., SC 2011), in int64 as torch has no unsigned arithmetic.
    """
    low = 0xFFFFFFFF
    counter = torch.arange((numel + 3) // 4, device=seed.device)
    key = seed.reshape(())
    zero = torch.zeros_like(counter)
    c0, c1, c2, c3, k0, k1 = counter & low, counter >> 32, zero, zero, key & low, (key >> 32) & low
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # modulo 2^64, as the upper halves need
        c0, c1, c2, c3 = ((b >> 32) & low) ^ c1 ^ k0, b & low, ((a >> 32) & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    bits = torch.stack((c0, c1, c2, c3), -1).reshape(-1)[:numel]
    # the bits as a signed number, folded onto the non-negative ones
    return torch.where(bits >= 1 << 31, low - bits, bits).to(torch.float32) * 4.6566127342e-10


def supports(dtype: torch.dtype) -> bool:
    return INSTALLED and dtype in DTYPES


class Blocks(NamedTuple):
    """How a kernel is launched: words of code to a program, warps to a program."""

    words: int
    warps: int


def blocks() -> Blocks:
    # 16 elements to a thread: two loads of 16 bytes in flight at half precision, four in float32
    return Blocks(words=128, warps=4)


@jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@jit
def _expm1(x):
    # Taylor to x^8 where exp(x) - 1 cancels; what is left out is below 0.5^9 / 9! = 5e-9
    series = 1 / 720 + x * (1 / 5040 + x * (1 / 40320))
    series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * series)))))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1)


@jit
def _log1p(u):
    # log(w) / (w - 1) varies slowly, so the rounding of w = 1 + u cancels (Kahan); for u >= 0
    w = 1 + u
    return tl.where(w == 1, u, tl.log(w) * (u / tl.where(w == 1, 1.0, w - 1)))


@jit
def _tanh(x):
    u = _expm1(-2 * tl.abs(x))
    return tl.where(x < 0, u / (u + 2), -u / (u + 2))


@jit
def _gelu_tanh_gate(x):
    # (1 + tanh(v)) / 2 = sigmoid(2 v)
    return _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@jit
def _mish_n(x):
    # tanh(softplus(x)) = n / (n + 2); 1 in float32 from 20 on
    e = tl.exp(tl.minimum(x, 20.0))
    return e * (e + 2)


@jit
def function(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        y = x * _gelu_tanh_gate(x)
    elif ACTIVATION == "silu":
        y = x / (1 + tl.exp(-x))
    elif ACTIVATION == "mish":
        n = _mish_n(x)
        y = x * (n / (n + 2))
    elif ACTIVATION == "softplus":
        y = tl.where(x > 20, x, tl.maximum(x, 0.0) + _log1p(tl.exp(-tl.abs(x))))
    elif ACTIVATION == "elu":
        y = tl.where(x > 0, x, _expm1(x))
    elif ACTIVATION == "selu":
        y = 1.0507009873554805 * tl.where(x > 0, x, 1.6732632423543772 * _expm1(x))
    elif ACTIVATION == "hardswish":
        y = x * (tl.minimum(tl.maximum(x + 3, 0.0), 6.0) * (1 / 6))
    elif ACTIVATION == "tanh":
        y = _tanh(x)
    else:
        tl.static_assert(ACTIVATION == "sigmoid")
        y = _sigmoid(x)
    return y


@jit
def derivative(x, ACTIVATION: tl.constexpr):
    # NaN has become a number here; its code is set to 0 by the caller
    x = tl.minimum(tl.maximum(x, -1e4), 1e4)
    if ACTIVATION == "gelu":
        d = 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        s = _gelu_tanh_gate(x)
        d = s + x * s * (1 - s) * (1.5957691216057308 * (1 + 0.134145 * x * x))
    elif ACTIVATION == "silu":
        s = _sigmoid(x)
        d = s + x * s * (1 - s)
    elif ACTIVATION == "mish":
        n = _mish_n(x)
        t = n / (n + 2)
        d = t + x * _sigmoid(x) * (1 + t) * (2 / (n + 2))
    elif ACTIVATION == "softplus":
        d = _sigmoid(x)
    elif ACTIVATION == "elu":
        d = tl.where(x > 0, 1.0, tl.exp(x))
    elif ACTIVATION == "selu":
        d = 1.0507009873554805 * tl.where(x > 0, 1.0, 1.6732632423543772 * tl.exp(x))
    elif ACTIVATION == "hardswish":
        d = tl.where(x <= -3, 0.0, tl.where(x < 3, x * (1 / 3) + 0.5, 1.0))
    elif ACTIVATION == "tanh":
        t = _tanh(x)
        d = 1 - t * t
    else:
        tl.static_assert(ACTIVATION == "sigmoid")
        s = _sigmoid(x)
        d = s * (1 - s)
    return d


@jit
def _count(value, LOW: tl.constexpr, MIDDLE: tl.constexpr, HIGH: tl.constexpr):
    return (value > LOW).to(tl.int32) + (value > MIDDLE).to(tl.int32) + (value > HIGH).to(tl.int32)


@jit
def _share(d, LOW: tl.constexpr, HIGH: tl.constexpr):
    return tl.minimum(tl.maximum((d - LOW) * (1 / (HIGH - LOW)), 0.0), 1.0)


@jit
def forward_kernel(
    x_ptr, y_ptr, code_ptr, seed_ptr, numel, ACTIVATION: tl.constexpr, SCHEME: tl.constexpr,
    L0: tl.constexpr, L1: tl.constexpr, L2: tl.constexpr, L3: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    column = tl.arange(0, 16)[None, :]
    at = word[:, None] * 16 + column
    inside = at < numel
    x = tl.load(x_ptr + at, mask=inside, other=0).to(tl.float32)
    tl.store(y_ptr + at, function(x, ACTIVATION).to(y_ptr.dtype.element_ty), mask=inside)
    if SCHEME == "relu3":
        code = _count(x, T0, T1, T2)
    elif SCHEME == "lloyd":
        code = _count(derivative(x, ACTIVATION), T0, T1, T2)
    else:
        d = derivative(x, ACTIVATION)
        # four numbers to a call; number i of call k is that of element 4 k + i
        r0, r1, r2, r3 = tl.rand4x(tl.load(seed_ptr), word[:, None] * 4 + tl.arange(0, 4)[None, :])
        drawn = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (WORDS, 16))
        place = _share(d, L0, L1) + _share(d, L1, L2) + _share(d, L2, L3)
        code = tl.minimum((place + drawn).to(tl.int32), 3)  # 3 + drawn may round to 4
    code = tl.where(inside & (x == x), code, 0)
    tl.store(code_ptr + word, tl.sum(code << (2 * column), axis=1), mask=word * 16 < numel)


@jit
def backward_kernel(
    grad_ptr, code_ptr, dx_ptr, numel,
    L0: tl.constexpr, L1: tl.constexpr, L2: tl.constexpr, L3: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    column = tl.arange(0, 16)[None, :]
    at = word[:, None] * 16 + column
    inside = at < numel
    grad = tl.load(grad_ptr + at, mask=inside, other=0).to(tl.float32)
    words = tl.load(code_ptr + word, mask=word * 16 < numel, other=0)
    code = (words[:, None] >> (2 * column)) & 3
    slope = tl.where(code < 2, tl.where(code < 1, L0, L1), tl.where(code < 3, L2, L3))
    tl.store(dx_ptr + at, (grad * slope).to(dx_ptr.dtype.element_ty), mask=inside)


def forward(x: Tensor, activation: str, scheme: str, seed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `reference_forward`, the drawn codes included; y has the strides of x where x is dense."""
    x = dense(x)
    row, launched = CODES[activation][scheme], blocks()
    y, code = empty_forward(x)
    if scheme != "unbiased":
        seed = None
    if x.numel():
        with torch.cuda.device_of(x):
            forward_kernel[(triton.cdiv(code.numel(), launched.words),)](
                x, y, code, seed, x.numel(), activation, scheme, *row.levels, *_thresholds(row),
                WORDS=launched.words, num_warps=launched.warps,
            )  # fmt: skip
    return y, code


def backward(grad: Tensor, code: Tensor, activation: str, scheme: str) -> Tensor:
    """As `reference_backward`."""
    grad, code = grad.contiguous(), code.contiguous()
    dx, launched = torch.empty_like(grad), blocks()
    if grad.numel():
        with torch.cuda.device_of(grad):
            backward_kernel[(triton.cdiv(code.numel(), launched.words),)](
                grad, code, dx, grad.numel(), *CODES[activation][scheme].levels,
                WORDS=launched.words, num_warps=launched.warps,
            )  # fmt: skip
    return dx


def empty_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """y and code for `x`, of these shapes and strides and not yet written."""
    x = dense(x)
    return torch.empty_like(x), x.new_empty(words(x.numel()), dtype=torch.int32)


def words(numel: int) -> int:
    """How many words the codes of so many elements take."""
    return (numel + WORD - 1) // WORD


def _thresholds(row: Code) -> tuple[float, float, float]:
    return row.thresholds or (0.0, 0.0, 0.0)
