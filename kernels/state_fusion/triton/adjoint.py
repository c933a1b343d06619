"""Gradient of the states: the adjoint of the stencil, of what a pixel's gradient times its ``C`` is.

Inside the map the adjoint gathers as the stencil does, with the weights turned by 180 degrees and zeros outside. A
pixel of the border stands for all those outside that are clamped onto it, so it gets what they would get as well.
"""
import triton
import triton.language as tl

from ..._core.triton_support import cdiv, launch
from .stencil import gather, load_taps, of_state, shift, strip_for, tile_for, widen

WARPS, REGISTERS = 4, 168
#: Pixels and channels of a program that works on the border.
_PIXELS, _CHANNELS = 16, 64


@triton.jit
def _load_row(grad, C, row, H, W, near_grad, near_C, exists, inside, ROW_G: tl.constexpr, ROW_C: tl.constexpr):
    """Gradients and ``C`` of the seven columns in a row; zeros outside of the map."""
    grads, scales = (), ()
    here = (row >= 0) & (row < H)
    for j in tl.static_range(7):
        grads = grads + (tl.load(grad + row * W * ROW_G + near_grad[j], mask=exists[j][:, None] & inside & here,
                                 other=0.0),)
        scales = scales + (tl.load(C + row * W * ROW_C + near_C[j], mask=exists[j] & here, other=0.0),)
    return grads, scales


@triton.jit
def _products(grads, scales):
    values = ()
    for j in tl.static_range(7):
        values = values + (widen(grads[j]) * scales[j][:, None].to(tl.float32),)
    return values


@triton.jit(do_not_specialize=['B', 'H', 'W', 'strip', 'units', 'each'])
def _interior(grad, C, taps, grad_h, B, H, W, strip, units, each, DIM: tl.constexpr, ROW_G: tl.constexpr,
              ROW_C: tl.constexpr, ROW_GH: tl.constexpr, LINES: tl.constexpr, CHANNELS: tl.constexpr,
              WIDE: tl.constexpr):
    """All pixels but those of the border, down the rows as in the forward pass."""
    blocks: tl.constexpr = (DIM + CHANNELS - 1) // CHANNELS
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    weights = load_taps(taps, channel, channel < DIM, DIM, True)
    channel = channel[None, :]
    inside = channel < DIM
    strips = tl.cdiv(H, strip)
    start = tl.program_id(0) // blocks * each
    for unit in range(start, tl.minimum(start + each, units)):
        line = unit // strips * LINES + tl.arange(0, LINES)
        first = unit % strips * strip
        real = line < B * W
        line = tl.minimum(line, B * W - 1)
        image = line // W
        column = line - image * W
        if WIDE:
            image = image.to(tl.int64)
            first = first.to(tl.int64)
        end = tl.minimum(first + strip, H)
        used = (real & (column > 0) & (column < W - 1))[:, None] & inside
        pixel = image * (H * W) + column
        near_grad, near_C, exists = (), (), ()
        for j in tl.static_range(7):
            near = pixel + shift(j)
            near_grad = near_grad + (near[:, None] * ROW_G + channel,)
            near_C = near_C + (near * ROW_C,)
            exists = exists + (real & (column + shift(j) >= 0) & (column + shift(j) < W),)
        sums = (tl.zeros([LINES, CHANNELS], tl.float32),) * 10
        for i in tl.static_range(5):
            grads, scales = _load_row(grad, C, first - 5 + i, H, W, near_grad, near_C, exists, inside, ROW_G, ROW_C)
            _, sums = gather(sums, weights, _products(grads, scales), -5, i - 5)
        grads, scales = _load_row(grad, C, first, H, W, near_grad, near_C, exists, inside, ROW_G, ROW_C)
        values = _products(grads, scales)
        for row in range(first, end + 5):
            grads, scales = _load_row(grad, C, row + 1, H, W, near_grad, near_C, exists, inside, ROW_G, ROW_C)
            done, sums = gather(sums, weights, values, -5, 5)
            at = row - 5
            stored = (at >= first) & (at > 0) & (at < H - 1)
            tl.store(grad_h + at * (W * ROW_GH) + pixel[:, None] * ROW_GH + channel,
                     done.to(grad_h.dtype.element_ty), mask=used & stored)
            values = _products(grads, scales)


@triton.jit
def _place(at, size, direction, distance, extra):
    """Along one side of the map: which pixel gives to the border pixel ``at`` by a tap in ``direction``, and whether it
    does. ``extra`` 0: the one that reads it; 1 and on: those that reach ``extra`` or more pixels beyond the border."""
    regular = at - direction * distance
    clamped = tl.where(direction < 0, extra - 1, size - extra)
    beyond = (at == tl.where(direction < 0, 0, size - 1)) & (clamped >= 0) & (clamped < size)
    place = tl.where(extra == 0, regular, clamped)
    return place, tl.where(extra == 0, (regular >= 0) & (regular < size), beyond)


@triton.jit(do_not_specialize=['B', 'H', 'W'])
def _border(grad, C, taps, grad_h, B, H, W, DIM: tl.constexpr, ROW_G: tl.constexpr, ROW_C: tl.constexpr,
            ROW_GH: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr):
    """The pixels of the border: first row, last row, then both ends of the rows between."""
    blocks: tl.constexpr = (DIM + CHANNELS - 1) // CHANNELS
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    in_d = channel < DIM
    each = 2 * W + 2 * tl.maximum(H - 2, 0)
    number = tl.program_id(0) // blocks * PIXELS + tl.arange(0, PIXELS)
    image = number // each
    number = number - image * each
    side = number - 2 * W
    row = tl.where(number < W, 0, tl.where(side < 0, H - 1, 1 + side // 2))
    column = tl.where(number < W, number, tl.where(side < 0, number - W, tl.where(side % 2 == 0, 0, W - 1)))
    used = (image < B) & ((number < W) | (H > 1)) & ((side < 0) | (side % 2 == 0) | (W > 1))
    if WIDE:
        image = image.to(tl.int64)
    start = image * (H * W)
    total = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for k in tl.static_range(3):
        for tap in range(0, 9):
            down = tap // 3 - 1
            right = tap % 3 - 1
            if tap != 4 or k == 0:
                index = tl.where(tap == 4, 24, 8 * k + tap - tl.where(tap > 4, 1, 0))
                w = tl.load(taps + index * DIM + channel, mask=in_d, other=0.0)[None, :]
                for i in range(0, 1 + (2 * k + 1) * tl.abs(down)):
                    r, from_row = _place(row, H, down, 2 * k + 1, i)
                    for j in range(0, 1 + (2 * k + 1) * tl.abs(right)):
                        c, from_column = _place(column, W, right, 2 * k + 1, j)
                        here = used & from_row & from_column
                        at = start + r * W + c
                        scale = tl.load(C + at * ROW_C, mask=here, other=0.0).to(tl.float32)
                        value = tl.load(grad + at[:, None] * ROW_G + channel[None, :],
                                        mask=here[:, None] & in_d[None, :], other=0.0).to(tl.float32)
                        total += w * (scale[:, None] * value)
    tl.store(grad_h + (start + row * W + column)[:, None] * ROW_GH + channel[None, :],
             total.to(grad_h.dtype.element_ty), mask=used[:, None] & in_d[None, :])


def adjoint(grad, C, taps, grad_h, row_g, row_c, wide):
    """Fill ``grad_h`` (batch, H, W, N, D), dense, from ``grad`` and ``C``; ``taps`` as :func:`weights_of_taps` returns
    them."""
    batch, height, width, d_state, dim = grad_h.shape
    lines, channels = tile_for(dim, WARPS)
    blocks, groups = cdiv(dim, channels), cdiv(batch * width, lines)
    strip = strip_for(height, blocks * groups, 1024)
    units = groups * cdiv(height, strip)
    each = cdiv(units * blocks, 4096)
    border = cdiv(batch * (2 * width + 2 * max(height - 2, 0)), _PIXELS) * cdiv(dim, _CHANNELS)
    for n in range(d_state):
        tensors = grad, of_state(C, 3, n), taps, of_state(grad_h, 3, n), batch, height, width
        if min(height, width) > 2:
            launch(_interior, (blocks * cdiv(units, each), 1, 1), *tensors, strip, units, each, dim, row_g,
                   row_c, d_state * dim, lines, channels, wide, num_warps=WARPS, maxnreg=REGISTERS)
        launch(_border, (border, 1, 1), *tensors, dim, row_g, row_c, d_state * dim, _PIXELS, _CHANNELS, wide,
               num_warps=4)
