"""What the kernels share. A tile is ``BLOCK`` squares of 2 x 2 pixels, by channels. Each pixel of the square is a
tensor of its own, so that what one reads serves the others too: 16 pixels are read for four results, not 36.

Squares count on from row to row and from image to image, so tiles are full whatever the size of the map.
"""
import functools

import triton
import triton.language as tl

from ..._core.triton_support import cdiv, next_power_of_2

REGISTERS = 128  # of a thread at most, so that 16 warps of the kernels with a norm run side by side


@functools.lru_cache
def plan(batch, height, width, dim, programs, elements=4, most_channels=None):
    """Grid of at most ``programs`` programs with a run of tiles each, squares there are, squares of a program, squares
    and channels of a tile of which each thread holds ``elements`` channels, warps."""
    channels = max(16, next_power_of_2(dim))
    channels = min(channels, most_channels or channels)
    blocks = cdiv(dim, channels)
    warps = min(max(4, channels // 128), 16)
    block = max(1, 32 * warps * elements // channels)
    squares = batch * cdiv(height, 2) * cdiv(width, 2)
    tiles = cdiv(squares, block)
    share = cdiv(tiles, cdiv(programs, blocks))
    return (cdiv(tiles, share), blocks, 1), squares, share * block, block, channels, warps


def dense(parameter):
    """A parameter, or None, as the kernels read it."""
    return None if parameter is None else parameter.contiguous()


@triton.jit
def locate(first, squares, height, width, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Of a tile of squares: the image of each, its first pixel (int64 if ``WIDE``), and which exist of the four rows
    and four columns that a square and its neighbours cover. Nothing exists past the last square."""
    square = first + tl.arange(0, BLOCK)
    across, high = (width + 1) // 2, (height + 1) // 2
    row = square // across
    x = (square - row * across) * 2
    image = row // high
    y = (row - image * high) * 2
    exists = square < squares
    rows = ((exists & (y > 0))[:, None], exists[:, None], (exists & (y + 1 < height))[:, None],
            (exists & (y + 2 < height))[:, None])
    columns = (x > 0)[:, None], exists[:, None], (x + 1 < width)[:, None], (x + 2 < width)[:, None]
    if WIDE:
        image = image.to(tl.int64)
    return image, ((image * height + y) * width + x)[:, None], rows, columns


@triton.jit
def masked(mask, inside):
    """A mask of squares, and which channels there are; None: all."""
    if inside is None:
        return mask
    else:
        return mask & inside


@triton.jit
def load_window(at, down, rows, columns, inside, STRIDE):
    """The squares at ``at`` and the pixels around them, row by row; zeros where there are none."""
    window = ()
    for i in tl.static_range(4):
        for j in tl.static_range(4):
            mask = masked(rows[i] & columns[j], inside)
            window = window + (tl.load(at + ((i - 1) * down + (j - 1)) * STRIDE, mask=mask, other=0),)
    return window


@triton.jit
def load_square(at, down, rows, columns, inside, STRIDE):
    """The squares at ``at``, zeros for pixels that do not exist."""
    pixels = ()
    for i in tl.static_range(4):
        mask = masked(rows[1 + i // 2] & columns[1 + i % 2], inside)
        pixels = pixels + (tl.load(at + (i // 2 * down + i % 2) * STRIDE, mask=mask, other=0),)
    return pixels


@triton.jit
def load_scale(scale, image, rows):
    """Of the branch, by square."""
    return tl.load(scale + image[:, None], mask=rows[1], other=0).to(tl.float32)


@triton.jit
def add_branch(x, branch, scale):
    """``x + scale * branch`` in float32, pixel by pixel; ``branch`` and ``scale`` may be None."""
    u = ()
    for i in tl.static_range(len(x)):
        if branch is None:
            u = u + (x[i].to(tl.float32),)
        elif scale is None:
            u = u + (x[i].to(tl.float32) + branch[i].to(tl.float32),)
        else:
            u = u + (x[i].to(tl.float32) + branch[i].to(tl.float32) * scale,)
    return u


@triton.jit
def load_channels(at, channel, DIM):
    """A parameter with one element per channel, in float32; zeros if it is None."""
    if at is None:
        values = tl.zeros_like(channel).to(tl.float32)
    else:
        values = tl.load(at + channel, mask=channel < DIM, other=0).to(tl.float32)
    return values[None, :]


@triton.jit
def load_taps(weight, channel, DIM):
    """The nine taps, the one in the middle with the residual. They are read as they lie and then taken apart: threads
    that gathered theirs one by one would touch nine times as many cache lines."""
    tap = tl.arange(0, 16)
    mask = (channel < DIM)[:, None] & (tap < 9)[None, :]
    taps = tl.load(weight + channel[:, None] * 9 + tap[None, :], mask=mask, other=0).to(tl.float32)
    taps += (tap == 4).to(tl.float32)[None, :]
    low, high = tl.split(tl.reshape(taps, [channel.shape[0], 2, 2, 2, 2]))  # bit 0 of the tap's number
    even, odd = _four(low), _four(high)
    return (even[0][None, :], odd[0][None, :], even[1][None, :], odd[1][None, :], even[2][None, :],
            odd[2][None, :], even[3][None, :], odd[3][None, :], even[4][None, :])


@triton.jit
def _four(taps):
    """The first five of eight taps in order."""
    a, b = tl.split(taps)
    a0, a1 = tl.split(a)
    b0, b1 = tl.split(b)
    t0, t4 = tl.split(a0)
    t2, _ = tl.split(a1)
    t1, _ = tl.split(b0)
    t3, _ = tl.split(b1)
    return t0, t1, t2, t3, t4


@triton.jit
def convolve(window, w, bias):
    """The results of the squares from the windows around them."""
    results = ()
    for i in tl.static_range(4):
        value = bias
        for tap in tl.static_range(9):
            value += window[(i // 2 + tap // 3) * 4 + i % 2 + tap % 3] * w[tap]
        results = results + (value,)
    return results


@triton.jit
def row_means(values, DIM: tl.constexpr):
    """Means over the channels of the four pixels of the squares; where they need several warps, these meet once."""
    top, bottom = tl.split(tl.sum(tl.join(tl.join(values[0], values[1]), tl.join(values[2], values[3])), 1) / DIM)
    m0, m1 = tl.split(top)
    m2, m3 = tl.split(bottom)
    return m0[:, None], m1[:, None], m2[:, None], m3[:, None]


@triton.jit
def moments(y, channel, EPS: tl.constexpr, DIM: tl.constexpr):
    """The pixels without their means over the channels, and 1 over their standard deviations."""
    means = row_means(y, DIM)
    centred, squared, rstd = (), (), ()
    for i in tl.static_range(4):
        value = y[i] - means[i]
        if channel.shape[0] != DIM:
            value = tl.where((channel < DIM)[None, :], value, 0)
        centred = centred + (value,)
        squared = squared + (value * value,)
    variances = row_means(squared, DIM)
    for i in tl.static_range(4):
        rstd = rstd + (tl.rsqrt(variances[i] + EPS),)
    return centred, rstd
