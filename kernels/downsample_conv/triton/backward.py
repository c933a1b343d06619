"""All gradients in one pass over the squares of the input; a second kernel adds up the programs' sums for the
parameters."""
import torch
import triton
import triton.language as tl

from ..._core.partial_sums import add_up
from ..._core.triton_support import as_rows, cdiv, launch, unit_of
from ...depthwise_conv.triton.stencil import add_pairs, channel_mask, load_taps
from .tiles import place, plan, relu

_THREADS = 132 * 1024


@triton.jit
def _load_gradient(grad, y, at, at_y, mask):
    """The gradient before the second ReLU."""
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    return tl.where(tl.load(y + at_y, mask=mask, other=0.0) <= 0, 0.0, g)  # NaN lets it pass, as in PyTorch


@triton.jit(do_not_specialize=['lanes', 'height', 'width', 'tiles', 'dim', 'grad_stride', 'x_stride'])
def _kernel(grad, y, x, weight, grad_x, partials, lanes, height, width, tiles, dim, grad_stride, x_stride,
            UNIT: tl.constexpr, MASKED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
            WIDE: tl.constexpr):
    """A square of the input meets four pixels of the result: its own, right of it, below, and below to the right. A
    program's sums for the weights and the bias go to its row of ``partials``, (programs, 10 * DIM)."""
    DIM = dim * UNIT
    GRAD_STRIDE = grad_stride * UNIT
    X_STRIDE = x_stride * UNIT
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channels = channel_mask(channel, DIM, MASKED)
    taps = load_taps(weight, channel, DIM, False)
    zero = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sums = (zero, zero, zero, zero, zero, zero, zero, zero, zero, zero)  # the last for the bias
    columns = (width + 1) // 2
    down = width.to(tl.int64) if WIDE else width
    for tile in range(tl.program_id(1) * tiles, tl.program_id(1) * tiles + tiles):
        lane, pixel, row, column, here = place(tile, lanes, height, width, BLOCK_P, WIDE)
        right = here & (column + 2 < width)
        below = here & (row + 2 < height)
        grads, pixels = (), ()
        for k in tl.static_range(4):
            there = here if k == 0 else right if k == 1 else below if k == 2 else right & below
            result = lane + (k // 2) * columns + k % 2
            grads = grads + (_load_gradient(grad, y, result * GRAD_STRIDE + channel[None, :],
                                            result * DIM + channel[None, :], there & channels), )
        for k in tl.static_range(4):
            inside = here & (row + k // 2 < height) & (column + k % 2 < width)
            at = (pixel + (k // 2) * down + k % 2) * X_STRIDE + channel[None, :]
            pixels = pixels + (tl.load(x + at, mask=inside & channels, other=0.0), )
        g00, g01, g10, g11 = grads
        own, after, under, last = relu(pixels[0]), relu(pixels[1]), relu(pixels[2]), relu(pixels[3])
        sums = (sums[0] + g11 * last, sums[1] + g10 * under, sums[2] + g10 * last, sums[3] + g01 * after,
                sums[4] + g00 * own, sums[5] + g00 * after, sums[6] + g01 * last, sums[7] + g00 * under,
                sums[8] + g00 * last, sums[9] + g00)
        values = (g00 * taps[4], g00 * taps[5] + g01 * taps[3], g00 * taps[7] + g10 * taps[1],
                  g00 * taps[8] + g01 * taps[6] + g10 * taps[2] + g11 * taps[0])
        for k in tl.static_range(4):
            inside = here & (row + k // 2 < height) & (column + k % 2 < width)
            value = tl.where(pixels[k] <= 0, 0.0, values[k])
            tl.store(grad_x + ((pixel + (k // 2) * down + k % 2) * DIM + channel[None, :]),
                     value.to(grad_x.dtype.element_ty), mask=inside & channels)
    totals = tl.reduce(sums, 0, add_pairs)
    partials += tl.program_id(1) * (10 * DIM) + channel
    for k in tl.static_range(10):
        tl.store(partials + k * DIM, totals[k], mask=channel < DIM)


def backward(grad, y, x, weight, bias):
    """Gradients of ``x``, ``weight``, ``bias``; ``y`` is the result."""
    if not x.numel():
        return torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
    batch, height, width, dim = x.shape
    weight, y = weight.contiguous(), y.contiguous()
    grid, lanes, tiles, constants, warps = plan(batch, height, width, dim, 2, _THREADS)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias, memory_format=torch.contiguous_format)
    (x, x_stride), (grad, grad_stride) = as_rows(x, 3), as_rows(grad, 3)
    partials = x.new_empty(grid[1] * 10 * dim, dtype=torch.float32)
    wide = batch * height * width * max(dim, x_stride, grad_stride) >= 2**31
    unit = unit_of(dim, grad_stride, x_stride)
    launch(_kernel, grid, grad, y, x, weight, grad_x, partials, lanes, height, width, tiles, dim // unit,
           grad_stride // unit, x_stride // unit, unit, *constants, wide, num_warps=warps)
    launch(add_up, (cdiv(10 * dim, 16), 1, 1), partials, grad_weight, grad_bias, grid[1], dim // unit, 9, unit, 256, 16,
           num_warps=4)
    return grad_x, grad_weight, grad_bias
