"""The kernels: a program moves some rows; of the two that a row may be made of, it loads those that count."""
import torch
import triton
import triton.language as tl

from .._core.triton_support import as_rows, cdiv, launch, next_power_of_2, unit_of
from .orders import tables

_TILE = 4096  # numbers: 32 a thread
_WARPS = 4


@triton.jit
def _rows_of(x, image, row, there, column, in_d, L, STRIDE):
    """Some rows of an image, (rows, channels), in float32; zero where they are not ``there``."""
    at = x + (image * L + row)[:, None] * STRIDE + column[None, :]
    return tl.load(at, mask=there[:, None] & in_d[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=['L', 'dim', 'stride'])
def _reorder(x, selected, coarse, fine, coarse_window, fine_window, y, L, dim, stride, UNIT: tl.constexpr,
             ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Row i of ``y`` is row ``coarse[i]`` of ``x``, but for the share of the selected window, plus that window's share
    of row ``fine[i]``."""
    D = dim * UNIT
    STRIDE = stride * UNIT
    tiles = tl.cdiv(L, ROWS)
    blocks = tl.cdiv(D, BLOCK_D)
    pid = tl.program_id(0)
    image = (pid // blocks // tiles).to(tl.int64)
    row = pid // blocks % tiles * ROWS + tl.arange(0, ROWS)
    column = pid % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    in_l, in_d = row < L, column < D
    outside = 1 - tl.load(selected + image * 4 + tl.load(coarse_window + row, mask=in_l, other=0)).to(tl.float32)
    inside = tl.load(selected + image * 4 + tl.load(fine_window + row, mask=in_l, other=0)).to(tl.float32)
    first = tl.load(coarse + row, mask=in_l, other=0)
    second = tl.load(fine + row, mask=in_l, other=0)
    value = outside[:, None] * _rows_of(x, image, first, in_l & (outside != 0), column, in_d, L, STRIDE)
    value += inside[:, None] * _rows_of(x, image, second, in_l & (inside != 0), column, in_d, L, STRIDE)
    tl.store(y + (image * L + row)[:, None] * D + column[None, :], value, mask=in_l[:, None] & in_d[None, :])


@triton.jit(do_not_specialize=['L', 'dim', 'token_stride', 'sequence_stride'])
def _gains(tokens, sequence, coarse, fine_position, gains, L, dim, token_stride, sequence_stride, UNIT: tl.constexpr,
           ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """What each token gains by the walk by sub-windows, (batch, L), tokens in the order of the walk by windows."""
    D = dim * UNIT
    tiles = tl.cdiv(L, ROWS)
    pid = tl.program_id(0)
    image = (pid // tiles).to(tl.int64)
    row = pid % tiles * ROWS + tl.arange(0, ROWS)
    in_l = row < L
    token = tl.load(coarse + row, mask=in_l, other=0)
    fine = tl.load(fine_position + token, mask=in_l, other=0)
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        in_d = column < D
        gain = _rows_of(sequence, image, fine, in_l, column, in_d, L, sequence_stride * UNIT)
        gain -= _rows_of(sequence, image, row, in_l, column, in_d, L, sequence_stride * UNIT)
        total += gain * _rows_of(tokens, image, token, in_l, column, in_d, L, token_stride * UNIT)
    tl.store(gains + image * L + row, tl.sum(total, 1), mask=in_l)


def _tile(dim):
    """Rows and channels that a program has at a time."""
    block = min(next_power_of_2(dim), 512)
    return _TILE // block, block


def forward(x, selected, height, width, shift, token_order, inverse):
    t = tables(height, width, tuple(shift), token_order, x.device)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel():
        batch, L, dim = x.shape
        x, stride = as_rows(x, 2)
        unit = unit_of(dim, stride)
        rows, block = _tile(dim)
        walks = (t.coarse_position, t.fine_position, t.window, t.window) if inverse else \
            (t.coarse, t.fine, t.window_of_coarse, t.window_of_fine)
        launch(_reorder, (batch * cdiv(L, rows) * cdiv(dim, block), 1, 1), x, selected.contiguous(), *walks, y, L,
               dim // unit, stride // unit, unit, rows, block, num_warps=_WARPS)
    return y


def backward(grad, x, selected, height, width, shift, token_order, inverse):
    """The two re-orderings are each other's adjoint in ``x`` and have their gradient in ``selected`` in common."""
    t = tables(height, width, tuple(shift), token_order, x.device)
    grad_x = forward(grad, selected, height, width, shift, token_order, not inverse)
    tokens, sequence = (grad, x) if inverse else (x, grad)
    batch, L, dim = x.shape
    gains = x.new_empty((batch, 4, L // 4), dtype=torch.float32)
    if gains.numel() and dim:
        (tokens, token_stride), (sequence, sequence_stride) = as_rows(tokens, 2), as_rows(sequence, 2)
        unit = unit_of(dim, token_stride, sequence_stride)
        rows, block = _tile(dim)
        launch(_gains, (batch * cdiv(L, rows), 1, 1), tokens, sequence, t.coarse, t.fine_position, gains, L,
               dim // unit, token_stride // unit, sequence_stride // unit, unit, rows, block, num_warps=_WARPS)
    return grad_x, gains.sum(2)
