"""How a program goes over the maps. A *lane* is a pixel of the result, and the square of four pixels of the input whose
first is in the middle of its window: every pixel of the input is in one square. Lanes are numbered on from image to
image, so that they fill a program's tile whatever the width; a program goes on to a few neighbouring tiles."""
import functools

import triton
import triton.language as tl

from ..._core.triton_support import cdiv
from ...depthwise_conv.triton.stencil import cover


@functools.lru_cache
def plan(batch, height, width, dim, each, threads):
    """How to cover maps of ``height`` and ``width`` with about ``threads`` threads that each hold ``each`` channels of
    a lane.

    Returns:
        tuple: the grid (blocks of channels, programs, 1); number of lanes; tiles of a program; whether the last block
        of channels is partial, the lanes in a tile, its channels; warps of a program.
    """
    lanes = batch * cdiv(height, 2) * cdiv(width, 2)
    grid, tiles, constants, warps = cover(lanes, dim, each, threads)
    return grid, lanes, tiles, constants, warps


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
