"""How the scan is cut into blocks, and the pieces that its forward and backward kernels share.

A program walks chunks of ``GROUPS * STEPS`` tokens by a block of channels. Step ``s`` of all groups is one
tensor [GROUPS, channels]: within a group the recurrence runs step by step, each step elementwise over groups and
channels; between groups it is an associative scan of the groups' maps ``h -> a h + b``.
"""
import torch
import triton
import triton.language as tl

from ..._core.triton_math import LOG2_E, exp2, log2
from ..._core.triton_support import as_rows, cdiv, launch, next_power_of_2

#: Arguments of the kernels that change with the size of the map: no kernel is compiled anew for their values.
RUNTIME = ['L', 'chunks', 'segs', 'each', 'dt_image', 'B_image', 'C_image', 'order_image', 'order_row']
STEPS = tl.constexpr(4)
#: Sequences are split where images, directions and blocks of channels alone give fewer programs than the first; into as
#: many segments as make the second.
_FEW_PROGRAMS, _ENOUGH_PROGRAMS = 200, 528


def _segments(rows, chunks):
    """Into how many segments a sequence of ``chunks`` chunks is split where there are ``rows`` independent programs,
    and the chunks of each. Segments cost another pass over the input, so there is one if that keeps a GPU busy."""
    if rows >= _FEW_PROGRAMS or chunks < 8:
        return 1, max(chunks, 1)
    each = max(2, cdiv(chunks * rows, _ENOUGH_PROGRAMS))
    return cdiv(chunks, each), each


def _dense(tensor):
    """``tensor`` with its last dimension dense."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


class Launch:
    """The shapes of one call, and the launch of kernels whose first arguments are those of the operator."""

    def __init__(self, x, dt, A, B, C, weight, bias, skip, order, chunk, tiling):
        (self.batch, self.L, self.D), (self.K, self.R), self.N = x.shape, dt.shape[2:], B.shape[3]
        lanes, hold, self.num_warps = tiling
        self.output, self.chunks = C is not None, cdiv(self.L, chunk)
        self.lanes = min(lanes, max(16, next_power_of_2(self.D)))
        self.blocks = cdiv(self.D, self.lanes)
        self.segments, self.each = _segments(self.batch * self.K * self.blocks * (1 if self.output else self.N),
                                             self.chunks)
        # Images follow one another, so that the compiler knows how they are aligned.
        self.x, x_row = as_rows(x, 2)
        dt, B = _dense(dt), _dense(B)
        C = B if C is None else _dense(C)
        order_image = order_row = 0
        if order is not None:
            order = _dense(order)
            order_row = order.stride(-2) if order.dim() > 1 else 0
            order_image = order.stride(0) if order.dim() == 3 else 0
        self.tensors = (self.x, dt, A.contiguous(), B, C, weight.contiguous(), bias.contiguous(),
                        None if skip is None else skip.contiguous(), order)
        self.numbers = (self.L, self.chunks, self.segments, self.each, dt.stride(0), B.stride(0),
                        C.stride(0), order_image, order_row, self.D, self.N, self.K, self.R, x_row,
                        dt.stride(1), dt.stride(2), B.stride(1), B.stride(2), C.stride(1), C.stride(2), self.lanes,
                        self.R <= hold, chunk // STEPS.value, self.output, skip is not None,
                        order is not None)

    def maps(self):
        """Memory for what segments do to states, or None where there is one segment."""
        if self.segments == 1:
            return None
        return self.x.new_empty((self.batch, self.K, self.N, self.segments, 2, self.D), dtype=torch.float32)

    def __call__(self, kernel, states, *buffers, maps):
        """Launch ``kernel`` with ``states`` programs per image, direction, segment and block of channels."""
        programs = self.blocks * self.segments * self.batch * self.K * states
        launch(kernel, (programs, 1, 1), *self.tensors, *buffers, *self.numbers, maps, self.segments > 1,
               num_warps=self.num_warps)


@triton.jit
def _then(a1, b1, ea1, eb1, a2, b2, ea2, eb2):
    """The first map followed by the second; beside it, what leads up to the second."""
    return a1 * a2, a2 * b1 + b2, ea2 * a1, ea2 * b1 + eb2


@triton.jit
def multiply(a, b):
    return a * b


@triton.jit
def through_groups(a, b, REVERSE: tl.constexpr):
    """Groups apply the maps ``h -> a h + b``, [groups, channels], one after the other, ``REVERSE`` from the last to the
    first. Returns (a, b) of the map up to and with each group, and of the map up to each group without it."""
    return tl.associative_scan((a, b, a * 0 + 1, b * 0), 0, _then, reverse=REVERSE)


@triton.jit
def state_before(maps, count, first, step, D: tl.constexpr, d, in_d, GROUPS: tl.constexpr):
    """The state, [channels], that ``count`` segments leave behind, each a map ``h -> a h + b``; they start at segment
    ``first`` and go by ``step``. ``maps``: (segments, 2, D)."""
    h = d * 0.0
    g = tl.arange(0, GROUPS)
    for start in range(0, count, GROUPS):
        place = maps + ((first + step * (start + g)).to(tl.int64) * 2 * D)[:, None] + d[None, :]
        there = (start + g < count)[:, None] & in_d[None, :]
        a = tl.load(place, mask=there, other=1.0)
        b = tl.load(place + D, mask=there, other=0.0)
        a, b, _, _ = through_groups(a, b, False)
        h = tl.sum(tl.where((g == GROUPS - 1)[:, None], a * h[None, :] + b, 0.0), 0)
    return h


@triton.jit
def hold_weights(weight, d, in_d, R: tl.constexpr, HOLD: tl.constexpr):
    """Rows of the step projection as a tuple of [1, channels], if registers shall hold them."""
    rows = ()
    if HOLD:
        for r in tl.static_range(R):
            rows = rows + (tl.load(weight + d * R + r, mask=in_d, other=0.0).to(tl.float32)[None, :],)
    return rows


@triton.jit
def project(dt, rows, bias, tokens, here, R: tl.constexpr, DT_ROW: tl.constexpr):
    """``dt @ weight.T + bias`` at ``tokens``, [groups, channels], in units of log(2), by held weights."""
    v = bias
    for r in tl.static_range(R):
        low = tl.load(dt + tokens * DT_ROW + r, mask=here, other=0.0).to(tl.float32) * LOG2_E
        v = low[:, None] * rows[r] + v
    return v


@triton.jit
def project_chunk(low, weights, GROUPS: tl.constexpr):
    """``low @ weights.T``, [tokens, ranks] by [channels, ranks], as a tuple of four steps, [groups, channels]."""
    v = tl.dot(low * LOG2_E, tl.trans(weights), input_precision='tf32x3')
    v = tl.permute(tl.reshape(v, (GROUPS, 2, 2, weights.shape[0])), (0, 3, 2, 1))
    first, second = tl.split(v)
    v0, v1 = tl.split(first)
    v2, v3 = tl.split(second)
    return v0, v1, v2, v3


@triton.jit
def step_size(v):
    """``softplus(v) / log(2)`` and ``exp(v)`` for ``v`` in units of log(2): exponentials and logarithms are to base 2
    here, and ``exp2(A * step)`` is the decay. The step is good to 1e-6 of its value, however small it is."""
    u = exp2(tl.minimum(v, 126.0))
    # log2(1 + u) / u on [0, 1/4], by least relative error
    small = -0.13296969 * u + 0.26198700
    small = ((small * u - 0.35743658) * u + 0.48071464) * u - 0.72134366
    small = small * u + LOG2_E
    # Far above 0 the softplus is v itself, and never below it.
    return tl.where(u < 0.25, small * u, tl.maximum(log2(1 + u), v)), u


@triton.jit
def load_tile(base, rows, columns, here, ROW: tl.constexpr, COUNT: tl.constexpr):
    """``base[rows, columns]`` in float32, zero where a row is not ``here`` or a column not below ``COUNT``."""
    mask = here[:, None] & (columns < COUNT)[None, :]
    return tl.load(base + rows[:, None] * ROW + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def join_steps(steps, GROUPS: tl.constexpr):
    """A tuple of four [groups, channels] as one [tokens, channels]."""
    x = tl.join(tl.join(steps[0], steps[2]), tl.join(steps[1], steps[3]))
    return tl.reshape(tl.permute(x, (0, 2, 3, 1)), (GROUPS * 4, steps[0].shape[1]))
