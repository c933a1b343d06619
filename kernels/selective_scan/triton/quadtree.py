"""QuadMamba's sequence as arithmetic: which tokens of a map are at a position, see ../../quadtree/README.md.

With one window selected, position ``q`` of the walk by windows has its token there if that is outside the window, and
that of the walk by sub-windows if this is inside. Each token is at one position. In the order 'quadtree' a position has
one token. In the order 'released' the L positions are stretches of L / 8 with one, both or none of the two. All that
is computed of a position is kept in the row of its first token, its home; where there is none, in one of L / 8 rows
behind those of the tokens. Of a position without a token, of the gradients of ``x``, ``dt``, ``B`` and ``C``, only
that of ``dt`` is not zero.
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..._core.triton_math import DIVISION, magic_of
from ..._core.triton_support import cdiv, launch, next_power_of_2
from ...quadtree.triton import position_of, token_at, walk_by

_TILE = 4096  # numbers that a program of ``gains_of`` has at a time: 32 a thread
_WARPS = 4


class Quadtree(NamedTuple):
    """QuadMamba's sequence as the ``order`` of a scan in two directions, forwards and backwards. Sides are multiples of
    4; their product, times the longer one, is below 2**32, see ``magic_of``."""
    selected: torch.Tensor  # the window of each image, (batch, 4), one-hot, float32, contiguous
    height: int
    width: int
    shift: tuple  # see kernels/quadtree
    token_order: str

    def arguments(self):
        """Those of ``quadtree_of`` from ``height`` on."""
        (dy, dx), height, width = self.shift, self.height, self.width
        return height, magic_of(width // 4), magic_of(height // 4), dy % height, dx % width


@triton.jit
def quadtree_of(selected, k, L, height, magic, magic_rows, roll_y, roll_x, RELEASED: tl.constexpr):
    """What the other functions take, of an image and a direction: L first, last 0, or NaN where ``selected``, its four
    windows' selection, has one.

    ``magic``, ``magic_rows``: of a quarter of the map's width and height; ``roll_y``, ``roll_x``: its roll, not
    negative.
    """
    second = tl.load(selected + 1)
    third = tl.load(selected + 2)
    fourth = tl.load(selected + 3)
    window = tl.where(second > 0.5, 1, tl.where(third > 0.5, 2, tl.where(fourth > 0.5, 3, 0)))
    poison = (tl.load(selected) + second + third + fourth) * 0.0
    sixteenth = (L // 16).to(tl.int32)
    down, right = window // 2 * 8 * sixteenth, window % 2 * 2 * sixteenth
    if RELEASED:  # stretches by sub-windows alone, with no token, and with two
        starts = down + 3 * right, down + 2 * sixteenth + right, down + 4 * sixteenth - right
    else:
        starts = (down + 2 * right,) * 3
    first, sign = tl.where(k > 0, L - 1, 0).to(tl.int32), tl.where(k > 0, -1, 1)
    return L, first, sign, starts, height, (L // height).to(tl.int32), magic, magic_rows, roll_y, roll_x, poison


@triton.jit
def home_of(walk, position, RELEASED: tl.constexpr):
    """The rows of some positions of a direction's sequence: their first token, or behind L where there is none."""
    L, first, sign, starts, height, width, magic, magic_rows, roll_y, roll_x, _ = walk
    q = first + sign * position.to(tl.int32)
    length = (L // (8 if RELEASED else 4)).to(tl.int32)
    fine = (q >= starts[0]) & (q < starts[0] + length)
    row = token_of(q, fine.to(tl.int32), height, width, magic, magic_rows, roll_y, roll_x, RELEASED)
    if RELEASED:
        row = tl.where((q >= starts[1]) & (q < starts[1] + length), L.to(tl.int32) + q - starts[1], row)
    return row


@triton.jit
def second_of(walk, position, here):
    """The second token of some positions, in the order 'released', and which of those that are ``here`` have one."""
    L, first, sign, starts, height, width, magic, magic_rows, roll_y, roll_x, _ = walk
    q = first + sign * position.to(tl.int32)
    there = here & (q >= starts[2]) & (q < starts[2] + (L // 8).to(tl.int32))
    return token_of(q, 1, height, width, magic, magic_rows, roll_y, roll_x, True), there


@triton.jit
def has_seconds(walk, start, span):
    """Whether any of ``span`` positions may have a second token, in the order 'released'."""
    begin = walk[3][2]
    one = walk[1] + walk[2] * start.to(tl.int32)
    other = one + walk[2] * (span - 1)
    return (tl.minimum(one, other) < begin + (walk[0] // 8).to(tl.int32)) & (tl.maximum(one, other) >= begin)


@triton.jit
def token_of(q, fine, height, width, magic, magic_rows, roll_y, roll_x, RELEASED: tl.constexpr):
    """The token at position ``q`` of the walk by sub-windows where that is ``fine``, 1, or by windows, 0."""
    half = 1 - fine
    h, w = height // 4 << half, width // 4 << half
    line = ((q.to(tl.int64) * magic) >> DIVISION).to(tl.int32) >> half
    window = ((line.to(tl.int64) * magic_rows) >> DIVISION).to(tl.int32) >> half
    down = window >> (2 - half)
    right = window - (down << (2 - half))
    if not RELEASED:  # of 4 x 4 windows, four after each other
        down = tl.where(fine > 0, window // 8 * 2 + window // 2 % 2, down)
        right = tl.where(fine > 0, window // 4 % 2 * 2 + window % 2, right)
    row = down * h + line - window * h - roll_y
    column = right * w + q - line * w - roll_x
    return tl.where(row < 0, row + height, row) * width + tl.where(column < 0, column + width, column)


@triton.jit
def poison_of(walk, ORDER: tl.constexpr):
    """0, or NaN where nobody knows which window is selected."""
    return walk[10] if ORDER > 3 else 0.0


@triton.jit
def _rows_of(x, image, rows, row, there, column, inside, STRIDE: tl.constexpr):
    """Some of an image's ``rows`` rows, (rows, columns), in float32; zero where they are not ``there``."""
    at = x + (image * rows + row).to(tl.int64)[:, None] * STRIDE + column[None, :]
    return tl.load(at, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)


@triton.jit
def _gain(tokens, sequence, rest, image, L, token, fine, coarse, here, LENGTH: tl.constexpr, ROWS: tl.constexpr,
          BLOCK: tl.constexpr):
    """For each token the product of its row of ``tokens`` and the difference of ``sequence`` at two positions."""
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, LENGTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < LENGTH
        gain = _rows_of(sequence, image, L, fine, here & (fine < L), column, inside, LENGTH)
        gain -= _rows_of(sequence, image, L, coarse, here & (coarse < L), column, inside, LENGTH)
        if rest is not None:
            gain += _rows_of(rest, image, L // 8, fine - L, here & (fine >= L), column, inside, LENGTH)
            gain -= _rows_of(rest, image, L // 8, coarse - L, here & (coarse >= L), column, inside, LENGTH)
        total += gain * _rows_of(tokens, image, L, token, here, column, inside, LENGTH)
    return tl.sum(total, 1)


@triton.jit(do_not_specialize=['L', 'height', 'magic', 'magic_rows', 'roll_y', 'roll_x'])
def _gains(grad_y, y, x, grad_x, p, grad_p, rest, selected, gains, L, height, magic, magic_rows, roll_y, roll_x,
           D: tl.constexpr, P: tl.constexpr, RELEASED: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
           BLOCK_P: tl.constexpr):
    """What each token gains by the walk by sub-windows, (batch, L), tokens in the order of the walk by windows."""
    tiles = tl.cdiv(L, ROWS)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    position = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    here = position < L
    walk = quadtree_of(selected + image * 4, 0, L, height, magic, magic_rows, roll_y, roll_x, RELEASED)
    row, column = walk_by(position, height, L // height, 2, True)
    token = token_at(row, column, height, L // height, roll_y, roll_x)
    coarse = home_of(walk, position, RELEASED)
    fine = home_of(walk, position_of(row, column, height, L // height, 4, RELEASED), RELEASED)
    total = _gain(grad_y, y, None, image, L, token, fine, coarse, here, D, ROWS, BLOCK_D)
    total += _gain(x, grad_x, None, image, L, token, fine, coarse, here, D, ROWS, BLOCK_D)
    total += _gain(p, grad_p, rest, image, L, token, fine, coarse, here, P, ROWS, BLOCK_P)
    tl.store(gains + image * L + position, total, mask=here)


def gains_of(grad_y, y, x, grad_x, p, grad_p, rest, order):
    """What the selection of each window adds to the loss, by token: (batch, 4, L / 4), float32.

    Args:
        grad_y, y, x, grad_x (Tensor): of a scan, (batch, L, D), contiguous.
        p, grad_p (Tensor): its ``dt``, ``B`` and ``C`` and their gradients, (batch, L, ...), contiguous.
        rest (Tensor | None): what backward returned beside the gradients of its arguments.
        order (Quadtree): that of the scan.
    """
    batch, L, D = x.shape
    gains, P = x.new_empty((batch, 4, L // 4), dtype=torch.float32), p.shape[2:].numel()
    block_d, block_p = (min(next_power_of_2(n), 512) for n in (D, P))
    rows = _TILE // max(block_d, block_p)
    launch(_gains, (batch * cdiv(L, rows), 1, 1), grad_y, y, x, grad_x, p, grad_p, rest, order.selected, gains, L,
           *order.arguments(), D, P, order.token_order == 'released', rows, block_d, block_p,
           num_warps=_WARPS)
    return gains
