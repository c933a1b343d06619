"""How a program goes over the maps. A *lane* is a pixel of the result, and the square of four pixels of the input whose
first is in the middle of its window: every pixel of the input is in one square. Lanes are numbered on from image to
image, so that they fill a program's tile whatever the width; a program goes on to a few neighbouring tiles."""
import functools

import triton
import triton.language as tl

from ..._core.triton_support import cdiv, next_power_of_2


@functools.lru_cache
def plan(batch, height, width, dim, each, threads):
    """How to cover maps of ``height`` and ``width`` with about ``threads`` threads that each hold ``each`` channels of
    a lane.

    Returns:
        tuple: the grid (blocks of channels, programs, 1); number of lanes; tiles of a program; whether the last block
        of channels is partial, the lanes in a tile, its channels; warps of a program.
    """
    divisor = dim & -dim
    block_c = min(divisor if divisor >= 32 else next_power_of_2(dim), 128)
    warps = max(1, block_c // 32)  # as many threads as channels: Triton then has each weight read by one thread
    block_p = 32 * warps * each // block_c
    channel_blocks = cdiv(dim, block_c)
    lanes = batch * cdiv(height, 2) * cdiv(width, 2)
    tiles = cdiv(lanes, block_p)
    tiles_each = cdiv(tiles * channel_blocks * 32 * warps, threads)
    constants = dim % block_c > 0, block_p, block_c
    return (channel_blocks, cdiv(tiles, tiles_each), 1), lanes, tiles_each, constants, warps


@triton.jit
def place(tile, lanes, height, width, BLOCK_P: tl.constexpr, WIDE: tl.constexpr):
    """Of the lanes of a tile, each (lanes, 1): their numbers and the first pixels of their squares (int64 if ``WIDE``),
    row and column of these, and which lanes exist."""
    lane = (tile * BLOCK_P + tl.arange(0, BLOCK_P))[:, None]
    here = lane < lanes
    columns = (width + 1) // 2
    rows = (height + 1) // 2
    across = lane // columns
    column = (lane - across * columns) * 2
    image = across // rows
    row = (across - image * rows) * 2
    if WIDE:
        image = image.to(tl.int64)
        lane = lane.to(tl.int64)
    return lane, (image * height + row) * width + column, row, column, here


@triton.jit
def relu(x):
    """In float32; NaN stays NaN, as in PyTorch."""
    return tl.maximum(x.to(tl.float32), 0.0, tl.PropagateNan.ALL)
