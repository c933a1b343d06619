"""How the scan is cut into tiles of channels and steps, and the pieces that its forward and backward kernels share.

A program walks chunks of steps with a few channels, a warp for each where the sequence is long. A thread has a run of
eight adjacent steps: eight tensors [channels, runs], the first steps of all runs, the second ones, and so on. State by
state, it runs the recurrence over its steps from zero, runs tell each other what they do to a state, ``h -> a h + b``,
and it runs again from the right one. The states between chunks are a tile [channels, runs, states / runs] in registers.
"""
import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ..._core.triton_math import LOG2_E, exp2, slope_of, soft_step
from ..._core.triton_support import cdiv, launch, next_power_of_2

#: Elements of 16 bytes of half precision. Where all strides are multiples of them, threads load as many at once.
UNIT = tl.constexpr(8)
#: Adjacent steps that a thread has, one after the other.
RUN = tl.constexpr(8)
#: Arguments of the kernels for whose values none is compiled anew; strides are in units of what they are known to be
#: multiples of.
RUNTIME = ['batch', 'D', 'L', 'N', 'chunks', 'segs', 'each', 'span', 'span_blocks', 'B_span', 'C_span', 'u_batch',
           'u_stride', 'delta_batch', 'delta_stride', 'z_batch', 'z_stride', 'grad_batch', 'grad_stride', 'B_batch',
           'B_group', 'B_row', 'C_batch', 'C_group', 'C_row']
#: Numbers that a warp has of a tile of steps or of states, at most: 8 a thread.
_WARP = 256
#: The sequence is cut into segments where images and channels give fewer warps than the first, so that there are about
#: as many as the second. Not measured yet.
_FEW_WARPS, _ENOUGH_WARPS = 132 * 4, 132 * 8


@triton.jit
def place(D, segs, each, chunks, span, span_blocks, BLOCK_D: tl.constexpr, CHANNEL_UNIT: tl.constexpr):
    """Of this program: block of channels and blocks of an image, image, segment, its first chunk and what is behind its
    last one, the first channel, channels, and whether they are in its span: those that share B and C."""
    pid = tl.program_id(0)
    span = span // CHANNEL_UNIT * CHANNEL_UNIT  # as it is, and the compiler knows
    blocks = D // span * span_blocks
    block = pid % blocks
    seg = pid // blocks % segs
    image = (pid // blocks // segs).to(tl.int64)
    within = block % span_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = block // span_blocks * span
    return (block, blocks, image, seg, seg * each, tl.minimum((seg + 1) * each, chunks), begin,
            (begin + within).to(tl.int64), within < span)


@triton.jit
def ends_of(L, STEP_UNIT: tl.constexpr):
    """The length of rows of steps, and of those of ``B`` and ``C``, which are padded; the compiler knows what both are
    multiples of."""
    return L // STEP_UNIT * STEP_UNIT, (L.to(tl.int64) + UNIT - 1) // UNIT * UNIT


@triton.jit
def rows_of(tensor, image, batch_stride, d, stride, LAST: tl.constexpr, STEP_UNIT: tl.constexpr,
            CHANNEL_UNIT: tl.constexpr):
    """Where the channels ``d`` of a tensor (B, D, L) begin, [channels, 1]. Its steps are adjacent and ``stride`` is
    from a channel to the next, or with ``LAST`` its channels are, and it is from a step to the next."""
    if LAST:
        return tensor + image * batch_stride * CHANNEL_UNIT + d[:, None]
    else:
        return tensor + image * batch_stride * STEP_UNIT + d[:, None] * stride * STEP_UNIT


@triton.jit
def load_walked(rows, t, stride, inside, LAST: tl.constexpr, CHANNEL_UNIT: tl.constexpr):
    """[channels, steps] in float32 of what ``rows_of`` found, zero where there is nothing."""
    if LAST:
        at = rows + t.to(tl.int64)[None, :] * stride * CHANNEL_UNIT
    else:
        at = rows + t[None, :]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def steps_of(delta, bias, inside, SOFTPLUS: tl.constexpr):
    """Steps in units of log(2), zero behind the last, where a state stays as it is; and what they are made of, as
    ``slope_of`` takes it."""
    raw = (delta + bias[:, None]) * -LOG2_E
    step = soft_step(raw) if SOFTPLUS else -raw
    return tl.where(inside, step, 0.0), raw


@triton.jit
def through_softplus(grad, raw, SOFTPLUS: tl.constexpr):
    return grad * slope_of(raw) if SOFTPLUS else grad


@triton.jit
def load_parameter(tensor, d, in_d):
    """A parameter (D,) in float32, zero if there is none."""
    if tensor is None:
        return tl.zeros(d.shape, tl.float32)
    else:
        return tl.load(tensor + d, mask=in_d, other=0.0).to(tl.float32)


@triton.jit
def load_projection(tensor, n, d, in_d, t, inside, N, row, CONSTANT: tl.constexpr):
    """State ``n`` of B or C, [channels, steps], or [channels, 1] where it is constant. Each warp loads its own: what
    they share out goes through shared memory, and they wait for each other."""
    if CONSTANT:
        return tl.load(tensor + d * N + n, mask=in_d, other=0.0).to(tl.float32)[:, None]
    else:
        at = tl.broadcast_to(tensor + n * row.to(tl.int64) * UNIT + t[None, :], inside.shape)
        return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def runs_of(x):
    """[channels, steps] as a tuple of eight [channels, runs]: the first steps of all runs, the second ones, ..."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // RUN, 2, 2, 2)))
    s04, s26 = tl.split(even)
    s15, s37 = tl.split(odd)
    s0, s4 = tl.split(s04)
    s2, s6 = tl.split(s26)
    s1, s5 = tl.split(s15)
    s3, s7 = tl.split(s37)
    return s0, s1, s2, s3, s4, s5, s6, s7


@triton.jit
def steps_in_order(x):
    """What ``runs_of`` took apart."""
    even = tl.join(tl.join(x[0], x[4]), tl.join(x[2], x[6]))
    odd = tl.join(tl.join(x[1], x[5]), tl.join(x[3], x[7]))
    return tl.reshape(tl.join(even, odd), (x[0].shape[0], x[0].shape[1] * RUN))


@triton.jit
def no_runs(CHANNELS: tl.constexpr, TILE: tl.constexpr):
    """Eight [channels, runs] of zeros."""
    zeros = ()
    for _ in tl.static_range(RUN):
        zeros = zeros + (tl.zeros([CHANNELS, TILE // RUN], tl.float32),)
    return zeros


@triton.jit
def _fours(begin, TILE: tl.constexpr):
    """Four adjacent steps of each run, [runs, 1, 4]. Of 32 bits a thread loads and stores no more at once: of a tile of
    all steps it would have half a run. Runs come first, lest a warp have several channels."""
    return begin + tl.arange(0, TILE // RUN)[:, None, None] * RUN + tl.arange(0, 4)[None, None, :]


@triton.jit
def _load_fours(at, mask):
    """A tuple of four [channels, runs] from [runs, channels, 4]."""
    x = tl.load(tl.broadcast_to(at, mask.shape), mask=mask, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], 2, 2)))
    s0, s2 = tl.split(even)
    s1, s3 = tl.split(odd)
    return tl.trans(s0), tl.trans(s1), tl.trans(s2), tl.trans(s3)


@triton.jit
def walked_runs(rows, begin, end, stride, in_d, LAST: tl.constexpr, CHANNEL_UNIT: tl.constexpr, TILE: tl.constexpr):
    """``load_walked`` in runs, of the chunk that begins at step ``begin``."""
    if rows.dtype.element_ty.primitive_bitwidth == 32:
        runs = ()
        for half in tl.static_range(2):
            t = _fours(begin + 4 * half, TILE)
            mask = in_d[None, :, None] & (t < end)
            if LAST:
                runs = runs + _load_fours(tl.trans(rows)[:, :, None] + t.to(tl.int64) * stride * CHANNEL_UNIT, mask)
            else:
                runs = runs + _load_fours(tl.trans(rows)[:, :, None] + t, mask)
        return runs
    else:
        t = begin + tl.arange(0, TILE)
        return runs_of(load_walked(rows, t, stride, in_d[:, None] & (t < end)[None, :], LAST, CHANNEL_UNIT))


@triton.jit
def projection_runs(tensor, n, d, in_d, begin, padded, N, row, CONSTANT: tl.constexpr, TILE: tl.constexpr):
    """``load_projection`` in runs, likewise."""
    if CONSTANT:
        x = load_projection(tensor, n, d, in_d, 0, in_d, N, row, True)
        return x, x, x, x, x, x, x, x
    elif tensor.dtype.element_ty.primitive_bitwidth == 32:
        runs = ()
        for half in tl.static_range(2):
            t = _fours(begin + 4 * half, TILE)
            runs = runs + _load_fours(tensor + n * row.to(tl.int64) * UNIT + t, in_d[None, :, None] & (t < padded))
        return runs
    else:
        t = begin + tl.arange(0, TILE)
        return runs_of(load_projection(tensor, n, d, in_d, t, in_d[:, None] & (t < padded)[None, :], N, row, False))


@triton.jit
def store_runs(rows, runs, begin, end, in_d, TILE: tl.constexpr):
    """Stores what comes in runs in rows of adjacent steps, [channels, 1]."""
    if rows.dtype.element_ty.primitive_bitwidth == 32:
        for half in tl.static_range(2):
            t = _fours(begin + 4 * half, TILE)
            x = tl.join(tl.join(runs[4 * half], runs[4 * half + 2]), tl.join(runs[4 * half + 1], runs[4 * half + 3]))
            x = tl.permute(tl.reshape(x, (x.shape[0], x.shape[1], 4)), (1, 0, 2))
            tl.store(tl.trans(rows)[:, :, None] + t, x, mask=in_d[None, :, None] & (t < end))
    else:
        t = begin + tl.arange(0, TILE)
        tl.store(rows + t[None, :], steps_in_order(runs).to(rows.dtype.element_ty),
                 mask=in_d[:, None] & (t < end)[None, :])


@triton.jit
def ends_in(begin, end, in_d, TILE: tl.constexpr):
    """Which of the first steps of runs, the second, ... there are, eight [channels, runs]."""
    masks = ()
    for s in tl.static_range(RUN):
        masks = masks + (in_d[:, None] & (begin + tl.arange(0, TILE // RUN) * RUN + s < end)[None, :],)
    return masks


@triton.constexpr_function
def rounds_of(runs):
    """In which ``runs`` runs, a power of 2, tell each other what they do."""
    return runs.bit_length() - 1


@triton.jit
def _swap(x, BIT: tl.constexpr):
    """[channels, runs] with runs exchanged whose numbers differ in ``BIT`` alone."""
    pairs = tl.reshape(x.to(tl.int32, bitcast=True), (x.shape[0], x.shape[1] >> (BIT + 1), 2, 1 << BIT))
    # The exclusive or of both and one of them is the other; of all this, an exchange between threads remains.
    return tl.reshape(tl.xor_sum(pairs, 2, keep_dims=True) ^ pairs, x.shape).to(tl.float32, bitcast=True)


@triton.jit
def through_runs(a, b):
    """Runs apply the maps ``h -> a h + b``, [channels, runs], one after the other. Returns (a, b) of all of them
    together, and of those before each."""
    to_a = tl.full(a.shape, 1.0, tl.float32)
    to_b = tl.zeros(a.shape, tl.float32)
    for BIT in tl.static_range(rounds_of(a.shape[1])):
        late = (tl.arange(0, a.shape[1])[None, :] >> BIT) % 2 == 1
        other_a, other_b = _swap(a, BIT), _swap(b, BIT)
        to_b = tl.where(late, to_a * other_b + to_b, to_b)
        to_a = tl.where(late, to_a * other_a, to_a)
        b = tl.where(late, a * other_b + b, other_a * b + other_b)
        a = a * other_a
    return a, b, to_a, to_b


@triton.jit
def both_ways(a, b, r):
    """As ``through_runs`` for ``h -> a h + b`` from the first to the last, and for ``g -> a g + r`` from the last to
    the first. Returns (a, r) of all runs together, (a, b) of those before each, and (a, r) of those behind it."""
    to_a = tl.full(a.shape, 1.0, tl.float32)
    to_b = tl.zeros(a.shape, tl.float32)
    from_a, from_r = to_a, to_b
    for BIT in tl.static_range(rounds_of(a.shape[1])):
        late = (tl.arange(0, a.shape[1])[None, :] >> BIT) % 2 == 1
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
def states_of(TILE: tl.constexpr, STATES: tl.constexpr):
    """Numbers of the states, [1, runs, states / runs], so that [channels, runs] can be put in the place of one."""
    RUNS: tl.constexpr = TILE // RUN
    EACH: tl.constexpr = STATES // RUNS
    return tl.arange(0, RUNS)[None, :, None] * EACH + tl.arange(0, EACH)[None, None, :]


@triton.jit
def pick(tile, is_n):
    """[channels], that of the states of ``tile`` for which ``is_n``."""
    return tl.sum(tl.sum(tl.where(is_n, tile, 0.0), 2), 1)


@triton.jit
def add_apart(total, before, next_total, next_before):
    """Sums, and sums without the last."""
    return total + next_total, total + next_before


@triton.jit
def from_segments(sums, ends, first, count, STEP: tl.constexpr, image, batch, d, in_d, rates, n, D, N):
    """What ``count`` segments from ``first`` on, one after the other, make of a state of zeros."""
    mask = in_d[:, None, None] & (n < N)
    state = tl.zeros(rates.shape, tl.float32)
    for i in range(count):
        row = ((first + STEP * i) * batch + image) * D + d
        total = tl.load(sums + row, mask=in_d, other=0.0)
        end = tl.load(ends + row[:, None, None] * N + n, mask=mask, other=0.0)
        state = exp2(total[:, None, None] * rates) * state + end
    return state


def padded(tensor):
    """``tensor`` (B, G, N, L) with adjacent steps and rows that begin at multiples of ``UNIT``; a copy where they do
    not, with zeros behind the last step."""
    if tensor.shape[-1] % UNIT.value:
        tensor = F.pad(tensor, (0, -tensor.shape[-1] % UNIT.value))
    if tensor.stride(-1) != 1 or any(stride % UNIT.value for stride in tensor.stride()[:-1]):
        tensor = tensor.contiguous()
    return tensor


def walked(tensor):
    """``tensor`` (B, D, L), or a copy where neither its steps nor its channels are adjacent; whether only the channels
    are; and its strides, of images and of the other dimension."""
    batch, row, step = (stride if size > 1 else 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if 1 not in (row, step):
        return walked(tensor.contiguous())
    batch = 0 if tensor.shape[0] == 1 else batch
    return (tensor, False, (batch, row)) if step == 1 else (tensor, True, (batch, step))


def unit_of(multiples):
    """``UNIT`` if all numbers are multiples of it, else 1."""
    return 1 if any(number % UNIT.value for number in multiples) else UNIT.value


class Launch:
    """The shapes of one call, and the launch of kernels whose first arguments are those of the operator. ``warps``: of
    a program, at most."""

    def __init__(self, u, delta, A, B, C, D, z, bias, softplus, grad, chunk, warps):
        u, delta, A, B, C, D, z, bias, grad = (
            t.float() if t is not None and t.dtype == torch.float64 else t
            for t in (u, delta, A, B, C, D, z, bias, grad))
        (self.batch, self.D, self.L), self.N = u.shape, A.shape[1]
        (u, delta, z, grad), lasts, strides = zip(
            *((None, None, (0, 0)) if t is None else walked(t) for t in (u, delta, z, grad)), strict=True)
        A, D, bias = (None if t is None else t.contiguous() for t in (A, D, bias))
        B, C = (t.contiguous() if t.dim() == 2 else padded(t) for t in (B, C))
        self.tensors = u, delta, A, B, C, D, z, bias, grad
        self.row = cdiv(self.L, UNIT.value) * UNIT.value
        self.tile = min(chunk, max(16, next_power_of_2(self.L)))
        self.chunks = cdiv(self.L, chunk)
        # Not fewer than runs: a state is put in the place of one.
        self.states = max(self.tile // RUN.value, next_power_of_2(self.N))
        B_span, C_span = (self.D // t.shape[1] if t.dim() > 2 else self.D for t in (B, C))
        self.span = math.gcd(B_span, C_span)
        row = max(self.tile, self.states)
        self.block = min(warps * _WARP // row, next_power_of_2(self.span))
        self.warps = max(1, self.block * row // _WARP)
        self.span_blocks = cdiv(self.span, self.block)
        self.blocks = self.D // self.span * self.span_blocks
        self.segments, self.each = 1, self.chunks
        having = self.batch * self.blocks * self.warps
        if having < _FEW_WARPS:
            self.each = cdiv(self.chunks, min(self.chunks, cdiv(_ENOUGH_WARPS, having)))
            self.segments = cdiv(self.chunks, self.each)
        step_unit = unit_of((self.L, *(s for last, pair in zip(lasts, strides, strict=True) if last is False
                                       for s in pair)))
        of_last = [s for last, pair in zip(lasts, strides, strict=True) if last for s in pair]
        channel_unit = unit_of((self.span, *of_last)) if of_last else 1
        strides = [s // (channel_unit if last else step_unit)
                   for last, pair in zip(lasts, strides, strict=True) for s in pair]

        def projection_strides(t):
            return (0, 0, 0) if t.dim() == 2 else [stride // UNIT.value for stride in t.stride()[:3]]

        self.numbers = (self.batch, self.D, self.L, self.N, self.chunks, self.segments, self.each, self.span,
                        self.span_blocks, B_span, C_span, *strides, *projection_strides(B), *projection_strides(C),
                        bool(softplus), B.dim() == 2, C.dim() == 2,
                        sum(bool(last) << i for i, last in enumerate(lasts)), step_unit, channel_unit, self.block,
                        self.tile, self.states)

    def empty(self, *shape, dtype=torch.float32):
        return self.tensors[0].new_empty(shape, dtype=dtype)

    def like(self, tensor):
        """Memory for what is as a tensor (B, D, L)."""
        return self.empty(self.batch, self.D, self.L, dtype=tensor.dtype)

    def maps(self):
        """Memory for the sums of steps of segments, and for what they make of no state; None where there is one."""
        if self.segments == 1:
            return None, None
        shape = self.segments, self.batch, self.D
        return self.empty(*shape), self.empty(*shape, self.N)

    def __call__(self, kernel, *buffers, constants, **options):
        programs = self.batch * self.blocks * self.segments
        launch(kernel, (programs, 1, 1), *self.tensors, *buffers, *self.numbers, *constants, num_warps=self.warps,
               **options)
