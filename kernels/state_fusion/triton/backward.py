"""Backward: one pass for what needs the states around a pixel, one for the gradient of the states, and the sums."""
import torch
import triton
import triton.language as tl

from ..._core.triton_support import cdiv, launch
from .adjoint import adjoint
from .stencil import (
    TAPS,
    correlate,
    gather,
    is_wide,
    load_columns,
    load_taps,
    near_column,
    of_state,
    prefetch,
    rows_of,
    spread,
    strip_for,
    tile_for,
    weights_of_taps,
    widen,
    widen_columns,
)

# The first kernel has all registers that a thread can have, and as many programs as run at once on a large GPU.
SUMS_WARPS, SUMS_PROGRAMS = 4, 264


@triton.jit
def _load_entering(grad, C, x, row, end, W, pixel, channel, real, used, ROW_G: tl.constexpr, ROW_C: tl.constexpr,
                   ROW_X: tl.constexpr, FIRST: tl.constexpr):
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
def _enter(entering, grad_D, grad_x, skip, row, end, W, pixel, channel, used, DIM: tl.constexpr,
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


@triton.jit(do_not_specialize=['B', 'H', 'W', 'strip', 'units', 'each'])
def _sums_kernel(grad, h, C, x, taps, grad_x, grad_C, sums, B, H, W, strip, units, each, DIM: tl.constexpr,
                 ROW_G: tl.constexpr, ROW_H: tl.constexpr, ROW_C: tl.constexpr, ROW_X: tl.constexpr,
                 ROW_GC: tl.constexpr, FIRST: tl.constexpr, LINES: tl.constexpr, CHANNELS: tl.constexpr,
                 WIDE: tl.constexpr):
    """Of this state ``grad_C`` (its part from a block of channels), and this program's sums for taps and ``D``;
    ``grad_x`` for the ``FIRST`` state. A strip has at most ``CHANNELS`` rows."""
    MASKED: tl.constexpr = DIM % CHANNELS != 0
    blocks: tl.constexpr = (DIM + CHANNELS - 1) // CHANNELS
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
    sums += worker * (26 * DIM) + channel
    for t in tl.static_range(25):
        tl.store(sums + t * DIM, tl.sum(products[t], axis=0)[None, :], mask=inside)
    tl.store(sums + 25 * DIM, tl.sum(grad_D, axis=0)[None, :], mask=inside)


@triton.jit(do_not_specialize=['workers'])
def _finish_kernel(sums, kernel1, kernel3, kernel5, alpha, grad_kernel1, grad_kernel3, grad_kernel5, grad_D,
                   grad_alpha, workers, DIM: tl.constexpr, WORKERS: tl.constexpr, CHANNELS: tl.constexpr):
    """Of a tap and a block of channels: the sum over all pixels, from there to the kernels and a share of
    ``grad_alpha``."""
    t = tl.program_id(0) % 26
    channel = tl.program_id(0) // 26 * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < DIM
    total = tl.zeros([WORKERS, CHANNELS], tl.float32)
    for first in range(0, workers, WORKERS):
        worker = first + tl.arange(0, WORKERS)[:, None]
        total += tl.load(sums + (worker * 26 + t) * DIM + channel[None, :],
                         mask=(worker < workers) & inside[None, :], other=0.0)
    total = tl.sum(total, axis=0)
    if t == 25:
        tl.store(grad_D + channel, total.to(grad_D.dtype.element_ty), mask=inside)
    for k in tl.static_range(3):
        kernel = kernel1 if k == 0 else (kernel3 if k == 1 else kernel5)
        grad_kernel = grad_kernel1 if k == 0 else (grad_kernel3 if k == 1 else grad_kernel5)
        share = 0.0
        if (t // 8 == k and t < 24) or t == 24:
            place = channel * 9 + tl.where(t == 24, 4, t % 8 + (t % 8 > 3))
            share = tl.sum(tl.load(kernel + place, mask=inside, other=0.0).to(tl.float32) * total)
            scale = tl.load(alpha + k).to(tl.float32)
            tl.store(grad_kernel + place, (scale * total).to(grad_kernel.dtype.element_ty), mask=inside)
        tl.store(grad_alpha + tl.program_id(0) * 3 + k, share)


def backward(grad, h, C, x, D, kernel1, kernel3, kernel5, alpha):
    """Gradients of the eight tensors, in the dtype of each; that of ``alpha`` and, if there are several blocks of
    channels, of ``C`` in float32."""
    batch, height, width, d_state, dim = h.shape
    D, *kernels, alpha = (t.contiguous() for t in (D, kernel1, kernel3, kernel5, alpha))
    if x.numel() == 0:
        return [torch.zeros_like(t) for t in (h, C, x, D, *kernels, alpha)]

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device=x.device)

    grad_h, grad_C, grad_x, grad_D, *grad_kernels = (empty(*t.shape, dtype=t.dtype) for t in (h, C, x, D, *kernels))
    taps = weights_of_taps(D, kernels, alpha)
    (h, C, x, grad), (row_h, row_c, row_x, row_g) = rows_of(h, C, x, grad)
    wide = is_wide((h, C, x, grad), (row_h, row_c, row_x, row_g))

    lines, channels = tile_for(dim, SUMS_WARPS)
    blocks, groups = cdiv(dim, channels), cdiv(batch * width, lines)
    strip = strip_for(height, blocks * groups, 1024, longest=channels)
    units = groups * cdiv(height, strip)
    each = cdiv(units * blocks, SUMS_PROGRAMS)
    workers = cdiv(units, each)
    sums = empty(d_state, workers, TAPS, dim)
    parts = grad_C[None] if blocks == 1 else empty(blocks, *C.shape)
    for n in range(d_state):
        launch(
            _sums_kernel, (blocks * workers, 1, 1), grad, of_state(h, 3, n), of_state(C, 3, n), x, taps, grad_x,
            of_state(parts, 4, n),
            of_state(sums, 0, n), batch, height, width, strip, units, each, dim, row_g, d_state * row_h, row_c,
            row_x, d_state, n == 0, lines, channels, wide, num_warps=SUMS_WARPS)

    adjoint(grad, C, taps, grad_h, row_g, row_c, wide)

    shares = empty(TAPS * cdiv(dim, 64), 3)
    launch(
        _finish_kernel, (shares.shape[0], 1, 1), sums, *kernels, alpha, *grad_kernels, grad_D, shares,
        d_state * workers, dim, 32, 64, num_warps=4)
    return grad_h, grad_C if parts.shape[0] == 1 else parts.sum(0), grad_x, grad_D, *grad_kernels, shares.sum(0)
