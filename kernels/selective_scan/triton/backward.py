"""Backward of the selective scan: the adjoint recurrence runs through the tokens in reverse."""
import torch
import triton
import triton.language as tl

from ..._core.triton_math import LN2, LOG2_E, exp2, reciprocal
from ..._core.triton_support import cdiv, launch, next_power_of_2
from .blocks import (
    RUNTIME,
    STEPS,
    Launch,
    hold_weights,
    join_steps,
    load_tile,
    multiply,
    project,
    project_chunk,
    state_before,
    step_size,
    through_groups,
)

#: Channels of a program, largest rank whose weights are held in registers, warps.
_TILING = 32, 4, 4
#: Programs' sums that one step of a finishing kernel adds, and values that one of its programs finishes.
_ROWS, _VALUES = 32, 64


@triton.jit(do_not_specialize=RUNTIME)
def _scan_backward(x, dt, A, B, C, weight, bias, skip, order, grad, states, maps, carries, grad_x, grad_delta,
                   token_sums, sums, L, chunks, segs, each, dt_image, B_image, C_image, order_image, order_row,
                   D: tl.constexpr, N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, X_ROW: tl.constexpr,
                   DT_ROW: tl.constexpr, DT_K: tl.constexpr, B_ROW: tl.constexpr, B_K: tl.constexpr,
                   C_ROW: tl.constexpr, C_K: tl.constexpr,
                   LANES: tl.constexpr, HOLD: tl.constexpr, GROUPS: tl.constexpr, OUTPUT: tl.constexpr,
                   SKIP: tl.constexpr, ORDER: tl.constexpr, MAPS: tl.constexpr, SEGMENTED: tl.constexpr):
    """As ``_scan``, in reverse; a program takes all states in turn, with ``MAPS`` one.

    Layouts: grad (batch, L, N or 1, D), dense; grad_x (batch, K, L, D); grad_delta, where the states' shares add up,
    the same, fp32; token_sums (blocks of channels, batch, K, L, R + N + N), the last N with ``OUTPUT`` only;
    sums (batch, segs, K, R + 1 + N + 1, D), the last with ``SKIP`` only; carries (batch, K, N, segs, D).
    """
    CHUNK: tl.constexpr = GROUPS * STEPS
    BLOCKS: tl.constexpr = (D + LANES - 1) // LANES
    NS: tl.constexpr = N if MAPS else 1
    RANKS: tl.constexpr = max(16, triton.next_power_of_2(R))
    COLUMNS: tl.constexpr = R + N + (N if OUTPUT else 0)
    SUMS: tl.constexpr = R + 1 + N + (1 if SKIP else 0)
    GRAD_ROW: tl.constexpr = D if OUTPUT else N * D
    pid = tl.program_id(0)
    block = pid % BLOCKS
    d = block * LANES + tl.arange(0, LANES)
    in_d = d < D
    seg = pid // BLOCKS % segs
    row = pid // BLOCKS // segs
    images = tl.num_programs(0) // (BLOCKS * segs * NS * K)
    first_n = row % NS
    k = row // NS % K
    image = (row // NS // K).to(tl.int64)
    row = image * K + k
    x += image * L * X_ROW
    dt += image * dt_image + k * DT_K
    B += image * B_image + k * B_K
    C += image * C_image + k * C_K
    weight += k * D * R
    grad += image * L * GRAD_ROW
    grad_x += row * L * D
    grad_delta += row * L * D
    token_sums += (block * images.to(tl.int64) * K + row) * L * COLUMNS
    sums += ((image * segs + seg) * K + k) * SUMS * D
    bias_d = tl.load(bias + k * D + d, mask=in_d, other=0.0).to(tl.float32)[None, :] * LOG2_E
    bias_d += tl.zeros([GROUPS, LANES], tl.float32)
    rows = hold_weights(weight, d, in_d, R, HOLD)
    if ORDER:
        order += image * order_image + k * order_row
    g = tl.arange(0, GROUPS) * STEPS
    is_first = g == 0
    first = (seg * each).to(tl.int64)
    last = tl.minimum(chunks, first + each)
    ranks = tl.arange(0, RANKS)
    token = tl.arange(0, CHUNK)
    weights = load_tile(weight, d, ranks, in_d, R, R)
    if not MAPS:
        sum_bias = tl.zeros([GROUPS, LANES], tl.float32)
        sum_skip = tl.zeros([GROUPS, LANES], tl.float32)
        sum_weight = tl.zeros([LANES, RANKS], tl.float32)
        if SKIP:
            skip_d = tl.load(skip + k * D + d, mask=in_d, other=0.0).to(tl.float32)[None, :]

    for n in range(first_n, first_n + N // NS):
        rate = tl.load(A + k * D * N + d * N + n, mask=in_d, other=0.0).to(tl.float32)[None, :]
        # What comes from behind passes through memory: to read it late there is cheaper than to wait for it here.
        if MAPS:
            behind_at = maps + ((row * N + n) * segs + seg) * 2 * D + D + d
        else:
            behind_at = carries + ((row * N + n) * segs + seg) * D + d
        product = tl.full([GROUPS, LANES], 1.0, tl.float32)
        sum_rate = tl.zeros([GROUPS, LANES], tl.float32)
        start_state = tl.zeros([LANES], tl.float32)
        if SEGMENTED and not MAPS:
            start_state = state_before(maps + (row * N + n) * segs * 2 * D, segs - 1 - seg, segs - 1, -1, D, d, in_d,
                                       GROUPS)
        tl.store(behind_at, start_state, mask=in_d)
        tl.debug_barrier()
        for back in tl.range(0, last - first, num_stages=1):  # a chunk reads what the one behind has stored
            chunk = last - 1 - back
            start = chunk * CHUNK
            left = (L - start).to(tl.int32)
            group_a = tl.full([GROUPS, LANES], 1.0, tl.float32)
            group_h = tl.zeros([GROUPS, LANES], tl.float32)
            in_l = token < left
            begin = 0 if ORDER else start
            if ORDER:
                tokens = tl.load(order + start + token, mask=in_l, other=0).to(tl.int64)
            else:
                tokens = token
            low = load_tile(dt + begin * DT_ROW, tokens, ranks, in_l, DT_ROW, R)
            if not HOLD:
                projected = project_chunk(low, weights, GROUPS)
            places, xs, grads, deltas, slopes, decays, Bs, Cs = (), (), (), (), (), (), (), ()
            for s in tl.static_range(STEPS):
                here = g + s < left
                if ORDER:
                    place = tl.load(order + start + g + s, mask=here, other=0).to(tl.int64)
                else:
                    place = g + s
                origin = 0 if ORDER else start
                inside = here[:, None] & in_d[None, :]
                if HOLD:
                    step, e = step_size(project(dt + origin * DT_ROW, rows, bias_d, place, here, R, DT_ROW))
                else:
                    step, e = step_size(projected[s] + bias_d)
                a = exp2(step * rate)
                grad_n = 0 if OUTPUT else n * D
                dy = tl.load(grad + grad_n + origin * GRAD_ROW + place[:, None] * GRAD_ROW + d[None, :],
                             mask=inside, other=0.0).to(tl.float32)
                group_a *= a
                places, decays, deltas, grads = places + (place,), decays + (a,), deltas + (step,), grads + (dy,)
                if OUTPUT:
                    c = tl.load(C + origin * C_ROW + place * C_ROW + n, mask=here, other=0.0).to(tl.float32)
                    Cs = Cs + (c[:, None],)
                if not MAPS:
                    slopes = slopes + (e * reciprocal(1 + e),)
                    u = tl.load(x + origin * X_ROW + place[:, None] * X_ROW + d[None, :], mask=inside, other=0.0)
                    u = u.to(tl.float32)
                    b = tl.load(B + origin * B_ROW + place * B_ROW + n, mask=here, other=0.0).to(tl.float32)
                    b = b[:, None] * LN2
                    group_h = a * group_h + step * u * b
                    xs, Bs = xs + (u,), Bs + (b,)
            group_r = tl.zeros([GROUPS, LANES], tl.float32)
            for i in tl.static_range(STEPS):
                dy = grads[STEPS - 1 - i]
                if OUTPUT:
                    dy = Cs[STEPS - 1 - i] * dy
                group_r = decays[STEPS - 1 - i] * (dy + group_r)
            to_a, to_b, enter_a, enter_b = through_groups(group_a, group_r, True)
            carry = tl.load(behind_at, mask=in_d, other=0.0)[None, :]
            tl.debug_barrier()
            tl.store(behind_at[None, :] + g[:, None] * 0, to_a * carry + to_b, mask=is_first[:, None] & in_d[None, :])
            tl.debug_barrier()
            behind = enter_a * carry + enter_b
            if MAPS:
                product *= group_a
            else:
                h = tl.load(states + ((row * chunks + chunk) * N + n) * D + d, mask=in_d, other=0.0)
                _, _, enter_a, enter_b = through_groups(group_a, group_h, False)
                h = enter_a * h[None, :] + enter_b
                befores = ()
                for s in tl.static_range(STEPS):
                    befores = befores + (h,)
                    h = decays[s] * h + deltas[s] * xs[s] * Bs[s]
                steps, drives = (), ()
                for i in tl.static_range(STEPS):
                    place, u = places[STEPS - 1 - i], xs[STEPS - 1 - i]
                    dy, step = grads[STEPS - 1 - i], deltas[STEPS - 1 - i]
                    a, b, before = decays[STEPS - 1 - i], Bs[STEPS - 1 - i], befores[STEPS - 1 - i]
                    here = g + (STEPS - 1 - i) < left
                    origin = 0 if ORDER else start
                    inside = here[:, None] & in_d[None, :]
                    at = origin * D + place[:, None] * D + d[None, :]
                    adjoint = dy + behind
                    if OUTPUT:
                        adjoint = Cs[STEPS - 1 - i] * dy + behind
                        tl.store(token_sums + origin * COLUMNS + place * COLUMNS + R + N + n,
                                 tl.sum(dy * (a * before + step * u * b), 1), mask=here)
                    behind = a * adjoint
                    weighted = adjoint * step
                    dx = weighted * b
                    drives = (weighted * u,) + drives
                    dv = rate * LN2 * behind * before + adjoint * u * b  # of the step in units of log(2)
                    sum_rate += behind * before * step
                    if SKIP and n == 0:
                        dx += skip_d * dy
                        sum_skip += dy * u
                    if N > 1:
                        if n > 0:
                            dx += tl.load(grad_x + at, mask=inside, other=0.0)
                            dv += tl.load(grad_delta + at, mask=inside, other=0.0)
                        tl.store(grad_delta + at, dv, mask=inside)
                    tl.store(grad_x + at, dx, mask=inside)
                    dv *= LOG2_E * slopes[STEPS - 1 - i]
                    steps = (dv,) + steps
                columns = token_sums + begin * COLUMNS + tokens * COLUMNS
                tl.store(columns + R + n, LN2 * tl.sum(join_steps(drives, GROUPS), 1), mask=in_l)
                if N == 1 or n == N - 1:
                    for s in tl.static_range(STEPS):
                        sum_bias += steps[s]
                    dv_all = join_steps(steps, GROUPS)
                    sum_weight = tl.dot(tl.trans(dv_all), low, sum_weight, input_precision='tf32x3')
                    tl.store(columns[:, None] + ranks[None, :], tl.dot(dv_all, weights, input_precision='tf32x3'),
                             mask=in_l[:, None] & (ranks < R)[None, :])
        if MAPS:
            own = maps + ((row * N + n) * segs + seg) * 2 * D
            tl.store(own + d, tl.reduce(product, 0, multiply), mask=in_d)
        else:
            tl.store(sums + (R + 1 + n) * D + d, LN2 * tl.sum(sum_rate, 0), mask=in_d)
    if not MAPS:
        tl.store(sums + ranks[None, :] * D + d[:, None], sum_weight, mask=in_d[:, None] & (ranks < R)[None, :])
        tl.store(sums + R * D + d, tl.sum(sum_bias, 0), mask=in_d)
        if SKIP:
            tl.store(sums + (R + 1 + N) * D + d, tl.sum(sum_skip, 0), mask=in_d)


@triton.jit(do_not_specialize=['parts'])
def _finish_parameters(sums, grad_A, grad_weight, grad_bias, grad_skip, parts, D: tl.constexpr, N: tl.constexpr,
                       K: tl.constexpr, R: tl.constexpr, SKIP: tl.constexpr, ROWS: tl.constexpr,
                       VALUES: tl.constexpr):
    """Add up ``sums`` (parts, K, R + 1 + N + 1, D) in a fixed order; a program has one parameter by some channels."""
    SUMS: tl.constexpr = R + 1 + N + (1 if SKIP else 0)
    d = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    which = tl.program_id(1) % SUMS
    k = tl.program_id(1) // SUMS
    in_d = d < D
    total = tl.zeros([ROWS, VALUES], tl.float32)
    for part in range(0, parts, ROWS):
        rows = part + tl.arange(0, ROWS)
        at = sums + (((rows.to(tl.int64) * K + k) * SUMS + which) * D)[:, None] + d[None, :]
        total += tl.load(at, mask=(rows < parts)[:, None] & in_d[None, :], other=0.0)
    total = tl.sum(total, 0)
    if which < R:
        tl.store(grad_weight + (k * D + d) * R + which, total, mask=in_d)
    elif which == R:
        tl.store(grad_bias + k * D + d, total, mask=in_d)
    elif which < R + 1 + N:
        tl.store(grad_A + (k * D + d) * N + which - R - 1, total, mask=in_d)
    elif SKIP:
        tl.store(grad_skip + k * D + d, total, mask=in_d)


@triton.jit(do_not_specialize=['L', 'images'])
def _finish_tokens(token_sums, grad_dt, grad_B, grad_C, images, L, BLOCKS: tl.constexpr, N: tl.constexpr,
                   K: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr, VALUES: tl.constexpr):
    """Add up ``token_sums`` (blocks of channels, batch, K, L, COLUMNS) in a fixed order."""
    token = tl.program_id(0) * VALUES + tl.arange(0, VALUES).to(tl.int64)
    column = tl.arange(0, LANES)
    count = images.to(tl.int64) * K * L
    inside = (token < count)[:, None] & (column < COLUMNS)[None, :]
    total = tl.zeros([VALUES, LANES], tl.float32)
    for block in range(BLOCKS):
        at = (block * count + token)[:, None] * COLUMNS + column[None, :]
        total += tl.load(token_sums + at, mask=inside, other=0.0)
    image, k, t = token // L // K, token // L % K, token % L
    out = ((image * L + t) * K + k)[:, None]
    column = column[None, :]
    tl.store(grad_dt + out * R + column, total, mask=inside & (column < R))
    tl.store(grad_B + out * N + column - R, total, mask=inside & (column >= R) & (column < R + N))
    tl.store(grad_C + out * N + column - R - N, total, mask=inside & (column >= R + N))


def backward(grad, x, dt, A, B, C, weight, bias, skip, order, states, *, chunk):
    """Gradients of the eight tensors before ``order``, dense; None for those that are None."""
    run = Launch(x, dt, A, B, C, weight, bias, skip, order, chunk, _TILING)
    batch, L, D, K, N, R = run.batch, run.L, run.D, run.K, run.N, run.R
    grads = [None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
             for t in (x, dt, A, B, C, weight, bias, skip)]
    if not x.numel():
        return [None if g is None else g.zero_() for g in grads]
    grad_x, grad_dt, grad_A, grad_B, grad_C, grad_weight, grad_bias, grad_skip = grads
    grad, states, fp32 = grad.contiguous(), states.contiguous(), dict(dtype=torch.float32)
    if K * N > 1:
        grad_x = x.new_empty((batch, K, L, D), **fp32)
    grad_delta = x.new_empty(grad_x.shape, **fp32) if N > 1 else grad_x
    columns = R + N + (N if run.output else 0)
    token_sums = x.new_empty((run.blocks, batch, K, L, columns), **fp32)
    parts, rows = batch * run.segments, R + 1 + N + (skip is not None)
    sums = x.new_empty((parts, K, rows, D), **fp32)
    maps = run.maps()
    carries = x.new_empty((batch, K, N, run.segments, D), **fp32)
    buffers = grad, states, maps, carries, grad_x, grad_delta, token_sums, sums
    if maps is not None:
        run(_scan_backward, N, *buffers, maps=True)
    run(_scan_backward, 1, *buffers, maps=False)
    launch(_finish_parameters, (cdiv(D, _VALUES), K * rows, 1), sums, grad_A, grad_weight, grad_bias, grad_skip,
           parts, D, N, K, R, skip is not None, _ROWS, _VALUES)
    launch(_finish_tokens, (cdiv(batch * K * L, _VALUES), 1, 1), token_sums, grad_dt, grad_B,
           grad_B if grad_C is None else grad_C, batch, L, run.blocks, N, K, R, columns,
           next_power_of_2(columns), _VALUES)
    if K * N > 1:
        grad_x = grad_x.squeeze(1) if K == 1 else grad_x.sum(1)
    return [grad_x, *grads[1:]]
