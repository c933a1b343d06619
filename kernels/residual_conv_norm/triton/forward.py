"""The kernel of the forward pass and its launch."""
import torch
import triton
import triton.language as tl

from ..._core.triton_support import as_rows, launch
from .tiles import (
    REGISTERS,
    add_branch,
    convolve,
    dense,
    load_channels,
    load_scale,
    load_taps,
    load_window,
    locate,
    masked,
    moments,
    plan,
)

PROGRAMS = 1584  # three times as many as run at a time on an H100


@triton.jit(do_not_specialize=['squares', 'share', 'height', 'width'], do_not_specialize_on_alignment=['scale'])
def _forward(x, branch, scale, conv_weight, conv_bias, norm_weight, norm_bias, y, n, squares, share, height, width,
             EPS: tl.constexpr, DIM: tl.constexpr, X_STRIDE: tl.constexpr, BRANCH_STRIDE: tl.constexpr,
             BLOCK: tl.constexpr, CHANNELS: tl.constexpr):
    channel = tl.arange(0, CHANNELS)
    inside = (channel < DIM)[None, :] if DIM < CHANNELS else None
    w = load_taps(conv_weight, channel, DIM)
    bias = load_channels(conv_bias, channel, DIM)
    norm_w, norm_b = load_channels(norm_weight, channel, DIM), load_channels(norm_bias, channel, DIM)
    down = width.to(tl.int64)
    begin = tl.program_id(0).to(squares.dtype) * share
    for first in range(begin, tl.minimum(begin + share, squares), BLOCK):
        image, pixel, rows, columns = locate(first, squares, height, width, BLOCK, True)
        u = load_window(x + pixel * X_STRIDE + channel[None, :], down, rows, columns, inside, X_STRIDE)
        added = branch
        if branch is not None:
            added = load_window(branch + pixel * BRANCH_STRIDE + channel[None, :], down, rows, columns, inside,
                                BRANCH_STRIDE)
        factor = scale
        if scale is not None:
            factor = load_scale(scale, image, rows)
        values = convolve(add_branch(u, added, factor), w, bias)
        centred, rstd = moments(values, channel, EPS, DIM)
        at = pixel * DIM + channel[None, :]
        for i in tl.static_range(4):
            mask = masked(rows[1 + i // 2] & columns[1 + i % 2], inside)
            to = at + (i // 2 * down + i % 2) * DIM
            tl.store(y + to, values[i], mask=mask)
            tl.store(n + to, centred[i] * rstd[i] * norm_w + norm_b, mask=mask)


def forward(x, branch, scale, conv_weight, conv_bias, norm_weight, norm_bias, eps):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    n = torch.empty_like(y)
    if not x.numel():
        return y, n
    batch, height, width, dim = x.shape
    x, x_stride = as_rows(x, 3)
    branch_stride = dim
    if branch is not None:
        branch, branch_stride = as_rows(branch, 3)
    grid, squares, share, block, channels, warps = plan(batch, height, width, dim, PROGRAMS)
    parameters = map(dense, (scale, conv_weight, conv_bias, norm_weight, norm_bias))
    launch(_forward, grid, x, branch, *parameters, y, n, squares, share, height, width, eps, dim, x_stride,
           branch_stride, block, channels, num_warps=warps, maxnreg=REGISTERS)
    return y, n
