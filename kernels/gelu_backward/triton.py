"""The kernels: a program walks down some columns, its sums stay in registers until the last row; a second kernel adds
up those of all programs."""
import functools

import torch
import triton
import triton.language as tl

from .._core.partial_sums import add_up
from .._core.triton_math import exp2, reciprocal
from .._core.triton_support import as_rows, cdiv, launch, next_power_of_2, unit_of

_TILE = 1024  # numbers: 8 a thread, 16 bytes in half precision
_WARPS = 4
_PROGRAMS = 132 * 32 // _WARPS  # as many as an H100 holds at a time with 64 registers a thread


@triton.jit
def _normal(x):
    """Distribution function and density of the normal distribution at ``x``; relative error 6e-7 + 6e-8 x**2.

    One exponential serves both: the function at ``-|x|`` is the density times Mills' ratio, which varies slowly. Its
    polynomial in ``1 / (1 + 0.3 |x|)`` is a least-squares fit of the relative error for ``|x| < 14``, reweighted until
    all extrema were equal, 1.5e-7; beyond, float32 holds no density. 27 instructions an element in all, with ``tl.erf``
    45, which also loses the digits of what is small.
    """
    u = reciprocal(1 + 0.3 * tl.abs(x))
    ratio = 0.0894233855 * u - 0.394049643
    ratio = ratio * u + 0.517251454
    ratio = ratio * u - 0.134564872
    ratio = ratio * u + 0.322256175
    ratio = ratio * u + 0.250445994
    ratio = ratio * u + 0.302685279
    ratio = ratio * u + 0.299866183
    density = exp2(x * x * -0.72134752044448 - 1.32574806473616)  # -log2(e) / 2, -log2(2 pi) / 2
    below = ratio * u * density
    return tl.where(x < 0, below, 1 - below), density


@triton.jit
def _at(row, column, rows, STRIDE, DIM):
    """Places of a tile in a tensor, and which exist."""
    return row.to(tl.int64)[:, None] * STRIDE + column[None, :], (row < rows)[:, None] & (column < DIM)[None, :]


@triton.jit(do_not_specialize=['rows', 'dim', 'grad_stride', 'x_stride'])
def _gelu_backward(grad, x, grad_x, y, partials, rows, dim, grad_stride, x_stride, UNIT: tl.constexpr,
                   BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr):
    """A program's sums go to its row of ``partials``, (programs, DIM)."""
    DIM = dim * UNIT
    GRAD_STRIDE = grad_stride * UNIT
    X_STRIDE = x_stride * UNIT
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    step: tl.constexpr = BLOCK_R * UNROLL
    for start in range(tl.program_id(1) * step, rows, tl.num_programs(1) * step):
        loaded = ()
        for u in tl.static_range(UNROLL):  # all loads first, to have many under way
            row = start + u * BLOCK_R + tl.arange(0, BLOCK_R)
            at_grad, mask = _at(row, column, rows, GRAD_STRIDE, DIM)
            at_x, _ = _at(row, column, rows, X_STRIDE, DIM)
            loaded = loaded + ((tl.load(grad + at_grad, mask=mask, other=0.0),
                                tl.load(x + at_x, mask=mask, other=0.0)), )
        for u in tl.static_range(UNROLL):
            value = loaded[u][1].to(tl.float32)
            below, density = _normal(value)
            slope = loaded[u][0].to(tl.float32) * (below + value * density)
            total += slope
            place, mask = _at(start + u * BLOCK_R + tl.arange(0, BLOCK_R), column, rows, DIM, DIM)
            tl.store(grad_x + place, slope.to(grad_x.dtype.element_ty), mask=mask)
            tl.store(y + place, (value * below).to(y.dtype.element_ty), mask=mask)
    tl.store(partials + tl.program_id(1) * DIM + column, tl.sum(total, 0), mask=column < DIM)


@triton.jit(do_not_specialize=['rows', 'dim', 'stride'])
def _column_sums(x, partials, rows, dim, stride, UNIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
                 UNROLL: tl.constexpr):
    """As in :func:`_gelu_backward`."""
    DIM = dim * UNIT
    STRIDE = stride * UNIT
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    step: tl.constexpr = BLOCK_R * UNROLL
    for start in range(tl.program_id(1) * step, rows, tl.num_programs(1) * step):
        loaded = ()
        for u in tl.static_range(UNROLL):
            place, mask = _at(start + u * BLOCK_R + tl.arange(0, BLOCK_R), column, rows, STRIDE, DIM)
            loaded = loaded + (tl.load(x + place, mask=mask, other=0.0), )
        for u in tl.static_range(UNROLL):
            total += loaded[u].to(tl.float32)
    tl.store(partials + tl.program_id(1) * DIM + column, tl.sum(total, 0), mask=column < DIM)


@functools.lru_cache
def _plan(rows, dim, unroll):
    """Blocks of columns and programs side by side; rows and columns of a tile."""
    # Columns side by side: as many as divide all of them, 128 to 512 bytes in half precision.
    block_d = min(max(dim & -dim, 64), 256, next_power_of_2(dim))
    block_r = _TILE // block_d
    blocks = cdiv(dim, block_d)
    return blocks, min(cdiv(rows, block_r * unroll), cdiv(_PROGRAMS, blocks)), block_r, block_d


def _sum_by(kernel, rows, dim, unroll, tensors, *strides):
    """Run ``kernel`` on ``tensors`` of ``rows`` rows and add up what its programs leave. With ``unroll`` tiles at once
    in half precision, half as many in float32."""
    x = tensors[0]
    unroll = unroll * 2 // x.element_size()
    blocks, programs, block_r, block_d = _plan(rows, dim, unroll)
    # In runtime arguments that count units: one compiled kernel serves all widths and still knows of the alignment.
    unit = unit_of(dim, *strides)
    partials = x.new_empty(programs * dim, dtype=torch.float32)
    launch(kernel, (blocks, programs, 1), *tensors, partials, rows, dim // unit, *[s // unit for s in strides], unit,
           block_r, block_d, unroll, num_warps=_WARPS)
    sums = partials.new_empty(dim)
    launch(add_up, (cdiv(dim, 16), 1, 1), partials, None, sums, programs, dim // unit, 0, unit, 256, 16, num_warps=4)
    return sums


def gelu_backward(grad, x):
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    y = torch.empty_like(grad_x)
    dim, size = x.shape[-1], x.numel()
    if not size:
        return grad_x, y, x.new_zeros(dim, dtype=torch.float32)
    (grad, grad_stride), (x, x_stride) = as_rows(grad, grad.dim() - 1), as_rows(x, x.dim() - 1)
    return grad_x, y, _sum_by(_gelu_backward, size // dim, dim, 2, (grad, x, grad_x, y), grad_stride, x_stride)


def column_sums(x):
    dim, size = x.shape[-1], x.numel()
    if not size:
        return x.new_zeros(dim, dtype=torch.float32)
    x, stride = as_rows(x, x.dim() - 1)
    return _sum_by(_column_sums, size // dim, dim, 4, (x,), stride)
