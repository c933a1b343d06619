"""The convolution, and by the same kernel the gradient before the activation."""
import torch
import triton
import triton.language as tl

from ..._core.triton_math import sigmoid
from ..._core.triton_support import as_rows, launch, unit_of
from .stencil import channel_mask, load_around, load_taps, place, plan

_THREADS = 132 * 2560  # four or five for each that an H100 holds at a time


@triton.jit(do_not_specialize=['lanes', 'height', 'width', 'tiles', 'dim', 'x_stride', 'grad_stride'])
def _kernel(x, weight, bias, grad, y, lanes, height, width, tiles, dim, x_stride, grad_stride, UNIT: tl.constexpr,
            RESIDUAL: tl.constexpr, SILU: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr,
            BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    """``y = act(conv(x) + bias) [+ x]``, or with ``grad``: ``y = grad * act'(conv(x) + bias)``. ``WIDE``:
    places in the tensors need 64 bits."""
    DIM = dim * UNIT
    X_STRIDE = x_stride * UNIT
    GRAD_STRIDE = grad_stride * UNIT
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channels = channel_mask(channel, DIM, MASKED)
    taps = load_taps(weight, channel, DIM, RESIDUAL and not SILU)
    start = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    if bias is not None:
        start += tl.load(bias + channel, mask=channel < DIM, other=0.0).to(tl.float32)[None, :]
    down = width.to(tl.int64) if WIDE else width
    for tile in range(tl.program_id(1) * tiles, tl.program_id(1) * tiles + tiles):
        pixel, row, here, left, right = place(tile, lanes, height, width, ROWS, BLOCK_P, WIDE)
        here, left, right = here & channels, left & channels, right & channels
        pixels = load_around(x, pixel * X_STRIDE + channel[None, :], row, height, down, left, here, right,
                             X_STRIDE, ROWS)
        upstream = ()
        if grad is not None:
            for r in tl.static_range(ROWS):
                upstream = upstream + (tl.load(
                    grad + ((pixel + r * width) * GRAD_STRIDE + channel[None, :]),
                    mask=here & (row + r < height), other=0.0), )
        for r in tl.static_range(ROWS):
            value = start
            for k in tl.static_range(9):
                value += pixels[r + k // 3][k % 3].to(tl.float32) * taps[k]
            if SILU:
                gate = sigmoid(value)
                if grad is not None:
                    value = upstream[r].to(tl.float32) * (gate * (1 + value * (1 - gate)))
                else:
                    value = value * gate
                    if RESIDUAL:
                        value += pixels[r + 1][1].to(tl.float32)
            tl.store(y + ((pixel + r * width) * DIM + channel[None, :]), value.to(y.dtype.element_ty),
                     mask=here & (row + r < height))


def convolve(x, weight, bias, grad, y, residual, silu):
    """Run the kernel on tensors that are not empty, ``weight`` and ``y`` contiguous."""
    batch, height, width, dim = x.shape
    grid, lanes, tiles, constants, warps = plan(batch, height, width, dim, 4, _THREADS)
    x, x_stride = as_rows(x, 3)
    bias = None if bias is None else bias.contiguous()
    grad, grad_stride = (None, 0) if grad is None else as_rows(grad, 3)
    wide = batch * height * width * max(dim, x_stride, grad_stride) >= 2**31
    # In runtime arguments that count units: one compiled kernel serves all widths and still knows of the alignment.
    unit = unit_of(dim, x_stride, grad_stride)
    launch(_kernel, grid, x, weight, bias, grad, y, lanes, height, width, tiles, dim // unit, x_stride // unit,
           grad_stride // unit, unit, residual, silu, *constants, wide, num_warps=warps)


def forward(x, weight, bias, residual, silu):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel():
        convolve(x, weight.contiguous(), bias, None, y, residual, silu)
    return y
