"""How the scan is cut into blocks, and the pieces that its forward and backward kernels share.

A program walks blocks of tokens by a block of channels, its warps side by side with 16 or 32 channels each: nothing of
the recurrence crosses warps. Step ``s`` of all eight groups of tokens is one tensor [groups, warps, channels], of which
a thread has one group and a fourth of the channels: within a group the recurrence runs step by step, each step
elementwise, and between groups by exchanges between threads of the maps ``h -> a h + b``.
"""
import torch
import triton
import triton.language as tl

from ..._core.backends import BackendError
from ..._core.triton_math import DIVISION, LOG2_E, exp2, magic_of
from ..._core.triton_support import INTERPRETED, as_rows, cdiv, launch, next_power_of_2, unit_of
from ..dispatch import MOST_RANKS
from ..orders import order_of_map
from .quadtree import Quadtree, home_of, quadtree_of, second_of

#: Arguments of the kernels that change with the size of the map: no kernel is compiled anew for their values.
RUNTIME = ['turn', 'L', 'chunks', 'segs', 'each', 'dt_image', 'B_image', 'C_image', 'order_image', 'order_row',
           'height', 'magic', 'magic_rows', 'roll_y', 'roll_x']
GROUPS = tl.constexpr(8)
_INTERPRETED = tl.constexpr(INTERPRETED)
#: Kinds of orders: that of memory, a table, or sides of a map, walked row by row forwards and backwards or both so and
#: column by column; or a quadtree's sequence both ways, see quadtree.py. ``token_at`` computes tokens of all but the
#: first two.
_NO_ORDER, _TABLE, _BOTH_WAYS, _CROSS, _QUADTREE, _RELEASED = range(6)
#: Sequences are split where images, directions and blocks of channels alone give fewer warps than the first; into as
#: many segments as make the second, by the channels of a warp.
_FEW_WARPS, _ENOUGH_WARPS = 500, {16: 2112, 32: 1584}
#: Between few and so many warps, which are no segments, each needs more that it can do at once.
_MANY_WARPS = 1500
#: Up to so many bytes, which a GPU's cache has room for, each of several directions has memory for its sums, so that
#: none waits for another. Else each adds to what those before it left: nothing of a direction is written.
_FEW_BYTES = 16 * 2**20
#: Above so many slots, see ``projection.load_projection``, a program does not hold them: a thread has 255 registers.
_MOST_SLOTS = 64
#: And up to so many, its warps may have 32 channels.
_MOST_SLOTS_WIDE = 16
#: Above the first and up to the second, ranks of bfloat16 are multiplied in pairs: with fewer, products are half empty.
_FEW_RANKS, _MOST_RANKS_IN_PAIRS = 12, 48


def _segments(warps, blocks, longest, channels=16):
    """Into how many segments a sequence of ``blocks`` blocks of tokens is split where there are ``warps`` independent
    warps of so many ``channels``, and the blocks of each, at most ``longest``. Segments cost another pass over the
    input, so there is one if that keeps a GPU busy."""
    if warps * channels >= _FEW_WARPS * 16 or blocks < 8:
        return 1, max(blocks, 1)
    each = min(max(2, cdiv(blocks * warps, _ENOUGH_WARPS[channels])), longest)
    return cdiv(blocks, each), each


def _dense(tensor):
    """``tensor`` with its last dimension dense."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _in_pairs(dt):
    """Whether numbers of ``dt`` are bfloat16 that can be loaded, and multiplied, two at a time."""
    begin = dt.data_ptr() or 2 * dt.storage_offset()  # meta tensors have no address
    odd = [n for size, n in zip(dt.shape[:-1], dt.stride()[:-1], strict=True) if size > 1 and n % 2]
    return dt.dtype == torch.bfloat16 and begin % 4 == 0 and dt.shape[-1] % 2 == 0 and not odd


class Launch:
    """The shapes of one call, and the launch of kernels whose first arguments are those of the operator. ``alone``:
    the steps where a warp has few beside it that could work while it waits. ``wide``: warps have 32 channels where
    there are segments and a thread can hold that."""

    def __init__(self, x, dt, A, B, C, weight, bias, skip, order, chunk, warps, steps, log, alone=None, wide=False):
        (self.batch, self.L, self.D), (self.K, self.R), self.N = x.shape, dt.shape[2:], B.shape[3]
        self.output, self.chunks = C is not None, cdiv(self.L, chunk)
        self.in_turn = self.K > 1 and 4 * self.K * x.numel() > _FEW_BYTES
        dt = _dense(dt)
        ranks = max(4, next_power_of_2(self.R))
        slots = 2 * ranks * (1 if dt.dtype.itemsize == 2 else 2) * (2 if ranks == 4 else 1)  # see projection.py
        slots = slots if slots <= _MOST_SLOTS else 0
        pairs = _FEW_RANKS < self.R <= _MOST_RANKS_IN_PAIRS and _in_pairs(dt)
        wide = wide and 0 < slots <= _MOST_SLOTS_WIDE and x.dtype.itemsize == 2 and self.D % 32 == 0
        for self.channels in (32, 16) if wide else (16,):
            self.num_warps = min(warps, next_power_of_2(cdiv(self.D, self.channels)))
            self.blocks = cdiv(self.D, self.channels * self.num_warps)
            programs = self.batch * self.blocks * (1 if self.output else self.N) * (1 if self.in_turn else self.K)
            if _segments(programs * self.num_warps, cdiv(self.L, 8 * steps), self.L, self.channels)[0] > 1:
                break
        # Images follow one another, so that the compiler knows how they are aligned.
        self.x, x_row = as_rows(x, 2)
        B = _dense(B)
        C = B if C is None else _dense(C)
        order_image = order_row = height = magic = magic_rows = roll_y = roll_x = 0
        kind, self.rows = _NO_ORDER, self.L
        if isinstance(order, Quadtree):
            kind = _QUADTREE
            if order.token_order == 'released':
                kind, self.rows = _RELEASED, self.L + self.L // 8
            (height, magic, magic_rows, roll_y, roll_x), order = order.arguments(), order.selected
        elif isinstance(order, tuple) and self.L * order[0] >> DIVISION.value:
            order = order_of_map(order, self.K, x.device)
        if isinstance(order, tuple):
            kind, height, magic, order = _CROSS if self.K > 2 else _BOTH_WAYS, order[0], magic_of(order[0]), None
        elif order is not None and kind == _NO_ORDER:
            kind, order = _TABLE, _dense(order)
            order_row = order.stride(-2) if order.dim() > 1 else 0
            order_image = order.stride(0) if order.dim() == 3 else 0
        self.tensors = (self.x, dt, A.contiguous(), B, C, weight.contiguous(), bias.contiguous(),
                        None if skip is None else skip.contiguous(), order)
        if alone and _FEW_WARPS <= programs * self.num_warps < _MANY_WARPS:
            steps = alone
        # Within a segment places have 32 bits.
        widest = 8 * steps * max(x_row, self.N * self.D, *(t.stride(1) for t in (dt, B, C)))
        self.segments, self.each = _segments(programs * self.num_warps, cdiv(self.L, 8 * steps),
                                             max((2**31 - 1) // widest, 1), self.channels)
        if self.R > MOST_RANKS:
            raise BackendError(f"selective_scan: 'triton' takes dt of rank 1 to {MOST_RANKS}, got {self.R}; use "
                               "mmvssm.kernels.use_backend('torch')")
        self.steps = steps
        self.numbers = (self.L, self.chunks, self.segments, self.each, dt.stride(0), B.stride(0),
                        C.stride(0), order_image, order_row, height, magic, magic_rows, roll_y, roll_x,
                        self.D, self.N, self.K, self.R, x_row,
                        dt.stride(1), dt.stride(2), B.stride(1), B.stride(2), C.stride(1), C.stride(2), ranks, slots,
                        pairs, self.num_warps, self.channels, steps, chunk, self.output, skip is not None,
                        kind, log)

    def maps(self, each):
        """Memory for what segments do to states, ``each`` map by map, or None where there is one segment."""
        if self.segments == 1:
            return None
        return self.x.new_empty((self.batch, self.K, self.N, self.segments, each, 2, self.D), dtype=torch.float32)

    def sums(self):
        """Memory for what is added up over directions and states: (batch, L, D) in float32, or for each direction where
        they are not taken in turn, (batch, K, L, D). None if there is one of each."""
        shape = (self.batch, self.L, self.D) if self.in_turn else (self.batch, self.K, self.L, self.D)
        return self.x.new_empty(shape, dtype=torch.float32) if self.K * self.N > 1 else None

    def launches(self):
        """Of each launch that a pass over all directions takes, the first direction and the number of those which know
        nothing of each other; (0, 0) are all, each of which adds to what is there from the one before. Where a sequence
        has segments, whose tokens change with the direction, that takes a launch for each."""
        if not self.in_turn:
            return [(0, self.K)]
        return [(0, 0)] if self.segments == 1 else [(k, 1) for k in range(self.K)]

    def __call__(self, kernel, programs, *buffers, directions=None, constants, **options):
        """Launch ``kernel`` with ``programs`` per image, direction, segment and block of channels. ``directions``: one
        of :meth:`launches`, None for all side by side. The last arguments are ``constants``."""
        turn, at_once = directions or (0, self.K)
        programs *= self.blocks * self.segments * self.batch * max(at_once, 1)
        launch(kernel, (programs, 1, 1), *self.tensors, *buffers, turn, *self.numbers, at_once, *constants,
               num_warps=self.num_warps, **options)


@triton.jit
def assignment(program, turn, segs, BLOCKS: tl.constexpr, NS: tl.constexpr, AT_ONCE: tl.constexpr):
    """The block of channels, segment, state, direction and image of a program; ``turn``, ``AT_ONCE``: see
    ``Launch.launches``."""
    row = program // BLOCKS // segs
    DIRECTIONS: tl.constexpr = max(AT_ONCE, 1)
    image = (row // NS // DIRECTIONS).to(tl.int64)
    return program % BLOCKS, program // BLOCKS % segs, row % NS, turn + row // NS % DIRECTIONS, image


@triton.jit
def load_rate(A, LOG: tl.constexpr, mask):
    """``A`` in float32, or with ``LOG`` the number whose opposite's logarithm is there."""
    return rate_of(tl.load(A, mask=mask, other=0.0), LOG)


@triton.jit
def rate_of(rate, LOG: tl.constexpr):
    """See ``load_rate``."""
    rate = rate.to(tl.float32)
    if LOG:
        rate = -exp2(rate * LOG2_E)
    return rate


@triton.jit
def prefetch(at):
    """A hint to bring the memory at some addresses to the L2 cache, 128 bytes at each."""
    if not _INTERPRETED:
        tl.inline_asm_elementwise('prefetch.global.L2 [$1]; mov.b32 $0, 0;', '=r,l', [at.to(tl.int64)], tl.int32, False,
                                  1)


@triton.jit
def ask_now(count):
    """Keeps the assembler from moving loads behind this, nearer to where they are waited for: a branch, never taken,
    ends what it puts in order at once. ``count``: a number that is not negative."""
    if not _INTERPRETED:
        tl.inline_asm_elementwise('{ .reg .pred p; setp.lt.s32 p, $1, 0; @p exit; mov.b32 $0, 0; }', '=r,r', [count],
                                  tl.int32, False, 1)


@triton.jit
def _swap(x, BIT: tl.constexpr):
    """[groups, ..] with groups exchanged whose numbers differ in ``BIT`` alone."""
    pairs = tl.reshape(x.to(tl.int32, bitcast=True), (GROUPS >> (BIT + 1), 2, 1 << BIT, x.shape[1], x.shape[2]))
    # The exclusive or of both and one of them is the other; of all this, an exchange between threads remains.
    return tl.reshape(tl.xor_sum(pairs, 1, keep_dims=True) ^ pairs, x.shape).to(tl.float32, bitcast=True)


@triton.jit
def _is_late(BIT: tl.constexpr):
    """Whether of two groups that ``_swap`` exchanges this is the later one."""
    return (tl.arange(0, GROUPS)[:, None, None] >> BIT) % 2 == 1


@triton.jit
def through_groups(a, b, REVERSE: tl.constexpr = False):
    """Groups apply the maps ``h -> a h + b``, [groups, warps, channels], one after the other, ``REVERSE`` from the last
    to the first. Returns (a, b) of all of them together, and of the map up to each group without it."""
    to_a = a * 0 + 1
    to_b = b * 0
    for BIT in tl.static_range(3):
        late = _is_late(BIT) != REVERSE
        other_a, other_b = _swap(a, BIT), _swap(b, BIT)
        to_b = tl.where(late, to_a * other_b + to_b, to_b)
        to_a = tl.where(late, to_a * other_a, to_a)
        b = tl.where(late, a * other_b + b, other_a * b + other_b)
        a = a * other_a
    return a, b, to_a, to_b


@triton.jit
def both_ways(a, b, r):
    """As ``through_groups`` for ``h -> a h + b`` from the first group to the last, and for ``g -> a g + r`` from the
    last to the first. Returns (a, r) of all groups together, (a, b) up to each group, and (a, r) behind each."""
    to_a = a * 0 + 1
    to_b = b * 0
    from_a = to_a
    from_r = to_b
    for BIT in tl.static_range(3):
        late = _is_late(BIT)
        other_a, other_b, other_r = _swap(a, BIT), _swap(b, BIT), _swap(r, BIT)
        to_b = tl.where(late, to_a * other_b + to_b, to_b)
        to_a = tl.where(late, to_a * other_a, to_a)
        from_r = tl.where(late, from_r, from_a * other_r + from_r)
        from_a = tl.where(late, from_a, from_a * other_a)
        b = tl.where(late, a * other_b + b, other_a * b + other_b)
        r = tl.where(late, other_a * r + other_r, a * other_r + r)
        a = a * other_a
    return a, r, to_a, to_b, from_a, from_r


@triton.jit
def fours(block, WARPS: tl.constexpr, CHANNELS: tl.constexpr):
    """The channels of threads four by four, a tuple of one or two [1, warps, 16]: of float32, a thread loads and stores
    no more at once, and more would move between threads."""
    i = tl.arange(0, 16)[None, None, :]
    d = (block * WARPS + tl.arange(0, WARPS)[None, :, None]) * CHANNELS + i // 4 * (CHANNELS // 4) + i % 4
    if CHANNELS == 16:
        return (d,)
    else:
        return d, d + 4


@triton.jit
def load_fours(at, ds, there, D: tl.constexpr, other):
    """[groups, warps, channels] in float32, of channels ``ds`` by ``fours``."""
    first = tl.load(at + ds[0], mask=there & (ds[0] < D), other=other)
    if len(ds) == 1:
        return first
    else:
        second = tl.load(at + ds[1], mask=there & (ds[1] < D), other=other)
        SHAPE: tl.constexpr = (first.shape[0], first.shape[1], 4, 4)
        x = tl.permute(tl.join(tl.reshape(first, SHAPE), tl.reshape(second, SHAPE)), (0, 1, 2, 4, 3))
        return tl.reshape(x, (first.shape[0], first.shape[1], 32))


@triton.jit
def store_fours(at, ds, x, there, D: tl.constexpr):
    """Stores as ``load_fours`` loads."""
    if len(ds) == 1:
        tl.store(at + ds[0], x, mask=there & (ds[0] < D))
    else:
        first, second = tl.split(tl.permute(tl.reshape(x, (x.shape[0], x.shape[1], 4, 2, 4)), (0, 1, 2, 4, 3)))
        SHAPE: tl.constexpr = (x.shape[0], x.shape[1], 16)
        tl.store(at + ds[0], tl.reshape(first, SHAPE), mask=there & (ds[0] < D))
        tl.store(at + ds[1], tl.reshape(second, SHAPE), mask=there & (ds[1] < D))


@triton.jit
def state_before(maps, count, first, step, D: tl.constexpr, MAP: tl.constexpr, ds):
    """The state, [groups, warps, channels] with all groups alike, that ``count`` segments leave behind, each a map
    ``h -> a h + b``; they start at segment ``first`` and go by ``step``. ``maps``: a and b, (2, D), every ``MAP``.
    ``ds``: channels by ``fours``."""
    g = tl.arange(0, GROUPS)[:, None, None]
    each = tl.cdiv(count, GROUPS)
    a = tl.full([GROUPS, ds[0].shape[1], 16 * len(ds)], 1.0, tl.float32)
    b = a * 0
    for i in tl.range(0, each, num_stages=1, loop_unroll_factor=8):
        there = g * each + i < count
        place = maps + (first + step * (g * each + i)).to(tl.int64) * MAP
        by = load_fours(place, ds, there, D, 1.0)
        b = by * b + load_fours(place + D, ds, there, D, 0.0)
        a *= by
    return through_groups(a, b)[1]


@triton.jit
def inside_of(runs, left, STEPS: tl.constexpr):
    """Whether the groups' tokens are there, for each step."""
    here = ()
    for s in tl.static_range(STEPS):
        here = here + (runs + s < left,)
    return here


@triton.jit
def walk_of(order, image, k, L, K: tl.constexpr, order_image, order_row, height, magic, magic_rows, roll_y, roll_x,
            ORDER: tl.constexpr):
    """For ``token_at``: the table of an image and direction, or what computes that. ``ORDER``: see ``_TABLE``."""
    if ORDER == 1:
        return order + image * order_image + k * order_row
    elif ORDER > 3:
        return quadtree_of(order + image * 4, k, L, height, magic, magic_rows, roll_y, roll_x, ORDER == 5)
    elif ORDER > 1:
        back = k >= (K + 1) // 2
        return tl.where(back, L - 1, 0), tl.where(back, -1, 1), k % 2 == 1, height, L // height, magic
    else:
        return ()


@triton.jit
def token_at(walk, position, here, ORDER: tl.constexpr):
    """Tokens at some positions of a direction's sequence, of which some are ``here``; int32. ``walk``: by ``walk_of``.
    Where there is none, of a quadtree, L and more: see ``home_of``."""
    if ORDER == 1:
        return tl.load(walk + position, mask=here, other=0).to(tl.int32)
    elif ORDER > 3:
        return home_of(walk, position, ORDER == 5)
    else:
        first, sign, by_columns, height, width, magic = walk
        token = first + sign * position.to(tl.int32)
        if ORDER == 3:
            column = ((token.to(tl.int64) * magic) >> DIVISION).to(tl.int32)
            token = tl.where(by_columns, (token - column * height) * width + column, token)
        return token


@triton.jit
def among_tokens(walk, rows, here, ORDER: tl.constexpr):
    """Which of the rows that are ``here`` are tokens; see ``token_at``."""
    if ORDER == 5:
        there = ()
        for s in tl.static_range(len(here)):
            there = there + (is_token(walk, rows[s], here[s][:, None, None], ORDER),)
        return there
    else:
        return here


@triton.jit
def is_token(walk, row, here, ORDER: tl.constexpr):
    """Whether a row of ``token_at``, if it is ``here``, is a token."""
    if ORDER == 5:
        here = here & (row < walk[0])
    return here


@triton.jit
def places(walk, start, runs, left, WARPS: tl.constexpr, STEPS: tl.constexpr, ORDER: tl.constexpr,
           SECOND: tl.constexpr = False):
    """For each step, where the groups' tokens are, as rows behind that of ``start``, or with ``ORDER`` behind the
    first; and whether they are. ``SECOND``: where positions have a second token, see ``second_of``."""
    here = inside_of(runs, left, STEPS)
    rows, there = (), ()
    if ORDER > 3:
        for s in tl.static_range(STEPS):
            if s % 4 == 0:
                four = _four_places(walk, start, runs + s, left - s, WARPS, ORDER, SECOND)
            row = tl.gather(four, tl.full(four.shape, s % 4, tl.int32), 2)
            rows = rows + (row,)
            there = there + (row >= 0 if SECOND else is_token(walk, row, here[s][:, None, None], ORDER),)
    else:
        for s in tl.static_range(STEPS):
            row = runs
            if ORDER:
                row = token_at(walk, start + runs + s, here[s], ORDER)
            rows, there = rows + (row,), there + (here[s],)
    return rows, there


@triton.jit
def _four_places(walk, start, runs, left, WARPS: tl.constexpr, ORDER: tl.constexpr, SECOND: tl.constexpr):
    """The rows of four steps of a quadtree, [groups, warps, 4]: they take some thirty instructions each, so that a
    thread computes one and asks those beside it. ``SECOND``: -1 where there is none."""
    token = runs[:, None, None] + tl.arange(0, 4)[None, None, :]
    here = token < left
    if SECOND:
        token, here = second_of(walk, start + token, here)
        token = tl.where(here, token, -1)
    else:
        token = token_at(walk, start + token, here, ORDER)
    return tl.broadcast_to(token, (GROUPS, WARPS, 4))


@triton.jit
def spread(x, CHANNELS: tl.constexpr):
    """[groups, warps, 4] as [groups, warps, channels]: a fourth of the channels for each."""
    x = tl.broadcast_to(tl.reshape(x, x.shape + (1,)), x.shape + (CHANNELS // 4,))
    return tl.reshape(x, (x.shape[0], x.shape[1], CHANNELS))


@triton.jit
def row_at(row, ROW: tl.constexpr, ORDER: tl.constexpr, CHANNELS: tl.constexpr = 4):
    """Where rows of ``places`` begin, [groups, 1, 1], or of a quadtree [groups, warps, channels]; with ``ORDER`` that
    may take 64 bits."""
    if ORDER > 3:
        at = row if CHANNELS == 4 else spread(row, CHANNELS)
        POWER: tl.constexpr = min(ROW & -ROW, 16)  # the compiler does not see through what threads exchange
        return tl.max_constancy(tl.multiple_of(at.to(tl.int64) * ROW, (1, 1, POWER)), (1, 1, CHANNELS))
    elif ORDER:
        return row[:, None, None].to(tl.int64) * ROW
    else:
        return row[:, None, None] * ROW


@triton.jit
def mask_at(here, CHANNELS: tl.constexpr = 4):
    """Which of ``row_at`` are here, by what ``places`` says."""
    if len(here.shape) == 1:
        return here[:, None, None]
    elif CHANNELS > 4 and here.shape[2] == 4:
        number = spread(here.to(tl.int32), CHANNELS) + 1  # what is added keeps what the compiler is told, see row_at
        return tl.max_constancy(number, (1, 1, CHANNELS)) > 1
    else:
        return here


@triton.jit
def load_steps(base, rows, here, d, in_d, ROW: tl.constexpr, ORDER: tl.constexpr):
    """Elements ``d`` of the rows of each step, in their own precision."""
    loaded = ()
    for s in tl.static_range(len(rows)):
        at = base + row_at(rows[s], ROW, ORDER, d.shape[2]) + d
        there = mask_at(here[s], d.shape[2]) & in_d
        loaded = loaded + (tl.load(at + (0 if ORDER else s * ROW), mask=there, other=0.0),)
    return loaded


@triton.jit
def store_steps(base, ats, values, here, in_d):
    """Stores by step what ``load_steps`` would load."""
    for s in tl.static_range(len(values)):
        tl.store(base + ats[s], values[s], mask=mask_at(here[s], values[s].shape[2]) & in_d)


@triton.jit
def store_rows(base, rows, values, here, d, in_d, ROW: tl.constexpr):
    """Stores by step, at rows behind the first."""
    for s in tl.static_range(len(values)):
        at = base + row_at(rows[s], ROW, 5, d.shape[2]) + d
        tl.store(at, values[s], mask=mask_at(here[s], d.shape[2]) & in_d)


@triton.jit
def load_scalars(base, walk, start, runs, left, ROW: tl.constexpr, WARPS: tl.constexpr, STEPS: tl.constexpr,
                 ORDER: tl.constexpr, SECOND: tl.constexpr = False):
    """One element of each token, [groups, warps, 4] for every four steps, for ``of_steps``: four threads that want the
    same ones load one each. ``SECOND``: as for ``places``."""
    base += (0 if ORDER else start) * ROW
    loaded = ()
    for first in tl.static_range(0, STEPS, 4):
        token = runs[:, None, None] + (first + tl.arange(0, 4)[None, None, :])
        here = token < left
        if SECOND:
            token, here = second_of(walk, start + token, here)
        elif ORDER:
            token = token_at(walk, start + token, here, ORDER)
            here = is_token(walk, token, here, ORDER)
        if ORDER:
            token = token.to(tl.int64)
        at = tl.broadcast_to(base + token * ROW, (GROUPS, WARPS, 4))
        # They need not be, but so the compiler takes a thread for each of four, as ``of_steps`` does; none loads two.
        at = tl.max_contiguous(at, (1, 1, 4))
        loaded = loaded + (tl.load(at, mask=tl.broadcast_to(here, at.shape), other=0.0),)
    return loaded


@triton.jit
def of_steps(scalars, STEPS: tl.constexpr, CHANNELS: tl.constexpr):
    """What ``load_scalars`` loaded, in float32, by step: [groups, warps, channels], all channels alike."""
    values = ()
    for s in tl.static_range(STEPS):
        x = scalars[s // 4].to(tl.float32)
        x = tl.gather(x, tl.full(x.shape, s % 4, tl.int32), 2)
        values = values + (spread(x, CHANNELS),)
    return values


@triton.jit
def widen(values):
    """A tuple in float32. Of what a loop carries, tensors of a thread's channels are widened first: halves take as many
    registers, and more work."""
    wide = ()
    for i in tl.static_range(len(values)):
        value = values[i]
        if value.dtype == tl.bfloat16 and value.shape[2] >= 16 and not _INTERPRETED:  # both of a register at once
            value = tl.inline_asm_elementwise('shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;', '=f,=f,r', [value],
                                              tl.float32, True, 2)
        wide = wide + (value.to(tl.float32),)
    return wide


@triton.jit
def add_steps(values, more):
    """Sums of two tuples of tensors, rounded to their own precision."""
    sums = ()
    for i in tl.static_range(len(values)):
        sums = sums + ((values[i].to(tl.float32) + more[i].to(tl.float32)).to(values[i].dtype),)
    return sums


@triton.jit
def add_pairs(values, more):
    """As ``add_steps``, of two numbers of bfloat16 in each 32 bits."""
    sums = ()
    for i in tl.static_range(len(values)):
        first = (values[i] << 16).to(tl.float32, bitcast=True) + (more[i] << 16).to(tl.float32, bitcast=True)
        second = (values[i] & -65536).to(tl.float32, bitcast=True) + (more[i] & -65536).to(tl.float32, bitcast=True)
        first = first.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 65535
        second = second.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16
        sums = sums + (first | second,)
    return sums


@triton.jit(do_not_specialize=['size', 'tiles'])
def _add_directions(parts, total, size, tiles, UNIT: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    SIZE = size * UNIT
    image = (tl.program_id(0) // tiles).to(tl.int64)
    place = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    parts += image * K * SIZE
    value = tl.load(parts + place, mask=place < SIZE, other=0.0)
    for k in tl.static_range(1, K):
        value += tl.load(parts + tl.cast(k, tl.int64) * SIZE + place, mask=place < SIZE, other=0.0)
    tl.store(total + image * SIZE + place, value, mask=place < SIZE)


def add_directions(parts, dtype):
    """Float32 ``parts`` (batch, K, L, D), contiguous, added up in the order of K: (batch, L, D) in ``dtype``."""
    batch, K, L, D = parts.shape
    if K == 1 or not parts.numel() or L * D > 2**31 - 4096:
        return (parts.squeeze(1) if K == 1 else parts.sum(1)).to(dtype)
    total, unit = parts.new_empty((batch, L, D), dtype=dtype), unit_of(L * D)
    tiles = cdiv(L * D, 4096)
    launch(_add_directions, (batch * tiles, 1, 1), parts, total, L * D // unit, tiles, unit, K, 4096, num_warps=8)
    return total
