"""The convolution, a thread some channels of some pixels of the result."""
import triton
import triton.language as tl

from ..._core.triton_support import as_rows, launch, unit_of
from ...depthwise_conv.triton.stencil import channel_mask, load_taps
from .tiles import place, plan, relu

_THREADS = 132 * 2560


@triton.jit(do_not_specialize=['lanes', 'height', 'width', 'tiles', 'dim', 'x_stride'])
def _kernel(x, weight, bias, y, lanes, height, width, tiles, dim, x_stride, UNIT: tl.constexpr, MASKED: tl.constexpr,
            BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    DIM = dim * UNIT
    X_STRIDE = x_stride * UNIT
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    channels = channel_mask(channel, DIM, MASKED)
    taps = load_taps(weight, channel, DIM, False)
    start = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    start += tl.load(bias + channel, mask=channel < DIM, other=0.0).to(tl.float32)[None, :]
    down = width.to(tl.int64) if WIDE else width
    for tile in range(tl.program_id(1) * tiles, tl.program_id(1) * tiles + tiles):
        lane, pixel, row, column, here = place(tile, lanes, height, width, BLOCK_P, WIDE)
        here = here & channels
        at = pixel * X_STRIDE + channel[None, :]
        loaded = ()
        for k in tl.static_range(9):
            i = k // 3 - 1
            j = k % 3 - 1
            inside = here & (row + i >= 0) & (row + i < height) & (column + j >= 0) & (column + j < width)
            loaded = loaded + (tl.load(x + (at + (i * down + j) * X_STRIDE), mask=inside, other=0.0), )
        value = start
        for k in tl.static_range(9):
            value += relu(loaded[k]) * taps[k]
        tl.store(y + (lane * DIM + channel[None, :]), relu(value).to(y.dtype.element_ty), mask=here)


def forward(x, weight, bias):
    batch, height, width, dim = x.shape
    y = x.new_empty((batch, (height + 1) // 2, (width + 1) // 2, dim))
    if not x.numel():
        return y
    grid, lanes, tiles, constants, warps = plan(batch, height, width, dim, 4, _THREADS)
    x, x_stride = as_rows(x, 3)
    wide = batch * height * width * max(dim, x_stride) >= 2**31
    # In runtime arguments that count units: one compiled kernel serves all widths and still knows of the alignment.
    unit = unit_of(dim, x_stride)
    launch(_kernel, grid, x, weight.contiguous(), bias.contiguous(), y, lanes, height, width, tiles, dim // unit,
           x_stride // unit, unit, *constants, wide, num_warps=warps)
    return y
