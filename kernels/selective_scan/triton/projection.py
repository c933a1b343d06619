"""Steps from their low-rank inputs on tensor cores: the products with ``dt_weight``.

What a thread has of a block, see ``blocks``, is also what the tensor cores want of it, so that nothing moves.
"""
import triton
import triton.language as tl

from ..._core.triton_math import LOG2_E
from ..._core.triton_support import INTERPRETED
from .blocks import GROUPS, is_token, mask_at, row_at, token_at
from .quadtree import second_of

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def split_tf32(x):
    """``x`` as the sum of two numbers of which tensor cores read every digit, nearly: the first, rounded to their
    eleven digits, leaves twelve."""
    if _INTERPRETED:  # tensor cores leave out the digits that they do not read
        high = ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
        return high, ((x - high).to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    else:  # otherwise the compiler joins the difference with what comes before, which takes one instruction more
        return tl.inline_asm_elementwise(
            '{ .reg .b32 t; mov.b32 t, $2; add.s32 t, t, 4096; and.b32 $0, t, 0xffffe000; sub.f32 $1, $2, $0; }',
            '=&f,=f,f', [x], (tl.float32, tl.float32), True, 1)


@triton.jit
def load_tile(base, rows, columns, here, ROW: tl.constexpr, COUNT: tl.constexpr):
    """``base[rows, columns]``, zero where a row is not ``here`` or a column not below ``COUNT``."""
    mask = here[:, None] & (columns < COUNT)[None, :]
    return tl.load(base + rows[:, None] * ROW + columns[None, :], mask=mask, other=0.0)


@triton.jit
def load_ranks(base, rows, here, R: tl.constexpr, RANKS: tl.constexpr, WARPS: tl.constexpr, ROW: tl.constexpr,
               ORDER: tl.constexpr):
    """``dt`` of the rows of each step, [groups, warps, 4] for each four ranks.

    Every warp loads its own, and a thread what it multiplies in ``project``: nothing goes through shared memory."""
    rank = tl.arange(0, 4)[None, None, :]
    loaded = ()
    for s in tl.static_range(len(rows)):
        for quad in tl.static_range(RANKS // 4):
            at = base + row_at(rows[s], ROW, ORDER) + (rank + quad * 4)
            at = tl.broadcast_to(at + (0 if ORDER else s * ROW), (GROUPS, WARPS, 4))
            mask = tl.broadcast_to(mask_at(here[s]) & (rank + quad * 4 < R), (GROUPS, WARPS, 4))
            loaded = loaded + (tl.load(at, mask=mask, other=0.0),)
    return loaded


@triton.jit
def load_pairs(base, rows, here, R: tl.constexpr, WARPS: tl.constexpr, ROW: tl.constexpr, ORDER: tl.constexpr):
    """As ``load_ranks``, of bfloat16 for ``project_pairs``: two numbers as one of 32 bits, for each eight ranks."""
    pair = tl.arange(0, 4)[None, None, :]
    loaded = ()
    for s in tl.static_range(len(rows)):
        row = (base + row_at(rows[s], ROW, ORDER) + (0 if ORDER else s * ROW)).to(tl.pointer_type(tl.int32))
        for first in tl.static_range(0, R // 2, 4):
            at = tl.broadcast_to(row + (first + pair), (GROUPS, WARPS, 4))
            mask = tl.broadcast_to(mask_at(here[s]) & (first + pair < R // 2), (GROUPS, WARPS, 4))
            loaded = loaded + (tl.load(at, mask=mask, other=0),)
    return loaded


@triton.jit
def product_channel(column, CHANNELS: tl.constexpr):
    """The channel of a warp whose product shall be in ``column``, so that it comes out where the thread holds it."""
    return column % 8 // 2 * (CHANNELS // 4) + column // 8 * 2 + column % 2


@triton.jit
def _product_channels(block, WARPS: tl.constexpr, CHANNELS: tl.constexpr):
    """The channels of a product's columns, [warps, 1, channels]."""
    column = product_channel(tl.arange(0, CHANNELS), CHANNELS)[None, None, :]
    return (block * WARPS + tl.arange(0, WARPS)[:, None, None]) * CHANNELS + column


@triton.jit
def load_bias(bias, block, D: tl.constexpr, WARPS: tl.constexpr, CHANNELS: tl.constexpr):
    """``dt_bias``, [warps, 1, channels], for ``project``, in units of log(2), with the other sign: minus signs take
    instructions."""
    d = _product_channels(block, WARPS, CHANNELS)
    return tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32) * -LOG2_E


@triton.jit
def load_projection(weight, bias, block, DTYPE: tl.constexpr, D: tl.constexpr, R: tl.constexpr, RANKS: tl.constexpr,
                    SLOTS: tl.constexpr, WARPS: tl.constexpr, CHANNELS: tl.constexpr):
    """``dt_weight``, [warps, slots, channels], for ``project``, in the units of ``load_bias``. ``DTYPE``: of ``dt``.

    Tensor cores read eleven digits of a number. Two slots follow one another for each rank, with the weight's first
    digits and its others; for float32 all of them come twice. Of four ranks half precision would leave half of the
    slots empty that a product takes at least: ``dt_bias`` takes three of them, then. A thread loads what it multiplies.
    """
    g = tl.arange(0, GROUPS)[:, None, None]
    rank = tl.arange(0, 4)[None, None, :]
    tiles, biases = (), ()
    for tile in tl.static_range(CHANNELS // 8):
        d = (block * WARPS + tl.arange(0, WARPS)[None, :, None]) * CHANNELS + product_channel(tile * 8 + g, CHANNELS)
        quads = ()
        for quad in tl.static_range(RANKS // 4):
            at = weight + d * R + (quad * 4 + rank)
            w = tl.load(at, mask=(d < D) & (quad * 4 + rank < R), other=0.0).to(tl.float32) * -LOG2_E
            high, rest = split_tf32(w)
            quads = quads + (tl.join(high, rest),)
        tiles = tiles + (stack(quads),)
        if RANKS == 4:
            at = bias + d + rank  # so that the compiler has the thread load it that loads the weight
            b = tl.load(at, mask=(d < D) & (rank == 0), other=0.0).to(tl.float32)
            b += tl.load(at - 1, mask=(d < D) & (rank == 1), other=0.0).to(tl.float32)
            high, rest = split_tf32(b * -LOG2_E)
            middle, rest = split_tf32(rest)
            b = tl.join(tl.where(rank == 0, high, rest), tl.where(rank == 0, middle, 0.0))
            biases = biases + (stack((b,)),)
    w = stack(tiles)  # [groups, warps, 4, 2, quads, tiles]
    if RANKS == 4:
        b = stack(biases)
        w = stack((w, w, b, tl.zeros_like(b)) if DTYPE == tl.float32 else (w, b))
    else:
        w = stack((w, w) if DTYPE == tl.float32 else (w,))
    return tl.reshape(tl.permute(w, (1, 6, 4, 2, 3, 5, 0)), (WARPS, SLOTS, CHANNELS))


@triton.jit
def project(low, weights, bias, DTYPE: tl.constexpr, RANKS: tl.constexpr, STEPS: tl.constexpr):
    """``-(dt @ dt_weight.T + dt_bias)`` in units of log(2), as a tuple of ``STEPS`` tensors [groups, warps, channels].

    ``low`` is what ``load_ranks`` gave of ``dt``, which is of ``DTYPE``; tokens are in the order of ``rows_of_steps``.
    Of float32 the first digits are multiplied by the first of the slots, the others by those that come again. Tensor
    cores read all of half precision. Ones are multiplied by those of ``dt_bias``.
    """
    WARPS: tl.constexpr = weights.shape[0]
    QUADS: tl.constexpr = RANKS // 4
    quads = ()
    for quad in tl.static_range(QUADS):
        steps = ()
        for s in tl.static_range(STEPS):
            steps = steps + (low[s * QUADS + quad],)
        quads = quads + (stack(steps),)
    low = stack(quads)  # [groups, warps, 4, steps, quads]
    parts = (low,)
    if DTYPE == tl.float32:
        parts = split_tf32(low)
    if RANKS == 4:
        one = tl.full(low.shape, 1.0, tl.float32)
        parts = (parts[0], parts[1], one, one) if DTYPE == tl.float32 else (low, one)
    low = stack(parts)
    low = tl.permute(tl.join(low, low), (1, 3, 0, 5, 4, 2, 6))
    low = tl.reshape(low, (WARPS, STEPS * GROUPS, weights.shape[1]))
    if RANKS == 4:
        v = tl.dot(low, weights, input_precision='tf32')
    else:
        v = tl.dot(low, weights, tl.broadcast_to(bias, (WARPS, low.shape[1], weights.shape[2])), input_precision='tf32')
    return _steps_of(v, STEPS)


@triton.jit
def load_projection_pairs(weight, block, D: tl.constexpr, R: tl.constexpr, WARPS: tl.constexpr, CHANNELS: tl.constexpr):
    """As ``load_projection``, for ``project_pairs``: for each sixteen ranks [warps, 32, channels] in bfloat16, the
    weight's first eight digits and eight more."""
    g = tl.arange(0, GROUPS)[:, None, None]
    rank = tl.arange(0, 4)[None, None, :] * 2
    weights = ()
    for first in tl.static_range(0, R, 16):
        tiles = ()
        for tile in tl.static_range(CHANNELS // 8):
            d = (block * WARPS + tl.arange(0, WARPS)[None, :, None]) * CHANNELS
            d += product_channel(tile * 8 + g, CHANNELS)
            halves = ()
            for half in tl.static_range(2):
                r = first + half * 8 + rank
                at = tl.max_contiguous(weight + d * R + r, (1, 1, 4))  # see load_scalars
                here = (d < D) & (r < R)
                w = tl.join(tl.load(at, mask=here, other=0.0), tl.load(at + 1, mask=here, other=0.0))
                w = w.to(tl.float32) * -LOG2_E
                high = w.to(tl.bfloat16)
                halves = halves + (tl.join(high, (w - high.to(tl.float32)).to(tl.bfloat16)),)
            tiles = tiles + (stack(halves),)
        w = stack(tiles)  # [groups, warps, 4, 2 ranks, 2 digits, 2 eights, tiles]
        weights = weights + (tl.reshape(tl.permute(w, (1, 5, 2, 4, 3, 6, 0)), (WARPS, 32, CHANNELS)),)
    return weights


@triton.jit
def _multiplied(x):
    """Bfloat16 for a product; the interpreter would multiply its bits."""
    return x.to(tl.float32) if _INTERPRETED else x


@triton.jit
def project_pairs(low, weights, bias, R: tl.constexpr, STEPS: tl.constexpr):
    """As ``project``, of what ``load_pairs`` and ``load_projection_pairs`` gave."""
    WARPS: tl.constexpr = weights[0].shape[0]
    CHANNELS: tl.constexpr = weights[0].shape[2]
    EIGHTS: tl.constexpr = (R + 7) // 8
    v = tl.broadcast_to(bias, (WARPS, STEPS * GROUPS, CHANNELS))
    for i in tl.static_range(len(weights)):
        halves = ()
        for eight in tl.static_range(2 * i, 2 * i + 2):
            steps = ()
            for s in tl.static_range(STEPS):
                steps = steps + (low[s * EIGHTS + eight] if eight < EIGHTS else tl.zeros_like(low[0]),)
            halves = halves + (stack(steps),)
        pairs = stack(halves)  # [groups, warps, 4, steps, 2 eights]
        first = pairs.to(tl.int16).to(tl.bfloat16, bitcast=True)
        second = (pairs >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        pairs = tl.join(first, second)
        pairs = tl.permute(tl.join(pairs, pairs), (1, 3, 0, 4, 2, 6, 5))
        v = tl.dot(_multiplied(tl.reshape(pairs, (WARPS, STEPS * GROUPS, 32))), _multiplied(weights[i]), v)
    return _steps_of(v, STEPS)


@triton.jit
def stack(parts):
    """A tuple of 1, 2, 4 or 8 tensors as one with another dimension, the last."""
    if len(parts) == 1:
        return tl.reshape(parts[0], parts[0].shape + (1,))
    elif len(parts) == 2:
        return tl.join(parts[0], parts[1])
    elif len(parts) == 4:
        return _joined(tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3])))
    else:
        return _joined(_joined(tl.join(tl.join(tl.join(parts[0], parts[4]), tl.join(parts[2], parts[6])),
                                       tl.join(tl.join(parts[1], parts[5]), tl.join(parts[3], parts[7])))))


@triton.jit
def _joined(x):
    """The last two dimensions of a tensor as one."""
    return tl.reshape(x, x.shape[:-2] + (x.shape[-2] * x.shape[-1],))


@triton.jit
def project_many(dt, weight, bias, walk, start, left, apart, block, D: tl.constexpr, R: tl.constexpr,
                 ROW: tl.constexpr, WARPS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
                 ORDER: tl.constexpr):
    """As ``project``, of ranks too many for a program to hold: sixteen after sixteen, from memory."""
    token, here = tokens_of_rows(walk, start, left, apart, STEPS, ORDER)
    if ORDER == 5:
        second, there = tokens_of_rows(walk, start, left, apart, STEPS, ORDER, True)
    dt += (0 if ORDER else start) * ROW
    d = _product_channels(block, WARPS, CHANNELS)
    v = tl.broadcast_to(bias, (WARPS, GROUPS * STEPS, CHANNELS))
    for first in tl.range(0, R, 16, num_stages=1):
        rank = first + tl.arange(0, 16)
        low = load_tile(dt, token, rank, here, ROW, R).to(tl.float32)
        if ORDER == 5:
            low += load_tile(dt, second, rank, there, ROW, R).to(tl.float32)
            low = low.to(dt.dtype.element_ty).to(tl.float32)
        low = tl.broadcast_to(low[None, :, :], (WARPS, GROUPS * STEPS, 16))
        rank = rank[None, :, None]
        w = tl.load(weight + d * R + rank, mask=(d < D) & (rank < R), other=0.0).to(tl.float32) * -LOG2_E
        high, rest = split_tf32(w)
        if dt.dtype.element_ty == tl.float32:
            low, low_rest = split_tf32(low)
            v = tl.dot(low_rest, high, v, input_precision='tf32')
        v = tl.dot(low, high, v, input_precision='tf32')
        v = tl.dot(low, rest, v, input_precision='tf32')
    return _steps_of(v, STEPS)


@triton.jit
def _steps_of(v, STEPS: tl.constexpr):
    """A product, [warps, tokens, channels], as a tuple of ``STEPS`` tensors [groups, warps, channels]."""
    WARPS: tl.constexpr = v.shape[0]
    CHANNELS: tl.constexpr = v.shape[2]
    v = tl.permute(tl.reshape(v, (WARPS, STEPS, 8, CHANNELS // 8, 4, 2)), (2, 0, 4, 3, 5, 1))
    return _unpack(tl.reshape(v, (8, WARPS, CHANNELS, STEPS)))


@triton.jit
def rows_of_steps(STEPS: tl.constexpr):
    """Tokens as rows of a product: first steps of all groups, second steps, ..."""
    row = tl.arange(0, GROUPS * STEPS)
    return row // GROUPS, row % GROUPS


@triton.jit
def tokens_of_rows(walk, start, left, apart, STEPS: tl.constexpr, ORDER: tl.constexpr, SECOND: tl.constexpr = False):
    """The tokens of ``rows_of_steps``, as ``places`` gives them, and whether they are there."""
    step, group = rows_of_steps(STEPS)
    token = group * apart + step
    here = token < left
    if SECOND:
        token, here = second_of(walk, start + token, here)
    elif ORDER:
        token = token_at(walk, start + token, here, ORDER)
        here = is_token(walk, token, here, ORDER)
    if ORDER:
        token = token.to(tl.int64)
    return token, here


@triton.jit
def _unpack(x):
    """The slices of the last dimension, 4 or 8, as a tuple."""
    x = tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2], x.shape[3] // 2, 2))
    even, odd = tl.split(x)
    if x.shape[3] == 2:
        v0, v2 = tl.split(even)
        v1, v3 = tl.split(odd)
        return v0, v1, v2, v3
    else:
        v0, v2, v4, v6 = _unpack(even)
        v1, v3, v5, v7 = _unpack(odd)
        return v0, v1, v2, v3, v4, v5, v6, v7


@triton.jit
def pack(steps):
    """A tuple of four [groups, ..] as one [.., four, groups]."""
    return tl.join(tl.join(steps[0], steps[2]), tl.join(steps[1], steps[3]))


@triton.jit
def to_product(steps):
    """A tuple of four [groups, warps, 16] as one [warps, tokens, 16] to multiply, in the orders of ``rows_of_steps``
    and ``product_channel``: the compiler has a thread multiply pairs of channels where it holds four."""
    x = pack(steps)
    x = tl.reshape(x, (GROUPS, x.shape[1], 4, 2, 2, 2, 2))
    x = tl.permute(x, (1, 5, 6, 0, 3, 2, 4))
    return tl.reshape(x, (x.shape[0], 4 * GROUPS, 16))
