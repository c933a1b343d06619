"""Gradients: of the value before the activation by the forward's kernel, of all else by a second, whose sums a
third one adds up."""
import torch
import triton
import triton.language as tl

from ..._core.partial_sums import add_up
from ..._core.triton_support import as_rows, cdiv, launch, unit_of
from .forward import convolve
from .stencil import add_pairs, channel_mask, load_around, load_taps, place, plan

_THREADS = 132 * 1024  # two for each that an H100 holds at a time


@triton.jit(do_not_specialize=['lanes', 'height', 'width', 'tiles', 'dim', 'grad_stride', 'x_stride',
                               'residual_stride', 'grad_x_stride'])
def _kernel(grad, x, weight, residual, grad_x, partials, lanes, height, width, tiles, dim, grad_stride, x_stride,
            residual_stride, grad_x_stride, UNIT: tl.constexpr, SAME: tl.constexpr, MASKED: tl.constexpr,
            ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    """``grad_x``: the convolution of ``grad`` with the weights flipped, plus ``residual``, or plus ``grad`` if
    ``SAME``. A program's sums for the weights and the bias go to its row of ``partials``, (programs, 10 * DIM)."""
    DIM = dim * UNIT
    GRAD_STRIDE = grad_stride * UNIT
    X_STRIDE = x_stride * UNIT
    RESIDUAL_STRIDE = residual_stride * UNIT
    GRAD_X_STRIDE = grad_x_stride * UNIT
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channels = channel_mask(channel, DIM, MASKED)
    taps = load_taps(weight, channel, DIM, SAME)
    zero = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sums = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)  # the last for the bias
    down = width.to(tl.int64) if WIDE else width
    for tile in range(tl.program_id(1) * tiles, tl.program_id(1) * tiles + tiles):
        pixel, row, here, left, right = place(tile, lanes, height, width, ROWS, BLOCK_P, WIDE)
        here, left, right = here & channels, left & channels, right & channels
        grads = load_around(grad, pixel * GRAD_STRIDE + channel[None, :], row, height, down, left, here, right,
                            GRAD_STRIDE, ROWS)
        centres, extras = (), ()
        for r in tl.static_range(ROWS):
            stored = here & (row + r < height)
            centres = centres + (tl.load(x + ((pixel + r * width) * X_STRIDE + channel[None, :]), mask=stored,
                                         other=0.0), )
            if residual is not None:
                extras = extras + (tl.load(residual + ((pixel + r * width) * RESIDUAL_STRIDE + channel[None, :]),
                                           mask=stored, other=0.0), )
        for r in tl.static_range(ROWS):
            centre = centres[r].to(tl.float32)
            value = zero
            added = ()
            for k in tl.static_range(9):  # weight k met this pixel in the result at the opposite neighbour
                near = grads[r + 2 - k // 3][2 - k % 3].to(tl.float32)
                value += near * taps[k]
                added = added + (sums[k] + near * centre, )
            sums = added + (sums[9] + grads[r + 1][1].to(tl.float32), )
            if residual is not None:
                value += extras[r].to(tl.float32)
            tl.store(grad_x + ((pixel + r * width) * GRAD_X_STRIDE + channel[None, :]),
                     value.to(grad_x.dtype.element_ty), mask=here & (row + r < height))
    totals = tl.reduce(sums, 0, add_pairs)
    partials += tl.program_id(1) * (10 * DIM) + channel
    for k in tl.static_range(10):
        tl.store(partials + k * DIM, totals[k], mask=channel < DIM)


def backward(grad, x, weight, bias, residual, silu, grad_x=None):
    """Gradients of ``x``, ``weight``, ``bias``. ``grad_x``: where to put the first, rows of channels evenly spaced."""
    if not x.numel():
        return torch.empty_like(x), torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
    batch, height, width, dim = x.shape
    weight = weight.contiguous()
    extra, extra_stride = None, 0
    if silu:
        extra, after = grad if residual else None, grad
        # Rounded once, in grad_x.
        grad = torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
        convolve(x, weight, bias, after, grad, False, True)
    grid, lanes, tiles, constants, warps = plan(batch, height, width, dim, 2, _THREADS)
    if grad_x is None:
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    (x, x_stride), (grad, grad_stride) = as_rows(x, 3), as_rows(grad, 3)
    if extra is not None:
        extra, extra_stride = as_rows(extra, 3)
    partials = x.new_empty(grid[1] * 10 * dim, dtype=torch.float32)
    grad_x_stride = grad_x.stride(2)
    wide = batch * height * width * max(dim, grad_stride, x_stride, extra_stride, grad_x_stride) >= 2**31
    unit = unit_of(dim, grad_stride, x_stride, extra_stride, grad_x_stride)
    launch(_kernel, grid, grad, x, weight, extra, grad_x, partials, lanes, height, width, tiles, dim // unit,
           grad_stride // unit, x_stride // unit, extra_stride // unit, grad_x_stride // unit, unit,
           residual and not silu, *constants, wide, num_warps=warps)
    grad_weight = torch.empty_like(weight)
    grad_bias = None if bias is None else torch.empty_like(bias)
    launch(add_up, (cdiv(10 * dim, 16), 1, 1), partials, grad_weight, grad_bias, grid[1], dim // unit, 9, unit, 256, 16,
           num_warps=4)
    return grad_x, grad_weight, grad_bias
