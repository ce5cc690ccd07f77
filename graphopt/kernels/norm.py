# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""LayerNorm and RMSNorm over the last dims, and their gradients from z alone (MS-BP, LowMemoryBP section 4).

forward    z = (x - mean) * rstd, y = weight * z + bias, rstd = 1 / sqrt(var + eps); RMSNorm has no mean
backward   with dz = weight * dy:  dx = rstd * (dz - mean(dz) - z * mean(dz * z)),
           dweight = sum over rows of dy * z,  dbias = sum over rows of dy

A tensor is rows x width here, width the product of the normalised dims: x, y, z, dy, dx [rows, width], rstd float32
[rows], weight and bias [width]. Forward reads x once, backward dy and z once where the rows are `fused`: programs loop
over rows and leave sums [programs, width] in float32, which are then added up in a fixed order. Wider rows do not fit
into registers beside their sums: backward reads them chunk by chunk, twice, and another kernel makes the sums.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from graphopt.kernels.language import DTYPES, INSTALLED, jit, tl, triton
from graphopt.lowering import formulas

LARGEST_WIDTH = 32768
# the largest width of which forward keeps a row in registers, and the sums beside it in backward, without spilling any;
# where 16 does not divide the width, every element takes an address of its own
LARGEST_UNALIGNED_WIDTH = 8192
FUSED_WIDTH, FUSED_UNALIGNED_WIDTH = 8192, 4096


def reference_forward(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool,
    z_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y of x's dtype, z of `z_dtype` from before y was rounded, rstd with dims kept; over the last len(shape) dims."""
    y, z, rstd = formulas.norm(x, len(shape), weight, bias, eps, centred, z_dtype)
    return y, z.clone() if z is y else z, rstd  # an operator's outputs share no memory


def reference_backward(
    grad: Tensor, z: Tensor, rstd: Tensor, weight: Tensor | None, ndim: int, centred: bool, dtype: torch.dtype,
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx of `dtype`, dweight, dbias; those of the latter two that `mask` leaves out are empty."""
    dx, *parameters = formulas.norm_backward(grad, z.contiguous(), rstd, weight, ndim, centred, dtype)
    dweight, dbias = (sums if wanted else sums.new_empty(0) for sums, wanted in zip(parameters, mask))
    return dx, dweight, dbias.clone() if dbias is grad else dbias  # of a single row


def supports(width: int, *dtypes: torch.dtype | None) -> bool:
    """Whether the kernels take rows of this width and tensors of these dtypes; None for a tensor that is not there."""
    largest = LARGEST_UNALIGNED_WIDTH if width % 16 else LARGEST_WIDTH
    return INSTALLED and 0 < width <= largest and all(dtype is None or dtype in DTYPES for dtype in dtypes)


def fused(width: int) -> bool:
    """Whether backward makes dx and the sums for dweight and dbias in one kernel."""
    return width <= (FUSED_UNALIGNED_WIDTH if width % 16 else FUSED_WIDTH)


class Blocks(NamedTuple):
    """How a kernel is launched: a tile of rows x block elements to a program, warps to a program."""

    block: int
    rows: int
    warps: int


def forward_blocks(width: int) -> Blocks:
    # a row in registers, 1024 elements at least, 8 to 32 to a thread
    block = _power_of_two(width)
    rows = max(1, 1024 // block)
    return Blocks(block, rows, warps=min(32, max(4, rows * block // 512)))


def backward_blocks(width: int) -> Blocks:
    # dy, z and both sums in registers, 8 elements to a thread; past that a chunk of a row
    block = _power_of_two(width)
    if not fused(width):
        return Blocks(block=4096, rows=1, warps=16)
    rows = max(1, 1024 // block)
    return Blocks(block, rows, warps=min(32, max(4, rows * block // 256)))


def backward_programs(rows: int, blocks: Blocks, processors: int) -> int:
    """As many programs as run at once, 32 warps to a multiprocessor; the sums of each cost a row of float32."""
    return min(-(-rows // blocks.rows), processors * max(1, 32 // blocks.warps))


def sums_blocks() -> Blocks:
    return Blocks(block=128, rows=16, warps=4)


def sums_programs(rows: int, blocks: Blocks, width: int, processors: int) -> int:
    """Programs along the rows, for eight to a multiprocessor in all."""
    columns = -(-width // blocks.block)
    return min(-(-rows // blocks.rows), max(1, processors * 8 // columns))


def _power_of_two(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


@jit
def forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, z_ptr, rstd_ptr, rows, width, x_stride, eps,
    CENTRED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < width)
    h = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0).to(tl.float32)
    if CENTRED:
        mean = tl.sum(h, axis=1, keep_dims=True) / width
        h = tl.where(inside, h - mean, 0)
    rstd = tl.rsqrt(tl.sum(h * h, axis=1, keep_dims=True) / width + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    z = h * rstd
    at = row * width + column
    tl.store(z_ptr + at, z.to(z_ptr.dtype.element_ty), mask=inside)
    if weight_ptr is not None:
        z *= tl.load(weight_ptr + column, mask=column < width, other=0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + column, mask=column < width, other=0).to(tl.float32)
    tl.store(y_ptr + at, z.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def backward_kernel(
    grad_ptr, z_ptr, rstd_ptr, weight_ptr, dx_ptr, dweight_ptr, dbias_ptr, rows, width, grad_stride, z_stride,
    CENTRED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)[None, :]
    if dweight_ptr is not None:
        dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    if dbias_ptr is not None:
        dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(tl.program_id(0).to(tl.int64) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)[:, None]
        inside = (row < rows) & (column < width)
        dz = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0).to(tl.float32)
        z = tl.load(z_ptr + row * z_stride + column, mask=inside, other=0).to(tl.float32)
        if dweight_ptr is not None:
            dweight += dz * z
        if dbias_ptr is not None:
            dbias += dz
        if weight_ptr is not None:
            dz *= tl.load(weight_ptr + column, mask=column < width, other=0).to(tl.float32)
        dx = dz - z * (tl.sum(dz * z, axis=1, keep_dims=True) / width)
        if CENTRED:
            dx -= tl.sum(dz, axis=1, keep_dims=True) / width
        dx *= tl.load(rstd_ptr + row, mask=row < rows, other=0)
        tl.store(dx_ptr + row * width + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    at = tl.program_id(0).to(tl.int64) * width + tl.arange(0, BLOCK)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + at, tl.sum(dweight, axis=0), mask=tl.arange(0, BLOCK) < width)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + at, tl.sum(dbias, axis=0), mask=tl.arange(0, BLOCK) < width)


@jit
def wide_backward_kernel(
    grad_ptr, z_ptr, rstd_ptr, weight_ptr, dx_ptr, width, grad_stride, z_stride,
    CENTRED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    total, projected = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        dz = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0).to(tl.float32)
        if weight_ptr is not None:
            dz *= tl.load(weight_ptr + column, mask=inside, other=0).to(tl.float32)
        total += dz
        projected += dz * tl.load(z_ptr + row * z_stride + column, mask=inside, other=0).to(tl.float32)
    mean, slope, rstd = tl.sum(total, axis=0) / width, tl.sum(projected, axis=0) / width, tl.load(rstd_ptr + row)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        dz = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0).to(tl.float32)
        if weight_ptr is not None:
            dz *= tl.load(weight_ptr + column, mask=inside, other=0).to(tl.float32)
        dx = dz - slope * tl.load(z_ptr + row * z_stride + column, mask=inside, other=0).to(tl.float32)
        if CENTRED:
            dx -= mean
        tl.store(dx_ptr + row * width + column, (dx * rstd).to(dx_ptr.dtype.element_ty), mask=inside)


@jit
def sums_kernel(
    grad_ptr, z_ptr, dweight_ptr, dbias_ptr, rows, width, grad_stride, z_stride,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    dweight, dbias = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(tl.program_id(0).to(tl.int64) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)[:, None]
        inside = (row < rows) & (column < width)
        dy = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0).to(tl.float32)
        if dweight_ptr is not None:
            dweight += dy * tl.load(z_ptr + row * z_stride + column, mask=inside, other=0).to(tl.float32)
        if dbias_ptr is not None:
            dbias += dy
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * width + column
    if dweight_ptr is not None:
        tl.store(dweight_ptr + at, tl.sum(dweight, axis=0), mask=column < width)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + at, tl.sum(dbias, axis=0), mask=column < width)


def forward(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool,
    z_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `reference_forward`; y and z row-major."""
    width, ndim = math.prod(shape), len(shape)
    lines, launched = _lines(x, width), forward_blocks(width)
    rows = lines.shape[0]
    y, z, rstd = empty_forward(x, ndim, z_dtype)
    if rows:
        with torch.cuda.device_of(x):
            forward_kernel[(triton.cdiv(rows, launched.rows),)](
                lines, _flat(weight), _flat(bias), y, z, rstd, rows, width, lines.stride(0), eps,
                CENTRED=centred, BLOCK=launched.block, ROWS=launched.rows, num_warps=launched.warps,
            )  # fmt: skip
    return y, z, rstd


def backward(
    grad: Tensor, z: Tensor, rstd: Tensor, weight: Tensor | None, ndim: int, centred: bool, dtype: torch.dtype,
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `reference_backward`; the same bits on every run."""
    shape = grad.shape[-ndim:]
    width = math.prod(shape)
    lines, zs, rstd = _lines(grad, width), _lines(z, width), rstd.contiguous()
    rows, strides = lines.shape[0], (lines.stride(0), zs.stride(0))
    dx = grad.new_empty(grad.shape, dtype=dtype)
    processors = _processors(grad)
    one_kernel = fused(width)
    launched, summed = backward_blocks(width), sums_blocks()
    programs = (
        backward_programs(rows, launched, processors) if one_kernel else sums_programs(rows, summed, width, processors)
    )
    sums = [grad.new_empty((programs, width), dtype=torch.float32) if wanted else None for wanted in mask]
    if rows:
        with torch.cuda.device_of(grad):
            if one_kernel:
                backward_kernel[(programs,)](
                    lines, zs, rstd, _flat(weight), dx, *sums, rows, width, *strides,
                    CENTRED=centred, BLOCK=launched.block, ROWS=launched.rows, num_warps=launched.warps,
                )  # fmt: skip
            else:
                wide_backward_kernel[(rows,)](
                    lines, zs, rstd, _flat(weight), dx, width, *strides,
                    CENTRED=centred, BLOCK=launched.block, num_warps=launched.warps,
                )  # fmt: skip
            if any(mask) and not one_kernel:
                sums_kernel[(programs, triton.cdiv(width, summed.block))](
                    lines, zs, *sums, rows, width, *strides,
                    BLOCK=summed.block, ROWS=summed.rows, num_warps=summed.warps,
                )  # fmt: skip
    parameter = dtype if weight is None else weight.dtype
    dweight, dbias = (
        grad.new_empty(0, dtype=parameter) if each is None else each.sum(0).to(parameter).view(shape) for each in sums
    )
    return dx, dweight, dbias


def empty_forward(x: Tensor, ndim: int, z_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """y, z and rstd for `x`, of these shapes and strides and not yet written."""
    kept = (*x.shape[: x.dim() - ndim], *[1] * ndim)
    rstd = x.new_empty(kept, dtype=formulas.compute_dtype(x.dtype))
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=z_dtype), rstd


def empty_backward(
    grad: Tensor, weight: Tensor | None, ndim: int, dtype: torch.dtype, mask: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias for `grad`, of these shapes and strides and not yet written."""
    shape, parameter = grad.shape[-ndim:], dtype if weight is None else weight.dtype
    dweight, dbias = (grad.new_empty(shape if wanted else (0,), dtype=parameter) for wanted in mask)
    return grad.new_empty(grad.shape, dtype=dtype), dweight, dbias


def _lines(x: Tensor, width: int) -> Tensor:
    """x as [rows, width] with contiguous rows any stride apart; copied only where its strides do not allow that."""
    try:
        lines = x.view(-1, width)
    except RuntimeError:
        lines = x.contiguous().view(-1, width)
    return lines if width == 1 or lines.stride(1) == 1 else lines.contiguous()


def _flat(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous().view(-1)


def _processors(x: Tensor) -> int:
    return int(torch.cuda.get_device_properties(x.device).multi_processor_count) if x.is_cuda else 2
