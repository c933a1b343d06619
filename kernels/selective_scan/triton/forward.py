"""Forward of the selective scan."""
import torch
import triton
import triton.language as tl

from ..._core.triton_math import LN2, LOG2_E, exp2
from .blocks import (
    RUNTIME,
    STEPS,
    Launch,
    hold_weights,
    load_tile,
    multiply,
    project,
    project_chunk,
    state_before,
    step_size,
    through_groups,
)


@triton.jit(do_not_specialize=RUNTIME)
def _scan(x, dt, A, B, C, weight, bias, skip, order, maps, y, states, L, chunks, segs, each, dt_image, B_image, C_image,
          order_image, order_row, D: tl.constexpr, N: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
          X_ROW: tl.constexpr, DT_ROW: tl.constexpr, DT_K: tl.constexpr, B_ROW: tl.constexpr, B_K: tl.constexpr,
          C_ROW: tl.constexpr, C_K: tl.constexpr, LANES: tl.constexpr, HOLD: tl.constexpr, GROUPS: tl.constexpr,
          OUTPUT: tl.constexpr, SKIP: tl.constexpr, ORDER: tl.constexpr, MAPS: tl.constexpr,
          SEGMENTED: tl.constexpr):
    """One segment of one image and direction, ``LANES`` channels, and one state; all states with ``OUTPUT``.

    ``MAPS``: only what the segment does to a state, for the segments after it. Layouts: y (batch, L, N, D) without
    ``OUTPUT``, else (batch, K, L, D); states (batch, K, chunks, N, D); maps (batch, K, N, segs, 2, D).
    """
    CHUNK: tl.constexpr = GROUPS * STEPS
    BLOCKS: tl.constexpr = (D + LANES - 1) // LANES
    NS: tl.constexpr = N if MAPS or not OUTPUT else 1  # states that are programs of their own
    pid = tl.program_id(0)
    d = pid % BLOCKS * LANES + tl.arange(0, LANES)
    in_d = d < D
    seg = pid // BLOCKS % segs
    row = pid // BLOCKS // segs
    first_n = row % NS
    k = row // NS % K
    image = (row // NS // K).to(tl.int64)
    row = image * K + k
    x += image * L * X_ROW
    dt += image * dt_image + k * DT_K
    B += image * B_image + k * B_K
    weight += k * D * R
    bias_d = tl.load(bias + k * D + d, mask=in_d, other=0.0).to(tl.float32)[None, :] * LOG2_E
    bias_d += tl.zeros([GROUPS, LANES], tl.float32)
    rows = hold_weights(weight, d, in_d, R, HOLD)
    RANKS: tl.constexpr = max(16, triton.next_power_of_2(R))
    ranks = tl.arange(0, RANKS)
    tokens = tl.arange(0, CHUNK)
    if not HOLD:
        weights = load_tile(weight, d, ranks, in_d, R, R)
    if OUTPUT:
        C += image * C_image + k * C_K
        y += row * L * D
    else:
        y += image * L * N * D + first_n * D
    if ORDER:
        order += image * order_image + k * order_row
    Y_ROW: tl.constexpr = D if OUTPUT else N * D
    g = tl.arange(0, GROUPS) * STEPS
    is_last = g == (GROUPS - 1) * STEPS

    for n in range(first_n, first_n + N // NS):
        rate = tl.load(A + k * D * N + d * N + n, mask=in_d, other=0.0).to(tl.float32)[None, :]
        first = (seg * each).to(tl.int64)
        last = tl.minimum(chunks, first + each)
        # The state before each chunk passes through memory: to read it late there is cheaper than to wait for it here.
        if MAPS:
            before = maps + ((row * N + n) * segs + seg) * 2 * D + D + d
        else:
            before = states + ((row * chunks + first) * N + n) * D + d
        product = tl.full([GROUPS, LANES], 1.0, tl.float32)
        start_state = tl.zeros([LANES], tl.float32)
        if SEGMENTED and not MAPS:
            start_state = state_before(maps + (row * N + n) * segs * 2 * D, seg, 0, 1, D, d, in_d, GROUPS)
        tl.store(before, start_state, mask=in_d)
        tl.debug_barrier()
        for chunk in tl.range(first, last, num_stages=1):  # a chunk reads what the one before has stored
            start = chunk * CHUNK
            left = (L - start).to(tl.int32)
            group_a = tl.full([GROUPS, LANES], 1.0, tl.float32)
            group_b = tl.zeros([GROUPS, LANES], tl.float32)
            places, xs, decays, drives = (), (), (), ()
            if not HOLD:
                in_l = tokens < left
                if ORDER:
                    low = load_tile(dt, tl.load(order + start + tokens, mask=in_l, other=0).to(tl.int64), ranks, in_l,
                                    DT_ROW, R)
                else:
                    low = load_tile(dt + start * DT_ROW, tokens, ranks, in_l, DT_ROW, R)
                projected = project_chunk(low, weights, GROUPS)
            for s in tl.static_range(STEPS):
                here = g + s < left
                if ORDER:
                    place = tl.load(order + start + g + s, mask=here, other=0).to(tl.int64)
                else:
                    place = g + s  # offsets within a chunk are small
                origin = 0 if ORDER else start
                inside = here[:, None] & in_d[None, :]
                u = tl.load(x + origin * X_ROW + place[:, None] * X_ROW + d[None, :], mask=inside, other=0.0)
                u = u.to(tl.float32)
                if HOLD:
                    step = step_size(project(dt + origin * DT_ROW, rows, bias_d, place, here, R, DT_ROW))[0]
                else:
                    step = step_size(projected[s] + bias_d)[0]
                b = tl.load(B + origin * B_ROW + place * B_ROW + n, mask=here, other=0.0).to(tl.float32) * LN2
                a = exp2(step * rate)
                b = step * u * b[:, None]
                group_a *= a
                group_b = a * group_b + b
                places, xs, decays, drives = places + (place,), xs + (u,), decays + (a,), drives + (b,)
            to_a, to_b, enter_a, enter_b = through_groups(group_a, group_b, False)
            h = tl.load(before, mask=in_d, other=0.0)[None, :]
            if MAPS:
                product *= group_a
                tl.debug_barrier()
            else:
                before += N * D
            goes_on = is_last & (True if MAPS else chunk + 1 < last)
            tl.store(before[None, :] + g[:, None] * 0, to_a * h + to_b, mask=goes_on[:, None] & in_d[None, :])
            tl.debug_barrier()
            if not MAPS:
                enter = enter_a * h + enter_b
                for s in tl.static_range(STEPS):
                    place = places[s]
                    here = g + s < left
                    origin = 0 if ORDER else start
                    inside = here[:, None] & in_d[None, :]
                    enter = decays[s] * enter + drives[s]
                    out = y + origin * Y_ROW + place[:, None] * Y_ROW + d[None, :]
                    if OUTPUT:
                        c = tl.load(C + origin * C_ROW + place * C_ROW + n, mask=here, other=0.0).to(tl.float32)
                        value = c[:, None] * enter
                        if n > 0:
                            value += tl.load(out, mask=inside, other=0.0)
                        elif SKIP:
                            value += tl.load(skip + k * D + d, mask=in_d, other=0.0).to(tl.float32)[None, :] * xs[s]
                        tl.store(out, value, mask=inside)
                    else:
                        tl.store(out, enter, mask=inside)
        if MAPS:
            own = maps + ((row * N + n) * segs + seg) * 2 * D
            tl.store(own + d, tl.reduce(product, 0, multiply), mask=in_d)


#: Channels of a program, largest rank whose weights are held in registers, warps.
_TILING = 32, 4, 4


def forward(x, dt, A, B, C, weight, bias, skip, order, *, chunk):
    """``y`` and the state before each chunk; see ``ops.py``."""
    run = Launch(x, dt, A, B, C, weight, bias, skip, order, chunk, _TILING)
    states = x.new_empty((run.batch, run.K, run.chunks, run.N, run.D), dtype=torch.float32)
    if not run.output:
        y = x.new_empty((run.batch, run.L, run.N, run.D))
    else:
        sums = run.K * run.N > 1
        y = x.new_empty((run.batch, run.K, run.L, run.D), dtype=torch.float32 if sums else x.dtype)
    if x.numel():
        maps = run.maps()
        if maps is not None:
            run(_scan, run.N, maps, y, states, maps=True)
        run(_scan, 1 if run.output else run.N, maps, y, states, maps=False)
    if run.output:
        y = y.squeeze(1) if run.K == 1 else y.sum(1)
    return y, states
