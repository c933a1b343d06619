"""What kernels with a LayerNorm share: rows of channels in registers, their moments, how rows are cut."""
import functools

import triton
import triton.language as tl

from .triton_support import as_rows, cdiv, next_power_of_2

_WARPS = 132 * 16  # as many as an H100 holds at a time


def rows_of(tensor):
    """:func:`as_rows` over all dimensions but the last."""
    return as_rows(tensor, tensor.dim() - 1)


@triton.jit
def load(tensor, row, channel, mask, STRIDE: tl.constexpr):
    """Rows of ``tensor``, zero where ``mask`` says that there is nothing."""
    return tl.load(tensor + row.to(tl.int64)[:, None] * STRIDE + channel[None, :], mask=mask, other=0.0)


@triton.jit
def load_parameters(weight, bias, channel, DIM: tl.constexpr):
    """Weight and bias in float32, each (1, channels)."""
    return (tl.load(weight + channel, mask=channel < DIM, other=0.0).to(tl.float32)[None, :],
            tl.load(bias + channel, mask=channel < DIM, other=0.0).to(tl.float32)[None, :])


@triton.jit
def normalise(x, channel, EPS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """``x`` without its mean, divided by its standard deviation, and what it was multiplied by. The variance is
    taken about the mean, so that a large mean costs no digits. Where it is 0, ``x`` is multiplied by a finite number,
    since rows that are not there must not leave NaN in sums."""
    x = x.to(tl.float32)
    x -= tl.sum(x, 1, keep_dims=True) / DIM
    if DIM != BLOCK_D:
        x = tl.where((channel < DIM)[None, :], x, 0.0)
    scale = tl.rsqrt(tl.maximum(tl.sum(x * x, 1, keep_dims=True) / DIM + EPS, 1e-37))
    return x * scale, scale


@triton.jit
def through_norm(grad, normal, inverse, weight, DIM: tl.constexpr):
    """What ``grad``, the gradient of a LayerNorm's output, is for its input; ``normal`` and ``inverse`` are what
    ``normalise`` gave."""
    grad *= weight
    mean = tl.sum(grad, 1, keep_dims=True) / DIM
    along = tl.sum(grad * normal, 1, keep_dims=True) / DIM
    return inverse * (grad - mean - normal * along)


@functools.lru_cache
def plan(rows, dim):
    """Of a pass over rows: programs, rows and channels of a program, its warps."""
    block_d = next_power_of_2(dim)
    # A row within a warp needs no barrier. 16 numbers a thread; 32 rather than a second warp.
    warps = 4 if block_d <= 256 else 1 if block_d <= 1024 else min(block_d // 512, 16)
    block_r = max(1, 512 * warps // block_d)
    return cdiv(rows, block_r), block_r, block_d, warps


@functools.lru_cache
def plan_sums(rows, dim, unroll):
    """Of a pass whose programs take ``unroll`` tiles at a time and add up over rows: programs, rows and channels of a
    tile, warps."""
    block_d = next_power_of_2(dim)
    warps = min(max(4, block_d // 256), 16)  # 8 numbers a thread
    block_r = max(1, 256 * warps // block_d)
    return min(cdiv(rows, block_r * unroll), _WARPS // warps), block_r, block_d, warps
