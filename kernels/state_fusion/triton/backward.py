"""Backward: one pass for what needs the states around a pixel, one for the gradient of the states, and the sums."""
import torch
import triton
import triton.language as tl

from ..._core.triton_support import as_rows, cdiv, launch, unit_of
from ..._core.tuning import size_class, tiling
from .adjoint import adjoint
from .stencil import (
    PREFETCHED,
    correlate,
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

# The first kernel has all registers that a thread can have, and as many programs as run at once on a large GPU.
_TILINGS = (4, 264), (4, 528), (8, 132)  # warps, programs


@triton.jit
def _load_entering(grad, C, x, row, end, W, pixel, channel, real, used, ROW_G, ROW_C, ROW_X,
                   FIRST: tl.constexpr):
    """What a row of pixels brings along: gradient, ``C``, ``x``; zeros below the strip."""
    exists = row < end
    value = tl.load(grad + row * (W * ROW_G) + (pixel[:, None] * ROW_G + channel), mask=used & exists, other=0.0)
    scale = tl.load(C + row * (W * ROW_C) + pixel * ROW_C, mask=real & exists, other=0.0)
    if FIRST:
        other = tl.load(x + row * (W * ROW_X) + (pixel[:, None] * ROW_X + channel), mask=used & exists, other=0.0)
    else:
        other = value
    return value, scale, other


@triton.jit
def _widen_entering(entering):
    value = widen(entering[0])
    return value, tl.broadcast_to(entering[1][:, None].to(tl.float32), value.shape), widen(entering[2])


@triton.jit
def _enter(entering, grad_D, grad_x, skip, row, end, W, pixel, channel, used, DIM,
           FIRST: tl.constexpr):
    """Gradient of the fused states of a row. What depends on no other pixel is done with here."""
    value, scale, other = entering
    if FIRST:
        place = row * (W * DIM) + (pixel[:, None] * DIM + channel)
        tl.store(grad_x + place, (skip * value).to(grad_x.dtype.element_ty), mask=used & (row < end))
        grad_D += value * other
    return value * scale, grad_D


@triton.jit
def _leave(parts, value, fused, index):
    """Put a row's sum over the channels into place ``index`` of ``parts``, which keeps it for one store of all."""
    part = tl.sum(value * fused, axis=1)[:, None]
    return tl.where(tl.arange(0, parts.shape[1])[None, :] == index, part, parts)


@triton.jit
def _add(a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15, a16, a17, a18, a19, a20, a21, a22,
         a23, a24, a25, b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11, b12, b13, b14, b15, b16, b17,
         b18, b19, b20, b21, b22, b23, b24, b25):
    """26 pairs: sums that the warps exchange all at once."""
    return (a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7, a8 + b8, a9 + b9, a10 + b10,
            a11 + b11, a12 + b12, a13 + b13, a14 + b14, a15 + b15, a16 + b16, a17 + b17, a18 + b18, a19 + b19,
            a20 + b20, a21 + b21, a22 + b22, a23 + b23, a24 + b24, a25 + b25)


@triton.jit(do_not_specialize=['B', 'H', 'W', 'strip', 'units', 'each', 'entry', 'dim', 'row_g', 'row_h', 'row_c',
                               'row_x', 'row_gc'])
def _sums_kernel(grad, h, C, x, taps, grad_x, grad_C, B, H, W, strip, units, each, entry, dim, row_g, row_h, row_c,
                 row_x, row_gc, UNIT: tl.constexpr, FIRST: tl.constexpr, LINES: tl.constexpr, CHANNELS: tl.constexpr,
                 MASKED: tl.constexpr, WIDE: tl.constexpr):
    """Of this state ``grad_C`` (its part from a block of channels), and this program's sums for taps and ``D``, which
    go to where ``taps`` has those after ``entry``; ``grad_x`` for the ``FIRST`` state. A strip has at most
    ``CHANNELS`` rows."""
    DIM = dim * UNIT
    ROW_G = row_g * UNIT
    ROW_H = row_h * UNIT
    ROW_C = row_c
    ROW_X = row_x * UNIT
    ROW_GC = row_gc
    blocks = tl.cdiv(DIM, CHANNELS)
    block = tl.program_id(0) % blocks
    worker = tl.program_id(0) // blocks
    lane = tl.arange(0, CHANNELS)
    channel = block * CHANNELS + lane
    weights = load_taps(taps, channel, channel < DIM, DIM, False)
    skip = tl.load(taps + 25 * DIM + channel, mask=channel < DIM, other=0.0)[None, :]
    lane = lane[None, :]
    channel = channel[None, :]
    inside = channel < DIM
    strips = tl.cdiv(H, strip)
    stride = W * ROW_H
    products = (tl.zeros([LINES, CHANNELS], tl.float32),) * 25
    grad_D = tl.zeros([LINES, CHANNELS], tl.float32)
    for unit in range(worker * each, tl.minimum(worker * each + each, units)):
        line = unit // strips * LINES + tl.arange(0, LINES)
        first = unit % strips * strip
        real = line < B * W
        used = real[:, None] & inside
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
        h_ahead = pixel[:, None] * ROW_H + spread(block, CHANNELS)
        grad_ahead = pixel[:, None] * ROW_G + spread(block, CHANNELS)
        x_ahead = pixel[:, None] * ROW_X + spread(block, CHANNELS)
        prefetch_first(h, first, PREFETCHED - 1, H, stride, h_ahead, MASKED)
        prefetch_first(grad, first, PREFETCHED + 4, H, W * ROW_G, grad_ahead, MASKED)
        if FIRST:
            prefetch_first(x, first, PREFETCHED + 4, H, W * ROW_X, x_ahead, MASKED)

        fused = (tl.zeros([LINES, CHANNELS], tl.float32),) * 10
        factors = (tl.zeros([LINES, CHANNELS], tl.float32),) * 10
        parts = tl.zeros([LINES, CHANNELS], tl.float32)
        for i in tl.static_range(5):
            above = load_columns(h + tl.maximum(first - 5 + i, 0) * stride, places, inside, MASKED)
            above = widen_columns(above)
            arrived = _load_entering(grad, C, x, first + i, end, W, pixel, channel, real, used, ROW_G, ROW_C, ROW_X,
                                     FIRST)
            factor, grad_D = _enter(_widen_entering(arrived), grad_D, grad_x, skip, first + i, end, W, pixel, channel,
                                    used, DIM, FIRST)
            factors = factors + (factor,)
            products = correlate(products, factors, above, -5, i - 5)
            factors = factors[1:]
            _, fused = gather(fused, weights, above, -5, i - 5)
        values = widen_columns(load_columns(h + first * stride, places, inside, MASKED))
        entering = _widen_entering(_load_entering(grad, C, x, first + 5, end, W, pixel, channel, real, used, ROW_G,
                                                  ROW_C, ROW_X, FIRST))
        leaving = tl.zeros([LINES, CHANNELS], tl.float32)
        for row in range(first, end):
            prefetch(h, row, H, stride, h_ahead, MASKED)
            prefetch(grad, row + 5, H, W * ROW_G, grad_ahead, MASKED)
            if FIRST:
                prefetch(x, row + 5, H, W * ROW_X, x_ahead, MASKED)
            ahead = load_columns(h + tl.minimum(row + 1, H - 1) * stride, places, inside, MASKED)
            next_in = _load_entering(grad, C, x, row + 6, end, W, pixel, channel, real, used, ROW_G, ROW_C, ROW_X,
                                     FIRST)
            next_out = tl.load(grad + tl.maximum(row - 4, first) * (W * ROW_G) + (pixel[:, None] * ROW_G + channel),
                               mask=used, other=0.0)
            factor, grad_D = _enter(entering, grad_D, grad_x, skip, row + 5, end, W, pixel, channel, used, DIM,
                                    FIRST)
            factors = factors + (factor,)
            products = correlate(products, factors, values, -5, 5)
            factors = factors[1:]
            finished, fused = gather(fused, weights, values, -5, 5)
            parts = _leave(parts, leaving, finished, row - 5 - first)
            values = widen_columns(ahead)
            entering = _widen_entering(next_in)
            leaving = widen(next_out)
        for i in tl.static_range(5):
            below = load_columns(h + tl.minimum(end + i, H - 1) * stride, places, inside, MASKED)
            below = widen_columns(below)
            last = tl.load(grad + tl.maximum(end + i - 5, first) * (W * ROW_G) + (pixel[:, None] * ROW_G + channel),
                           mask=used, other=0.0)
            factors = factors + (tl.zeros([LINES, CHANNELS], tl.float32),)
            products = correlate(products, factors, below, i + 1, 5)
            factors = factors[1:]
            finished, fused = gather(fused, weights, below, i + 1, 5)
            parts = _leave(parts, widen(last), finished, end + i - 5 - first)
        place = block * (B * H).to(pixel.dtype) * (W * ROW_GC) + (first + lane) * (W * ROW_GC)
        tl.store(grad_C + place + pixel[:, None] * ROW_GC, parts.to(grad_C.dtype.element_ty),
                 mask=real[:, None] & (first + lane < end))
    # The first line of threads writes: in a layout of their own, every sum would be exchanged between warps once more.
    line = tl.arange(0, LINES)[:, None]
    sums = taps + (entry + worker) * (26 * DIM) + channel + 0 * line
    totals = tl.reduce(products + (grad_D,), 0, _add)
    for t in tl.static_range(26):
        tl.store(sums + t * DIM, tl.broadcast_to(totals[t][None, :], sums.shape), mask=inside & (line == 0))


@triton.jit
def _finish_tap(taps, kernels, alpha, grad_kernels, grad_D, shares, program, workers, DIM, WORKERS: tl.constexpr,
                CHANNELS: tl.constexpr):
    """Of a tap and a block of channels: the sum over all pixels, of which the entries of ``taps`` after the first are
    parts, from there to the kernels and a share of ``grad_alpha``."""
    t = program % 26
    channel = program // 26 * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < DIM
    total = tl.zeros([WORKERS, CHANNELS], tl.float32)
    for first in range(0, workers, WORKERS):
        worker = first + tl.arange(0, WORKERS)[:, None]
        total += tl.load(taps + ((1 + worker) * 26 + t) * DIM + channel[None, :],
                         mask=(worker < workers) & inside[None, :], other=0.0)
    total = tl.sum(total, axis=0)
    if t == 25:
        tl.store(grad_D + channel, total.to(grad_D.dtype.element_ty), mask=inside)
    for k in tl.static_range(3):
        share = 0.0
        if (t // 8 == k and t < 24) or t == 24:
            place = channel * 9 + tl.where(t == 24, 4, t % 8 + (t % 8 > 3))
            share = tl.sum(tl.load(kernels[k] + place, mask=inside, other=0.0).to(tl.float32) * total)
            scale = tl.load(alpha + k).to(tl.float32)
            tl.store(grad_kernels[k] + place, (scale * total).to(grad_kernels[k].dtype.element_ty), mask=inside)
        tl.store(shares + program * 3 + k, share)


@triton.jit
def _finish_C(parts, grad_C, program, blocks, places, states, row, PLACES: tl.constexpr):
    """``grad_C``, rows of ``states`` numbers, from the ``blocks`` of channels."""
    place = program * PLACES + tl.arange(0, PLACES)
    inside = place < places
    total = tl.zeros([PLACES], tl.float32)
    for _ in range(blocks):
        total += tl.load(parts + place, mask=inside, other=0.0)
        parts += places
    place = (place // states).to(tl.int64) * row + place % states
    tl.store(grad_C + place, total.to(grad_C.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=['workers', 'dim', 'blocks', 'places', 'states', 'row_gc'])
def _finish_kernel(taps, kernel1, kernel3, kernel5, alpha, grad_kernel1, grad_kernel3, grad_kernel5, grad_D, shares,
                   parts, grad_C, workers, dim, blocks, places, states, row_gc, UNIT: tl.constexpr,
                   WORKERS: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr):
    """The sums over programs. The first ones have a tap and some channels, the others some ``PLACES`` in ``grad_C``."""
    DIM = dim * UNIT
    first = 26 * tl.cdiv(DIM, CHANNELS)
    if tl.program_id(0) < first:
        _finish_tap(taps, (kernel1, kernel3, kernel5), alpha, (grad_kernel1, grad_kernel3, grad_kernel5), grad_D,
                    shares, tl.program_id(0), workers, DIM, WORKERS, CHANNELS)
    else:
        _finish_C(parts, grad_C, tl.program_id(0) - first, blocks, places, states, row_gc, PLACES)


def backward(grad, h, C, x, D, kernel1, kernel3, kernel5, alpha, grad_C=None, tiles=None):
    """Gradients of the eight tensors, in the dtype of each. ``grad_C``: where to put that of ``C``, rows of states
    evenly spaced."""
    batch, height, width, d_state, dim = h.shape
    if x.numel() == 0:
        return [torch.zeros_like(t) for t in (h, C, x, D, kernel1, kernel3, kernel5, alpha)]
    if tiles is None:
        tiles = tiling('state_fusion backward', (dim, size_class(height), size_class(batch * width)), _TILINGS, h,
                       lambda t: backward(grad, h, C, x, D, kernel1, kernel3, kernel5, alpha, grad_C, t))
    warps, programs = tiles
    D, *kernels, alpha = [t.contiguous() for t in (D, kernel1, kernel3, kernel5, alpha)]
    grad_h, grad_x = h.new_empty(h.shape), x.new_empty(x.shape)
    grad_C, row_gc = as_rows(C.new_empty(C.shape) if grad_C is None else grad_C, 3)
    grad_D, *grad_kernels, grad_alpha = [torch.empty_like(t) for t in (D, *kernels, alpha)]
    (h, row_h), (C, row_c), (x, row_x), (grad, row_g) = as_rows(h, 4), as_rows(C, 3), as_rows(x, 3), as_rows(grad, 3)
    row_h *= d_state
    pixels = batch * height * width
    wide = is_wide(pixels, d_state * dim, row_h, row_c, row_x, row_g, row_gc)
    unit = unit_of(dim, row_h, row_x, row_g)

    lines, channels = tile_for(dim, warps)
    blocks, groups = cdiv(dim, channels), cdiv(batch * width, lines)
    strip = strip_for(height, blocks * groups, 1024, longest=channels)
    units = groups * cdiv(height, strip)
    each = cdiv(units * blocks, programs)
    workers = cdiv(units, each)
    taps = weights_of_taps(D, kernels, alpha, 1 + d_state * workers)
    parts = grad_C if blocks == 1 else taps.new_empty((blocks, *C.shape))
    for n in range(d_state):
        launch(_sums_kernel, (blocks * workers, 1, 1), grad, of_state(h, 3, n), of_state(C, 3, n), x, taps, grad_x,
               of_state(parts, -1, n), batch, height, width, strip, units, each, 1 + n * workers, dim // unit,
               row_g // unit, row_h // unit, row_c, row_x // unit, row_gc if blocks == 1 else d_state, unit, n == 0,
               lines, channels, dim % channels > 0, wide, num_warps=warps)

    tap_programs, places = 26 * cdiv(dim, 64), pixels * d_state
    shares = taps.new_empty((tap_programs, 3))
    launch(_finish_kernel, (tap_programs + (cdiv(places, 1024) if blocks > 1 else 0), 1, 1), taps, *kernels, alpha,
           *grad_kernels, grad_D, shares, parts, grad_C, d_state * workers, dim // unit, blocks, places,
           d_state, row_gc, unit, 32, 64, 1024, num_warps=4)
    adjoint(grad, C, taps, grad_h, shares, grad_alpha, row_g, row_c, wide)
    return grad_h, grad_C, grad_x, grad_D, *grad_kernels, grad_alpha
