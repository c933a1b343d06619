"""Forward: down the rows once, reading ``h``, ``C`` and ``x`` and writing ``y``."""
import torch
import triton
import triton.language as tl

from ..._core.triton_support import as_rows, cdiv, launch, unit_of
from ..._core.tuning import size_class, tiling
from .stencil import (
    PREFETCHED,
    gather,
    is_wide,
    load_columns,
    load_taps,
    near_column,
    of_state,
    prefetch,
    prefetch_first,
    spread,
    strip_for,
    tile_for,
    weights_of_taps,
    widen,
    widen_columns,
)

#: Warps, and registers of a thread.
_TILINGS = (8, 128), (4, 168), (4, 128)


@triton.jit
def _load_row(C, x, row, first, end, W, pixel, channel, used, ROW_C, ROW_X):
    """What it takes to finish a row besides its sum. Rows outside of the strip are finished, too, but not stored."""
    row = tl.minimum(tl.maximum(row, first), end - 1)
    scale = tl.load(C + row * (W * ROW_C) + pixel * ROW_C)
    return scale, tl.load(x + row * (W * ROW_X) + (pixel[:, None] * ROW_X + channel), mask=used)


@triton.jit
def _widen_row(scale, other):
    """Both in float32 for every channel: a loop keeps no layout but that of the sums."""
    other = widen(other)
    return tl.broadcast_to(scale[:, None].to(tl.float32), other.shape), other


@triton.jit
def _store_row(y, value, row, first, W, pixel, channel, used, DIM):
    place = row * (W * DIM) + (pixel[:, None] * DIM + channel)
    tl.store(y + place, value.to(y.dtype.element_ty), mask=used & (row >= first))


@triton.jit(do_not_specialize=['B', 'H', 'W', 'strip', 'units', 'each', 'dim', 'row_h', 'row_c', 'row_x'])
def _forward_kernel(h, C, x, taps, y, B, H, W, strip, units, each, dim, row_h, row_c, row_x, UNIT: tl.constexpr,
                    SKIP: tl.constexpr, LINES: tl.constexpr, CHANNELS: tl.constexpr, MASKED: tl.constexpr,
                    WIDE: tl.constexpr):
    """``y = C * fused + D * x``, or ``+ x`` without ``SKIP``. Numbers of channels, ``row_c`` apart, are in units."""
    DIM = dim * UNIT
    ROW_H = row_h * UNIT
    ROW_C = row_c
    ROW_X = row_x * UNIT
    blocks = tl.cdiv(DIM, CHANNELS)
    block = tl.program_id(0) % blocks
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    weights = load_taps(taps, channel, channel < DIM, DIM, False)
    skip = tl.load(taps + 25 * DIM + channel, mask=channel < DIM, other=0.0)[None, :] if SKIP else 1.0
    channel = channel[None, :]
    inside = channel < DIM
    strips = tl.cdiv(H, strip)
    start = tl.program_id(0) // blocks * each
    for unit in range(start, tl.minimum(start + each, units)):
        line = unit // strips * LINES + tl.arange(0, LINES)
        first = unit % strips * strip
        used = (line < B * W)[:, None] & inside
        line = tl.minimum(line, B * W - 1)
        image = line // W
        column = line - image * W
        if WIDE:
            image = image.to(tl.int64)
            first = first.to(tl.int64)
        end = tl.minimum(first + strip, H)
        pixel = image * (H * W) + column
        places = ()
        for j in tl.static_range(7):
            near = (image * (H * W) + near_column(column, j, W))[:, None]
            places = places + (near * ROW_H + channel,)
        stride = W * ROW_H
        h_ahead = pixel[:, None] * ROW_H + spread(block, CHANNELS)
        x_ahead = pixel[:, None] * ROW_X + spread(block, CHANNELS)
        prefetch_first(h, first, PREFETCHED - 1, H, stride, h_ahead, MASKED)

        sums = (tl.zeros([LINES, CHANNELS], tl.float32),) * 10
        for i in tl.static_range(5):
            above = load_columns(h + tl.maximum(first - 5 + i, 0) * stride, places, inside, MASKED)
            _, sums = gather(sums, weights, widen_columns(above), -5, i - 5)
        values = widen_columns(load_columns(h + first * stride, places, inside, MASKED))
        scale_ahead, other_ahead = _load_row(C, x, first - 5, first, end, W, pixel, channel, used, ROW_C, ROW_X)
        scale, other = _widen_row(scale_ahead, other_ahead)
        for row in range(first, end):
            prefetch(h, row, H, stride, h_ahead, MASKED)
            prefetch(x, row, H, W * ROW_X, x_ahead, MASKED)
            ahead = load_columns(h + tl.minimum(row + 1, H - 1) * stride, places, inside, MASKED)
            scale_ahead, other_ahead = _load_row(C, x, row - 4, first, end, W, pixel, channel, used, ROW_C, ROW_X)
            fused, sums = gather(sums, weights, values, -5, 5)
            _store_row(y, scale * fused + skip * other, row - 5, first, W, pixel, channel, used, DIM)
            values = widen_columns(ahead)
            scale, other = _widen_row(scale_ahead, other_ahead)
        for i in tl.static_range(5):
            ahead = load_columns(h + tl.minimum(end + i + 1, H - 1) * stride, places, inside, MASKED)
            scale_ahead, other_ahead = _load_row(C, x, end + i - 4, first, end, W, pixel, channel, used, ROW_C, ROW_X)
            fused, sums = gather(sums, weights, values, i + 1, 5)
            _store_row(y, scale * fused + skip * other, end + i - 5, first, W, pixel, channel, used, DIM)
            values = widen_columns(ahead)
            scale, other = _widen_row(scale_ahead, other_ahead)


def forward(h, C, x, D, kernel1, kernel3, kernel5, alpha, tiles=None):
    """``y`` in the dtype of ``x``."""
    batch, height, width, d_state, dim = h.shape
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if tiles is None:
        tiles = tiling('state_fusion forward', (dim, size_class(height), size_class(batch * width)), _TILINGS, h,
                       lambda t: forward(h, C, x, D, kernel1, kernel3, kernel5, alpha, t))
    warps, registers = tiles
    D, *kernels, alpha = [t.contiguous() for t in (D, kernel1, kernel3, kernel5, alpha)]
    taps = weights_of_taps(D, kernels, alpha)
    (h, row_h), (C, row_c), (x, row_x) = as_rows(h, 4), as_rows(C, 3), as_rows(x, 3)
    row_h *= d_state
    wide = is_wide(batch * height * width, d_state * dim, row_h, row_c, row_x)
    unit = unit_of(dim, row_h, row_x)
    lines, channels = tile_for(dim, warps)
    blocks, groups = cdiv(dim, channels), cdiv(batch * width, lines)
    strip = strip_for(height, blocks * groups, 1024)
    units = groups * cdiv(height, strip)
    each = cdiv(units * blocks, 4096)
    y, dtype = x, x.dtype
    for n in range(d_state):  # each state adds to what those before it have come to
        x, row_x = y, dim if n else row_x
        y = x.new_empty(x.shape, dtype=dtype if n == d_state - 1 else torch.float32)
        launch(_forward_kernel, (blocks * cdiv(units, each), 1, 1), of_state(h, 3, n), of_state(C, 3, n), x, taps,
               y, batch, height, width, strip, units, each, dim // unit, row_h // unit, row_c, row_x // unit, unit,
               n == 0, lines, channels, dim % channels > 0, wide, num_warps=warps, maxnreg=registers)
    return y
