"""The kernels of the backward pass and their launch: norm, convolution, sums of the parameters' gradients."""
import torch
import triton
import triton.language as tl

from ..._core.triton_support import as_rows, cdiv, launch, unit_of
from .tiles import (
    REGISTERS,
    add_branch,
    convolve,
    dense,
    load_channels,
    load_scale,
    load_square,
    load_taps,
    load_window,
    locate,
    masked,
    moments,
    plan,
    row_means,
)

# Twice as many programs as run at a time on an H100, and as many; the more, the more partial sums.
NORM_PROGRAMS, CONV_PROGRAMS = 1056, 660
CONV_CHANNELS, CONV_ELEMENTS = 64, 2


@triton.jit(do_not_specialize=['squares', 'share', 'height', 'width'], do_not_specialize_on_alignment=['scale'])
def _norm_backward(grad_y, grad_n, x, branch, scale, conv_weight, conv_bias, norm_weight, grad, partial, squares, share,
                   height, width, EPS: tl.constexpr, DIM: tl.constexpr, X_STRIDE: tl.constexpr,
                   BRANCH_STRIDE: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr):
    """Recomputes ``y``; writes its gradient, and sums those of the norm's parameters."""
    channel = tl.arange(0, CHANNELS)
    inside = (channel < DIM)[None, :] if DIM < CHANNELS else None
    w = load_taps(conv_weight, channel, DIM)
    bias, norm_w = load_channels(conv_bias, channel, DIM), load_channels(norm_weight, channel, DIM)
    down = width.to(tl.int64)
    sum_weight, sum_bias = tl.zeros([BLOCK, CHANNELS], tl.float32), tl.zeros([BLOCK, CHANNELS], tl.float32)
    begin = tl.program_id(0).to(squares.dtype) * share
    for first in range(begin, tl.minimum(begin + share, squares), BLOCK):
        image, pixel, rows, columns = locate(first, squares, height, width, BLOCK, True)
        u = load_window(x + pixel * X_STRIDE + channel[None, :], down, rows, columns, inside, X_STRIDE)
        added = branch
        if branch is not None:
            added = load_window(branch + pixel * BRANCH_STRIDE + channel[None, :], down, rows, columns, inside,
                                BRANCH_STRIDE)
        at = pixel * DIM + channel[None, :]
        from_n = load_square(grad_n + at, down, rows, columns, inside, DIM)
        from_y = load_square(grad_y + at, down, rows, columns, inside, DIM)
        factor = scale
        if scale is not None:
            factor = load_scale(scale, image, rows)
        values = convolve(add_branch(u, added, factor), w, bias)
        centred, rstd = moments(values, channel, EPS, DIM)
        normed, slope, along = (), (), ()
        for i in tl.static_range(4):
            exists = rows[1 + i // 2] & columns[1 + i % 2]
            value, g = centred[i] * tl.where(exists, rstd[i], 0), from_n[i].to(tl.float32)
            sum_weight += g * value
            sum_bias += g
            normed = normed + (value,)
            slope = slope + (g * norm_w,)
            along = along + (g * norm_w * value,)
        mean, along = row_means(slope, DIM), row_means(along, DIM)
        for i in tl.static_range(4):
            value = from_y[i].to(tl.float32) + rstd[i] * (slope[i] - mean[i] - normed[i] * along[i])
            mask = masked(rows[1 + i // 2] & columns[1 + i % 2], inside)
            tl.store(grad + at + (i // 2 * down + i % 2) * DIM, value, mask=mask)
    partial += tl.program_id(0) * (2 * DIM) + channel
    tl.store(partial, tl.sum(sum_weight, 0), mask=channel < DIM)
    tl.store(partial + DIM, tl.sum(sum_bias, 0), mask=channel < DIM)


@triton.jit(do_not_specialize=['squares', 'share', 'height', 'width', 'dim', 'x_stride', 'branch_stride'],
            do_not_specialize_on_alignment=['scale'])
def _conv_backward(grad, x, branch, scale, conv_weight, grad_x, grad_branch, partial, squares, share, height, width,
                   dim, x_stride, branch_stride, UNIT: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
                   CHANNELS: tl.constexpr, WIDE: tl.constexpr):
    """From the gradient of ``y`` to those of ``x`` and ``branch``; sums those of the taps and the bias. A pixel of
    ``grad`` serves twice: times a tap it is part of the gradient of ``u``, times ``u`` of the tap's. ``WIDE``: places
    in the tensors need 64 bits."""
    DIM = dim * UNIT
    X_STRIDE = x_stride * UNIT
    BRANCH_STRIDE = branch_stride * UNIT
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (channel < DIM)[None, :] if MASKED else None
    w = load_taps(conv_weight, channel, DIM)
    down = width.to(tl.int64) if WIDE else width
    sums = ()
    for _ in tl.static_range(10):
        sums = sums + (tl.zeros([BLOCK, CHANNELS], tl.float32),)
    begin = tl.program_id(0).to(squares.dtype) * share
    for first in range(begin, tl.minimum(begin + share, squares), BLOCK):
        image, pixel, rows, columns = locate(first, squares, height, width, BLOCK, WIDE)
        at = pixel * DIM + channel[None, :]
        g = load_window(grad + at, down, rows, columns, inside, DIM)
        u = load_square(x + (pixel * X_STRIDE + channel[None, :]), down, rows, columns, inside, X_STRIDE)
        added = branch
        if branch is not None:
            added = load_square(branch + (pixel * BRANCH_STRIDE + channel[None, :]), down, rows, columns, inside,
                                BRANCH_STRIDE)
        factor = scale
        if scale is not None:
            factor = load_scale(scale, image, rows)
        u = add_branch(u, added, factor)
        for i in tl.static_range(4):
            value = tl.zeros([BLOCK, CHANNELS], tl.float32)
            new = ()
            for tap in tl.static_range(9):  # by which u[i] entered the result that lies opposite to the tap
                result = g[(i // 2 + 2 - tap // 3) * 4 + i % 2 + 2 - tap % 3]
                value += result * w[tap]
                new = new + (sums[tap] + result * u[i],)
            sums = new + (sums[9] + g[(i // 2 + 1) * 4 + i % 2 + 1],)
            mask = masked(rows[1 + i // 2] & columns[1 + i % 2], inside)
            to = at + (i // 2 * down + i % 2) * DIM
            tl.store(grad_x + to, value, mask=mask)
            if grad_branch is not None:
                tl.store(grad_branch + to, value if scale is None else value * factor, mask=mask)
    partial += tl.program_id(0) * (10 * DIM) + channel
    for i in tl.static_range(10):
        tl.store(partial + i * DIM, tl.sum(sums[i], 0), mask=channel < DIM)


@triton.jit(do_not_specialize=['norm_programs', 'conv_programs', 'dim'])
def _add_partial_sums(norm_partial, conv_partial, norm_weight, norm_bias, conv_weight, conv_bias, norm_programs,
                      conv_programs, dim, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """In fixed order: of one parameter, or tap of the weight, for a block of channels."""
    DIM = dim * UNIT
    kind = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < DIM
    if kind == 0:
        total = _add(norm_partial + channel, norm_programs, mask, 2 * DIM, ROWS, BLOCK)
        tl.store(norm_weight + channel, total, mask=mask)
    elif kind == 1:
        total = _add(norm_partial + DIM + channel, norm_programs, mask, 2 * DIM, ROWS, BLOCK)
        tl.store(norm_bias + channel, total, mask=mask)
    else:
        total = _add(conv_partial + (kind - 2) * DIM + channel, conv_programs, mask, 10 * DIM, ROWS, BLOCK)
        if kind < 11:
            tl.store(conv_weight + channel * 9 + kind - 2, total, mask=mask)
        elif conv_bias is not None:
            tl.store(conv_bias + channel, total, mask=mask)


@triton.jit
def _add(partial, programs, mask, STRIDE, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.arange(0, ROWS)
    at = partial[None, :] + row[:, None] * STRIDE
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, programs, ROWS):
        total += tl.load(at, mask=(row + first < programs)[:, None] & mask[None, :], other=0)
        at += ROWS * STRIDE
    return tl.sum(total, 0)


def backward(grad_y, grad_n, x, branch, scale, conv_weight, conv_bias, norm_weight, norm_bias, eps, branch_too):
    new = torch.empty_like if x.numel() else torch.zeros_like
    grad_x, grad_branch = torch.empty_like(x, memory_format=torch.contiguous_format), None
    if branch_too and branch is not None:
        grad_branch = torch.empty_like(branch, memory_format=torch.contiguous_format)
    scale, conv_weight, conv_bias, norm_weight = map(dense, (scale, conv_weight, conv_bias, norm_weight))
    grad_norm = new(norm_weight), new(norm_bias)
    grad_conv = new(conv_weight), None if conv_bias is None else new(conv_bias)
    if not x.numel():
        return grad_x, grad_branch, *grad_conv, *grad_norm
    batch, height, width, dim = x.shape
    x, x_stride = as_rows(x, 3)
    branch, branch_stride = (None, dim) if branch is None else as_rows(branch, 3)
    grid, squares, share, block, channels, warps = plan(batch, height, width, dim, NORM_PROGRAMS)
    grad = torch.empty_like(grad_x, dtype=torch.float32)
    norm_partial = grad.new_empty(grid[0] * 2 * dim)
    launch(_norm_backward, grid, grad_y.contiguous(), grad_n.contiguous(), x, branch, scale, conv_weight, conv_bias,
           norm_weight, grad, norm_partial, squares, share, height, width, eps, dim, x_stride, branch_stride, block,
           channels, num_warps=warps, maxnreg=REGISTERS)
    norm_programs = grid[0]
    grid, squares, share, block, channels, warps = plan(batch, height, width, dim, CONV_PROGRAMS, CONV_ELEMENTS,
                                                        CONV_CHANNELS)
    conv_partial = grad.new_empty(grid[0] * 10 * dim)
    wide = batch * height * width * max(dim, x_stride, branch_stride) >= 2**31
    # In runtime arguments that count units: one compiled kernel serves all widths and still knows of the alignment.
    unit = unit_of(dim, x_stride, branch_stride)
    launch(_conv_backward, grid, grad, x, branch, scale, conv_weight, grad_x, grad_branch, conv_partial, squares,
           share, height, width, dim // unit, x_stride // unit, branch_stride // unit, unit, dim % channels > 0, block,
           channels, wide, num_warps=warps)
    launch(_add_partial_sums, (12, cdiv(dim, 16), 1), norm_partial, conv_partial, *grad_norm, *grad_conv,
           norm_programs, grid[0], dim // unit, unit, 256, 16, num_warps=8)
    return grad_x, grad_branch, *grad_conv, *grad_norm
