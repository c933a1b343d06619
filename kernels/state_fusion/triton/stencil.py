"""What forward and backward share: tiles, weights of the taps, and the rolling sums of the rows.

A program goes down the rows of its columns of pixels. What it reads in a row belongs to the stencils of 7 of the 11
rows around it, so it keeps the sums of 10 rows in registers, the uppermost first; with one more row the uppermost is
finished and another started. Nothing is read twice for being part of several rows.

The taps have an order of their own: those of dilation 2 k + 1 are 8 k to 8 k + 7, row by row without the centre; 24
is the centre, common to all dilations; 25 is not a tap but the skip weight ``D``.
"""
import torch
import triton
import triton.language as tl

from ..._core.triton_support import INTERPRETED, cdiv, launch, next_power_of_2

TAPS = 26
PREFETCHED = tl.constexpr(4)  #: rows; 0 for none
_INTERPRETED = tl.constexpr(INTERPRETED)


def of_state(tensor, dim, n):
    """State ``n`` of a tensor that has them in dimension ``dim``; the tensor itself begins with the first."""
    return tensor.select(dim, n) if n else tensor


def is_wide(pixels, *rows):
    """Whether places in tensors with so many pixels, so far apart, need 64 bits."""
    return pixels * max(rows) >= 2**31


def tile_for(dim, num_warps):
    """Columns of pixels and channels of a program. A thread has one column and two channels, so that their weights
    and sums fit into its registers; a warp has channels side by side, of one column if they are enough."""
    channels = min(64, max(16, next_power_of_2(dim)))
    return 64 * num_warps // channels, channels


def strip_for(height, tiles, programs, longest=2**31):
    """Rows that a program goes down at once: all; fewer, but at least 14, as the 5 above and below are read, too, if
    ``tiles`` of that height were less than ``programs``. Never more than ``longest``."""
    strips = max(cdiv(height, longest), min(cdiv(programs, tiles), height // 14), 1)
    return cdiv(height, strips)


@triton.jit(do_not_specialize=['dim'])
def _taps_kernel(kernel1, kernel3, kernel5, alpha, D, taps, dim, BLOCK: tl.constexpr):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < dim
    centre = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(3):
        kernel = kernel1 if k == 0 else (kernel3 if k == 1 else kernel5)
        scale = tl.load(alpha + k).to(tl.float32)
        for i in tl.static_range(9):
            value = scale * tl.load(kernel + channel * 9 + i, mask=mask).to(tl.float32)
            if i == 4:
                centre += value
            else:
                tl.store(taps + (8 * k + i - (i > 4)) * dim + channel, value, mask=mask)
    tl.store(taps + 24 * dim + channel, centre, mask=mask)
    tl.store(taps + 25 * dim + channel, tl.load(D + channel, mask=mask).to(tl.float32), mask=mask)


def weights_of_taps(D, kernels, alpha, entries=1):
    """``alpha`` times ``kernels``, and ``D``, all dense: (26, D) in float32. It is the first of ``entries`` of that
    shape, the others are left to be filled."""
    dim = D.shape[0]
    taps = D.new_empty((entries, TAPS, dim), dtype=torch.float32)
    launch(_taps_kernel, (cdiv(dim, 32), 1, 1), *kernels, alpha, D, taps, dim, 32, num_warps=1)
    return taps


@triton.constexpr_function
def shift(j):
    """How many columns away the ``j``-th of the seven is that a pixel's taps read."""
    return (-5, -3, -1, 0, 1, 3, 5)[j]


@triton.constexpr_function
def _dilation(distance):
    """Number of the dilation with taps ``distance`` rows away, 1, 3 or 5; -1 if there is none."""
    return {1: 0, 3: 1, 5: 2}.get(abs(distance), -1)


@triton.constexpr_function
def _tap(k, p, q):
    """Number of the tap of dilation ``k`` in row ``p`` and column ``q`` of three."""
    return 24 if p == q == 1 else 8 * k + 3 * p + q - (3 * p + q > 4)


@triton.jit
def put(values, i: tl.constexpr, value):
    """The tuple with another ``i``-th value."""
    return values[:i] + (value,) + values[i + 1:]


@triton.jit
def load_taps(taps, channel, mask, DIM, FLIP: tl.constexpr):
    """The 25 weights of the channels, those of the adjoint (the stencil turned by 180 degrees) for ``FLIP``."""
    weights = ()
    for i in tl.static_range(25):
        if FLIP and i < 24:
            place = taps + (i // 8 * 8 + 7 - i % 8) * DIM
        else:
            place = taps + i * DIM
        weights = weights + (tl.load(place + channel, mask=mask, other=0.0)[None, :],)
    return weights


@triton.constexpr_function
def _column(i):
    """Which of the seven columns tap ``i`` reads."""
    place = i % 8 + (i % 8 > 3)
    return 3 if i == 24 else 3 + (place % 3 - 1) * (i // 8 + 1)


@triton.jit
def keep_column(weights, j: tl.constexpr, where):
    """The weights, those of the taps that read the ``j``-th column 0 except ``where``."""
    for i in tl.static_range(24):
        if _column(i) == j:
            weights = put(weights, i, tl.where(where, weights[i], 0.0))
    return weights


@triton.jit
def near_column(column, j: tl.constexpr, W):
    """The ``j``-th of the seven columns that the taps of ``column`` read, clamped to the map."""
    return tl.minimum(tl.maximum(column + shift(j), 0), W - 1)


@triton.jit
def load_columns(base, places, inside, MASKED: tl.constexpr):
    """The channels of seven columns of a row. Only if some block ends past the last channel is there a mask to pay
    for."""
    values = ()
    for j in tl.static_range(7):
        if MASKED:
            values = values + (tl.load(base + places[j], mask=inside, other=0.0),)
        else:
            values = values + (tl.load(base + places[j]),)
    return values


@triton.jit
def spread(block, CHANNELS: tl.constexpr):
    """Every other channel of a block: one for each thread that holds two."""
    return block * CHANNELS + tl.arange(0, CHANNELS // 2)[None, :] * 2


@triton.jit
def prefetch(base, row, H, stride, places, MASKED: tl.constexpr):
    """Have the L2 cache fetch what is at ``places`` some rows below ``row``. The work on a row takes less time than
    the GPU's memory, and there are no registers to load more rows ahead. Blocks that end past the last channel do
    without, lest a place is outside of the tensor."""
    if PREFETCHED > 0 and not MASKED and not _INTERPRETED:
        address = base + tl.minimum(row + PREFETCHED, H - 1) * stride + places
        tl.inline_asm_elementwise('prefetch.global.L2 [$1]; mov.b32 $0, 0;', '=r,l', [address.to(tl.int64)],
                                  tl.int32, False, 1)


@triton.jit
def prefetch_first(base, row, ROWS: tl.constexpr, H, stride, places, MASKED: tl.constexpr):
    """The same for the rows after the first ``row``, which :func:`prefetch` leaves out: on small maps they are most."""
    for i in tl.static_range(ROWS):
        prefetch(base, row + i + 1 - PREFETCHED, H, stride, places, MASKED)


@triton.jit
def widen(value):
    """``value`` in float32; of bfloat16 by one instruction for each of the two channels of a thread."""
    if value.dtype == tl.bfloat16 and not _INTERPRETED:
        value = tl.inline_asm_elementwise('shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;', '=r,=r,r', [value],
                                          tl.float32, True, 2)
    else:
        value = value.to(tl.float32)
    return value


@triton.jit
def widen_columns(values):
    """The seven values in float32."""
    wide = ()
    for j in tl.static_range(7):
        wide = wide + (widen(values[j]),)
    return wide


@triton.jit
def gather(sums, weights, values, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):
    """Add what the taps read in a row, the seven ``values``, to the sums of the ten rows from 5 above it to 4 below
    it; start that of the row 5 below it. Returns the finished sum of the row 5 above it, and the ten others.

    ``LOWEST``, ``HIGHEST``: the taps whose row, as seen from their pixel, is out of this range are left out."""
    zero = tl.zeros_like(sums[0])
    sums = sums + (zero,)
    for j in tl.static_range(11):
        if LOWEST <= 5 - j and 5 - j <= HIGHEST:
            value = sums[j]
            if j == 5:
                value += weights[24] * values[3]
                for k in tl.static_range(3):
                    value += weights[_tap(k, 1, 0)] * values[2 - k]
                    value += weights[_tap(k, 1, 2)] * values[4 + k]
            elif _dilation(5 - j) >= 0:
                value += weights[_tap(_dilation(5 - j), 2 if j < 5 else 0, 0)] * values[2 - _dilation(5 - j)]
                value += weights[_tap(_dilation(5 - j), 2 if j < 5 else 0, 1)] * values[3]
                value += weights[_tap(_dilation(5 - j), 2 if j < 5 else 0, 2)] * values[4 + _dilation(5 - j)]
            sums = put(sums, j, value)
    return sums[0], sums[1:]


@triton.jit
def correlate(sums, factors, values, LOWEST: tl.constexpr, HIGHEST: tl.constexpr):
    """Add to the sum of every tap what it reads in a row, the seven ``values``, times the factor of the pixel whose
    tap it is; ``factors`` are those of the eleven rows from 5 above it to 5 below it."""
    for j in tl.static_range(11):
        if LOWEST <= 5 - j and 5 - j <= HIGHEST:
            if j == 5:
                sums = put(sums, 24, sums[24] + factors[5] * values[3])
                for k in tl.static_range(3):
                    sums = put(sums, _tap(k, 1, 0), sums[_tap(k, 1, 0)] + factors[5] * values[2 - k])
                    sums = put(sums, _tap(k, 1, 2), sums[_tap(k, 1, 2)] + factors[5] * values[4 + k])
            elif _dilation(5 - j) >= 0:
                for q in tl.static_range(3):
                    sums = put(sums, _tap(_dilation(5 - j), 2 if j < 5 else 0, q),
                               sums[_tap(_dilation(5 - j), 2 if j < 5 else 0, q)]
                               + factors[j] * values[3 + (q - 1) * (_dilation(5 - j) + 1)])
    return sums


@triton.jit
def fold(total, weights, values, distance, P: tl.constexpr):
    """Add the seven ``values`` of a row times the weights of the taps in row ``P`` of three, 0 or 2, of the dilations
    above ``distance``, which is less than 5. By ``fma``, lest the compiler has :func:`gather` take products from here
    and add them by instructions of their own."""
    for k in tl.static_range(3):
        more = total
        for q in tl.static_range(3):
            more = tl.fma(weights[_tap(k, P, q)], values[3 + (q - 1) * (k + 1)], more)
        total = more if k == 2 else tl.where(distance < 2 * k + 1, more, total)
    return total
