"""Gradient of the states: the adjoint of the stencil, of what a pixel's gradient times its ``C`` is.

Inside the map the adjoint gathers as the stencil does, with the weights turned by 180 degrees and zeros outside. A
pixel of the border stands for all those outside that are clamped onto it, so it gets what they would get as well. For
the first and the last row this is added up while the rows next to them pass by; the first and the last column have
programs of their own, whose outer columns are sums over the columns next to the border.
"""
import triton
import triton.language as tl

from ..._core.triton_support import cdiv, launch, unit_of
from ..._core.tuning import size_class, tiling
from .stencil import (
    PREFETCHED,
    fold,
    gather,
    keep_column,
    load_columns,
    load_taps,
    of_state,
    prefetch,
    prefetch_first,
    put,
    shift,
    spread,
    strip_for,
    tile_for,
    widen,
)

#: Warps, and registers of a thread.
_TILINGS = (4, 168), (4, 128), (8, 128)


@triton.jit
def _load_row(grad, C, row, W, places, C_places, exists, inside, ROW_G, ROW_C, MASKED: tl.constexpr,
              BORDER: tl.constexpr):
    """Gradients and ``C`` of seven columns; of those of the ``BORDER`` that are outside of the map, ``C`` is 0."""
    grads = load_columns(grad + row * (W * ROW_G), places, inside, MASKED)
    scales = ()
    for j in tl.static_range(7):
        place = C + row * (W * ROW_C) + C_places[j]
        if BORDER:
            scales = scales + (tl.load(place, mask=exists[j], other=0.0),)
        else:
            scales = scales + (tl.load(place),)
    return grads, scales


@triton.jit
def _products(loaded, BORDER: tl.constexpr):
    """Gradients of the fused states in the seven columns that a tile reads. For a column of the ``BORDER`` the loads
    are those from there inwards; a column outside then stands for all from the border to the one as far inside, whose
    taps were clamped."""
    grads, scales = loaded
    values = ()
    for j in tl.static_range(7):
        values = values + (widen(grads[j]) * scales[j][:, None].to(tl.float32),)
    if BORDER:
        one = values[0] + values[1]
        three = one + (values[2] + values[3])
        five = three + (values[4] + values[5])
        values = five, three, one, values[0], one, three, five
    return values


@triton.jit
def _strip(grad, C, taps, grad_h, unit, block, B, H, W, strip, DIM, ROW_G, ROW_C, ROW_GH, LINES: tl.constexpr,
           CHANNELS: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr, BORDER: tl.constexpr):
    """``grad_h`` of a strip of rows, in columns of the border or in columns between."""
    strips = tl.cdiv(H, strip)
    columns = 2 if BORDER else W - 2
    line = unit // strips * LINES + tl.arange(0, LINES)
    first = unit % strips * strip
    used = line < B * columns
    line = tl.minimum(line, B * columns - 1)
    image = line // columns
    column = line - image * columns
    if BORDER:
        used &= column < W  # a map of one column has only one border
        column *= W - 1
    else:
        column += 1
    if WIDE:
        image = image.to(tl.int64)
        first = first.to(tl.int64)
    end = tl.minimum(first + strip, H)
    pixel = image * (H * W) + column
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    weights = load_taps(taps, channel, channel < DIM, DIM, True)
    channel = channel[None, :]
    inside = channel < DIM
    places, C_places, exists = (), (), ()
    for j in tl.static_range(7):
        away = tl.where(column == 0, j, -j) if BORDER else shift(j)
        here = (column + away >= 0) & (column + away < W)
        near = pixel + tl.where(here, away, 0)
        places = places + (near[:, None] * ROW_G + channel,)
        C_places = C_places + (near * ROW_C,)
        exists = exists + (here,)
        if BORDER:
            here = column == (W - 1 if j < 3 else 0)
        if j != 3:
            weights = keep_column(weights, j, here[:, None])

    zero = tl.zeros([LINES, CHANNELS], tl.float32)
    sums = (zero,) * 10
    above = zero
    below = zero
    place = pixel[:, None] * ROW_GH + channel
    used = used[:, None] & inside
    grad_ahead = pixel[:, None] * ROW_G + spread(block, CHANNELS)
    start = tl.maximum(first - 5, 0)
    stop = tl.minimum(end + 5, H)
    prefetch_first(grad, start, PREFETCHED - 1, H, W * ROW_G, grad_ahead, MASKED)
    values = _products(_load_row(grad, C, start, W, places, C_places, exists, inside, ROW_G, ROW_C, MASKED, BORDER),
                       BORDER)
    for row in range(start, stop):
        prefetch(grad, row, H, W * ROW_G, grad_ahead, MASKED)
        ahead = _load_row(grad, C, tl.minimum(row + 1, H - 1), W, places, C_places, exists, inside, ROW_G, ROW_C,
                          MASKED, BORDER)
        if row < 5:  # its taps above the map were clamped to row 0
            above = fold(above, weights, values, row, 2)
            sums = put(sums, 1, sums[1] + tl.where(row == 4, above, 0.0))
        if row >= H - 5:  # those below the map, to row H - 1
            below = fold(below, weights, values, H - 1 - row, 0)
        result, sums = gather(sums, weights, values, -5, 5)
        tl.store(grad_h + (row - 5) * (W * ROW_GH) + place, result.to(grad_h.dtype.element_ty),
                 mask=used & (row - 5 >= first))
        values = _products(ahead, BORDER)
    for i in tl.static_range(5):  # rows that wait for some below the map
        row = stop - 5 + i
        result = sums[i] + tl.where((row == 0) & (H < 5), above, 0.0)
        if i == 4:
            result += below
        tl.store(grad_h + row * (W * ROW_GH) + place, result.to(grad_h.dtype.element_ty),
                 mask=used & (row >= first) & (row < end))


@triton.jit
def _add_shares(shares, grad_alpha, number):
    """``grad_alpha`` from what every program that had gradients of the kernels knows of it: (number, 3)."""
    k = tl.arange(0, 4)
    total = tl.zeros([128, 4], tl.float32)
    for first in range(0, number, 128):
        place = first + tl.arange(0, 128)[:, None]
        total += tl.load(shares + place * 3 + k[None, :], mask=(place < number) & (k < 3)[None, :], other=0.0)
    tl.store(grad_alpha + k, tl.sum(total, axis=0).to(grad_alpha.dtype.element_ty), mask=k < 3)


@triton.jit(do_not_specialize=['number', 'B', 'H', 'W', 'strip', 'border', 'dim', 'row_g', 'row_c', 'row_gh'])
def _adjoint_kernel(grad, C, taps, grad_h, shares, grad_alpha, number, B, H, W, strip, border, dim, row_g, row_c,
                    row_gh, UNIT: tl.constexpr, LINES: tl.constexpr, CHANNELS: tl.constexpr, MASKED: tl.constexpr,
                    WIDE: tl.constexpr):
    """The first programs have the columns of the ``border``, the others those between. The very first also finishes
    ``grad_alpha``, which would be a launch of its own otherwise."""
    if tl.program_id(0) == 0:
        _add_shares(shares, grad_alpha, number)
    DIM = dim * UNIT
    blocks = tl.cdiv(DIM, CHANNELS)
    block = tl.program_id(0) % blocks
    unit = tl.program_id(0) // blocks
    if unit < border:
        _strip(grad, C, taps, grad_h, unit, block, B, H, W, strip, DIM, row_g * UNIT, row_c, row_gh * UNIT, LINES,
               CHANNELS, MASKED, WIDE, True)
    else:
        _strip(grad, C, taps, grad_h, unit - border, block, B, H, W, strip, DIM, row_g * UNIT, row_c, row_gh * UNIT,
               LINES, CHANNELS, MASKED, WIDE, False)


def adjoint(grad, C, taps, grad_h, shares, grad_alpha, row_g, row_c, wide, tiles=None):
    """Fill ``grad_h`` (batch, H, W, N, D), dense, from ``grad`` and ``C``, ``taps`` as :func:`weights_of_taps` returns
    them; and ``grad_alpha`` from its ``shares``."""
    batch, height, width, d_state, dim = grad_h.shape
    if tiles is None:
        tiles = tiling('state_fusion adjoint', (dim, size_class(height), size_class(batch * width)), _TILINGS, grad,
                       lambda t: adjoint(grad, C, taps, grad_h, shares, grad_alpha, row_g, row_c, wide, t))
    warps, registers = tiles
    unit = unit_of(dim, row_g)
    lines, channels = tile_for(dim, warps)
    blocks, between = cdiv(dim, channels), cdiv(batch * max(width - 2, 0), lines)
    border = cdiv(batch * 2, lines)
    strip = strip_for(height, blocks * (border + between), 1024)
    strips = cdiv(height, strip)
    for n in range(d_state):
        launch(_adjoint_kernel, (blocks * (border + between) * strips, 1, 1), grad, of_state(C, 3, n), taps,
               of_state(grad_h, 3, n), shares, grad_alpha, shares.shape[0], batch, height, width, strip,
               border * strips, dim // unit, row_g // unit, row_c, d_state * dim // unit, unit, lines, channels,
               dim % channels > 0, wide, num_warps=warps, maxnreg=registers)
