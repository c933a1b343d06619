"""How a program of the 3x3 kernels goes over the maps.

A *lane* is a column of ``ROWS`` pixels, one below the other, with some channels. It reads its pixels and all around
them at once, so that many loads are under way and a row read serves up to three rows of results; what lies to the
left and right the first-level cache has from other lanes. Lanes are numbered on from image to image, so that they fill
a program's tile whatever the width. Programs go on to a few neighbouring tiles, with the weights in registers.
"""
import functools

import triton
import triton.language as tl

from ..._core.triton_support import cdiv, next_power_of_2

_SMALL = 2 ** 20


@functools.lru_cache
def plan(batch, height, width, dim, each, threads):
    """How to cover the maps with about ``threads`` threads that each hold ``each`` channels of a lane.

    Returns:
        tuple: the grid (blocks of channels, programs, 1); number of lanes; tiles of a program; whether the last block
        of channels is partial, rows and number of the lanes in a tile, its channels; warps of a program.
    """
    rows = 4 if batch * height * width * dim >= _SMALL else 2
    lanes = batch * cdiv(height, rows) * width
    grid, tiles, (masked, *block), warps = cover(lanes, dim, each, threads)
    return grid, lanes, tiles, (masked, rows, *block), warps


def cover(lanes, dim, each, threads):
    """As :func:`plan` for a number of lanes: the grid; tiles of a program; whether the last block of channels is
    partial, lanes in a tile, its channels; warps of a program."""
    divisor = dim & -dim
    block_c = min(divisor if divisor >= 32 else next_power_of_2(dim), 128)
    warps = max(1, block_c // 32)  # as many threads as channels: Triton then has each weight read by one thread
    block_p = 32 * warps * each // block_c
    channel_blocks, tiles = cdiv(dim, block_c), cdiv(lanes, block_p)
    tiles_each = cdiv(tiles * channel_blocks * 32 * warps, threads)
    return (channel_blocks, cdiv(tiles, tiles_each), 1), tiles_each, (dim % block_c > 0, block_p, block_c), warps


@triton.jit
def add_pairs(a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, b0, b1, b2, b3, b4, b5, b6, b7, b8, b9):
    """Ten sums at once, for ``tl.reduce``."""
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7, a8 + b8, a9 + b9


@triton.jit
def place(tile, lanes, height, width, ROWS: tl.constexpr, BLOCK_P: tl.constexpr, WIDE: tl.constexpr):
    """Of the lanes of a tile: the first pixel (int64 if ``WIDE``), its row, which lanes exist, and which have a column
    to the left and to the right; each (lanes, 1)."""
    lane = (tile * BLOCK_P + tl.arange(0, BLOCK_P))[:, None]
    across = lane // width
    column = lane - across * width
    groups = (height + ROWS - 1) // ROWS
    image = across // groups
    row = (across - image * groups) * ROWS
    if WIDE:
        image = image.to(tl.int64)
    pixel = (image * height + row) * width + column
    exists = lane < lanes
    return pixel, row, exists, exists & (column > 0), exists & (column + 1 < width)


@triton.jit
def channel_mask(channel, DIM, MASKED: tl.constexpr):
    """Which channels exist, as a row to combine with a column of lanes. Unless ``MASKED`` all do."""
    if MASKED:
        mask = (channel < DIM)[None, :]
    else:
        mask = tl.full((1, channel.shape[0]), True, tl.int1)
    return mask


@triton.jit
def load_taps(weight, channel, DIM, RESIDUAL: tl.constexpr):
    """The nine weights of ``channel``, row by row, each (1, channels); with ``RESIDUAL`` those of ``conv(x) + x``.
    """
    taps = ()
    for k in tl.static_range(9):
        tap = tl.load(weight + channel * 9 + k, mask=channel < DIM, other=0.0).to(tl.float32)
        if RESIDUAL and k == 4:
            tap += 1
        taps = taps + (tap[None, :], )
    return taps


@triton.jit
def load_around(x, at, row, height, down, left, middle, right, STRIDE, ROWS: tl.constexpr):
    """The pixels of the lanes, which begin ``at`` some place in ``x``, and those around them, zero outside of the maps:
    for each row from the one above to the one below, (left, here, right)."""
    pixels = ()
    for i in tl.static_range(ROWS + 2):
        exists = (row + (i - 1) >= 0) & (row + (i - 1) < height)
        pixels = pixels + ((tl.load(x + (at + ((i - 1) * down - 1) * STRIDE), mask=left & exists, other=0.0),
                            tl.load(x + (at + (i - 1) * down * STRIDE), mask=middle & exists, other=0.0),
                            tl.load(x + (at + ((i - 1) * down + 1) * STRIDE), mask=right & exists, other=0.0)), )
    return pixels
