"""The kernels: a program moves some rows; of the two that a row may be made of, it loads those that count. Token orders
are arithmetic: tables would have to live as long as a CUDA graph that reads them."""
import torch
import triton
import triton.language as tl

from .._core.triton_support import as_rows, cdiv, launch, next_power_of_2, unit_of

_TILE = 4096  # numbers: 32 a thread
_WARPS = 4


@triton.jit
def walk_by(position, height, width, parts, RELEASED: tl.constexpr):
    """The row and column, of the rolled map, at a position of the walk by a grid of ``parts`` x ``parts`` windows; not
    ``RELEASED``, a window of the 2 x 2 grid is walked to its end before the next."""
    h, w = height // parts, width // parts
    window, inside = position // (h * w), position % (h * w)
    down, right = window // parts, window % parts
    if not RELEASED:  # of 4 x 4 windows, four after each other
        down, right = window // 8 * 2 + window // 2 % 2, window // 4 % 2 * 2 + window % 2
    return down * h + inside // w, right * w + inside % w


@triton.jit
def position_of(row, column, height, width, parts, RELEASED: tl.constexpr):
    """The inverse of ``walk_by``."""
    h, w = height // parts, width // parts
    down, right = row // h, column // w
    window = down * parts + right
    if not RELEASED:
        window = (down // 2 * 2 + right // 2) * 4 + down % 2 * 2 + right % 2
    return window * (h * w) + row % h * w + column % w


@triton.jit
def token_at(row, column, height, width, dy, dx):
    """The token that a roll by ``dy`` and ``dx``, not negative, brought to a row and column."""
    return (row + height - dy) % height * width + (column + width - dx) % width


@triton.jit
def _window(row, column, height, width):
    """The number of its window of the 2 x 2 grid."""
    return row // (height // 2) * 2 + column // (width // 2)


@triton.jit
def _rows_of(x, image, row, there, column, in_d, L, STRIDE):
    """Some rows of an image, (rows, channels), in float32; zero where they are not ``there``."""
    at = x + (image * L + row)[:, None] * STRIDE + column[None, :]
    return tl.load(at, mask=there[:, None] & in_d[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=['height', 'width', 'dy', 'dx', 'dim', 'stride'])
def _reorder(x, selected, y, height, width, dy, dx, dim, stride, UNIT: tl.constexpr, RELEASED: tl.constexpr,
             INVERSE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """A row of ``y`` is a row of ``x`` by the walk by windows, but for the share of the selected window, plus that
    window's share of one by the walk by sub-windows."""
    D = dim * UNIT
    STRIDE = stride * UNIT
    L = height * width
    tiles = tl.cdiv(L, ROWS)
    blocks = tl.cdiv(D, BLOCK_D)
    pid = tl.program_id(0)
    image = (pid // blocks // tiles).to(tl.int64)
    place = pid // blocks % tiles * ROWS + tl.arange(0, ROWS)
    channel = pid % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    in_l, in_d = place < L, channel < D
    if INVERSE:
        row, column = (place // width + dy) % height, (place % width + dx) % width
        coarse_window = _window(row, column, height, width)
        fine_window = coarse_window
        coarse = position_of(row, column, height, width, 2, True)
        fine = position_of(row, column, height, width, 4, RELEASED)
    else:
        row, column = walk_by(place, height, width, 2, True)
        coarse_window = _window(row, column, height, width)
        coarse = token_at(row, column, height, width, dy, dx)
        row, column = walk_by(place, height, width, 4, RELEASED)
        fine_window = _window(row, column, height, width)
        fine = token_at(row, column, height, width, dy, dx)
    outside = 1 - tl.load(selected + image * 4 + coarse_window, mask=in_l, other=0.0).to(tl.float32)
    inside = tl.load(selected + image * 4 + fine_window, mask=in_l, other=0.0).to(tl.float32)
    value = outside[:, None] * _rows_of(x, image, coarse, in_l & (outside != 0), channel, in_d, L, STRIDE)
    value += inside[:, None] * _rows_of(x, image, fine, in_l & (inside != 0), channel, in_d, L, STRIDE)
    tl.store(y + (image * L + place)[:, None] * D + channel[None, :], value, mask=in_l[:, None] & in_d[None, :])


@triton.jit(do_not_specialize=['height', 'width', 'dy', 'dx', 'dim', 'token_stride', 'sequence_stride'])
def _gains(tokens, sequence, gains, height, width, dy, dx, dim, token_stride, sequence_stride, UNIT: tl.constexpr,
           RELEASED: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """What each token gains by the walk by sub-windows, (batch, L), tokens in the order of the walk by windows."""
    D = dim * UNIT
    L = height * width
    tiles = tl.cdiv(L, ROWS)
    pid = tl.program_id(0)
    image = (pid // tiles).to(tl.int64)
    coarse = pid % tiles * ROWS + tl.arange(0, ROWS)
    in_l = coarse < L
    row, column = walk_by(coarse, height, width, 2, True)
    token = token_at(row, column, height, width, dy, dx)
    fine = position_of(row, column, height, width, 4, RELEASED)
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        channel = start + tl.arange(0, BLOCK_D)
        in_d = channel < D
        gain = _rows_of(sequence, image, fine, in_l, channel, in_d, L, sequence_stride * UNIT)
        gain -= _rows_of(sequence, image, coarse, in_l, channel, in_d, L, sequence_stride * UNIT)
        total += gain * _rows_of(tokens, image, token, in_l, channel, in_d, L, token_stride * UNIT)
    tl.store(gains + image * L + coarse, tl.sum(total, 1), mask=in_l)


def _tile(dim):
    """Rows and channels that a program has at a time."""
    block = min(next_power_of_2(dim), 512)
    return _TILE // block, block


def _map(height, width, shift):
    """Arguments of the kernels: sides of the map, and how far it is rolled."""
    return height, width, shift[0] % height, shift[1] % width


def forward(x, selected, height, width, shift, token_order, inverse):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel():
        batch, L, dim = x.shape
        x, stride = as_rows(x, 2)
        unit = unit_of(dim, stride)
        rows, block = _tile(dim)
        launch(_reorder, (batch * cdiv(L, rows) * cdiv(dim, block), 1, 1), x, _readable(selected), y,
               *_map(height, width, shift), dim // unit, stride // unit, unit, token_order == 'released', inverse, rows,
               block, num_warps=_WARPS)
    return y


def backward(grad, x, selected, *args):
    """The two re-orderings are each other's adjoint in ``x`` and have their gradient in ``selected`` in common."""
    *order, inverse = args
    grad_x = forward(grad, selected, *order, not inverse)
    return grad_x, gains_of(grad, x, *args).sum(2) if x.numel() else torch.zeros_like(selected)


def gains_of(grad, x, height, width, shift, token_order, inverse):
    """What the selection of each window adds to the loss, by token: (batch, 4, L / 4), float32."""
    tokens, sequence = (grad, x) if inverse else (x, grad)
    batch, L, dim = x.shape
    gains = x.new_empty((batch, 4, L // 4), dtype=torch.float32)
    (tokens, token_stride), (sequence, sequence_stride) = as_rows(tokens, 2), as_rows(sequence, 2)
    unit = unit_of(dim, token_stride, sequence_stride)
    rows, block = _tile(dim)
    launch(_gains, (batch * cdiv(L, rows), 1, 1), tokens, sequence, gains, *_map(height, width, shift), dim // unit,
           token_stride // unit, sequence_stride // unit, unit, token_order == 'released', rows, block,
           num_warps=_WARPS)
    return gains


def _readable(selected):
    """In a precision that kernels read, without gaps."""
    return selected.to(torch.float32 if selected.dtype == torch.float64 else selected.dtype).contiguous()
