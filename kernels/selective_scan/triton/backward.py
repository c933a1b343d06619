"""Backward of the selective scan: the adjoint recurrence runs through the tokens in reverse."""
import torch
import triton
import triton.language as tl

from ..._core.triton_math import LN2, LOG2_E, exp2, exp2_of_product, slope_of, soft_step
from ..._core.triton_support import as_rows, cdiv, launch, next_power_of_2
from .blocks import (
    GROUPS,
    RUNTIME,
    Launch,
    add_directions,
    add_pairs,
    add_steps,
    among_tokens,
    ask_now,
    assignment,
    both_ways,
    fours,
    inside_of,
    is_token,
    load_rate,
    load_scalars,
    load_steps,
    of_steps,
    places,
    prefetch,
    row_at,
    state_before,
    store_rows,
    store_steps,
    through_groups,
    token_at,
    walk_of,
    widen,
)
from .projection import (
    load_bias,
    load_pairs,
    load_projection,
    load_projection_pairs,
    load_ranks,
    load_tile,
    pack,
    product_channel,
    project,
    project_many,
    project_pairs,
    rows_of_steps,
    split_tf32,
    to_product,
)
from .quadtree import has_seconds, poison_of, second_of

#: Warps of a program. A block of tokens is a chunk.
_WARPS = 4
#: So many warps, more than a GPU has at once, begin with a direction before any begins with the next one: what that
#: adds to may still be in the cache, and nobody has to wait for it.
_WARPS_IN_TURN = 2048
#: Programs' sums that one step of a finishing kernel adds, and values that one of its programs finishes.
_ROWS, _VALUES = 32, 64


@triton.jit
def _load(x, dt, B, C, grad, walk, start, left, apart, d, in_d, R: tl.constexpr, RANKS: tl.constexpr,
          SLOTS: tl.constexpr, PAIRS: tl.constexpr, X_ROW: tl.constexpr, DT_ROW: tl.constexpr, B_ROW: tl.constexpr,
          C_ROW: tl.constexpr, GRAD_ROW: tl.constexpr, STEPS: tl.constexpr, OUTPUT: tl.constexpr, ORDER: tl.constexpr,
          MAPS: tl.constexpr):
    """What a block of tokens takes as it is in memory: ``dt`` for ``project``, by step ``grad`` and ``x``, and for
    ``of_steps`` ``C`` and ``B``; nothing of ``x`` and ``B`` with ``MAPS``."""
    begin = 0 if ORDER else start
    runs = tl.arange(0, GROUPS) * apart
    rows, here = places(walk, start, runs, left, d.shape[1], STEPS, ORDER)
    low = ()
    if PAIRS:
        low = load_pairs(dt + begin * DT_ROW, rows, here, R, d.shape[1], DT_ROW, ORDER)
    elif SLOTS:
        low = load_ranks(dt + begin * DT_ROW, rows, here, R, RANKS, d.shape[1], DT_ROW, ORDER)
    grads = load_steps(grad + begin * GRAD_ROW, rows, here, d, in_d, GRAD_ROW, ORDER)
    cs, us, bs = (), (), ()
    if OUTPUT:
        cs = load_scalars(C, walk, start, runs, left, C_ROW, d.shape[1], STEPS, ORDER)
    if not MAPS:
        us = load_steps(x + begin * X_ROW, rows, here, d, in_d, X_ROW, ORDER)
        bs = load_scalars(B, walk, start, runs, left, B_ROW, d.shape[1], STEPS, ORDER)
    if ORDER == 5:
        if has_seconds(walk, start, (GROUPS - 1) * apart + STEPS):
            seconds, here = places(walk, start, runs, left, d.shape[1], STEPS, ORDER, True)
            if PAIRS:
                low = add_pairs(low, load_pairs(dt, seconds, here, R, d.shape[1], DT_ROW, ORDER))
            elif SLOTS:
                low = add_steps(low, load_ranks(dt, seconds, here, R, RANKS, d.shape[1], DT_ROW, ORDER))
            grads = add_steps(grads, load_steps(grad, seconds, here, d, in_d, GRAD_ROW, ORDER))
            cs = add_steps(cs, load_scalars(C, walk, start, runs, left, C_ROW, d.shape[1], STEPS, ORDER, True))
            if not MAPS:
                us = add_steps(us, load_steps(x, seconds, here, d, in_d, X_ROW, ORDER))
                bs = add_steps(bs, load_scalars(B, walk, start, runs, left, B_ROW, d.shape[1], STEPS, ORDER, True))
    return low, grads, cs, us, bs, rows if ORDER and not MAPS else ()


@triton.jit
def _take_ticket(turns, group, K: tl.constexpr):
    """Which of a direction's programs this is, and the direction.

    It waits with ``_wait_for_turn`` for the program of its number in the direction before, and ends with ``_end_turn``.
    Programs are numbered as they start, so that nobody waits for one that has not started; of ``group`` programs all
    directions start before the next ones. ``turns``, int32: how many have started, and by number of program how many
    directions have ended.
    """
    ticket = tl.atomic_add(turns, 1, sem='relaxed')
    first = ticket // (group * K) * group
    each = tl.minimum(tl.num_programs(0) // K - first, group)
    return first + (ticket - first * K) % each, (ticket - first * K) // each


@triton.jit
def _wait_for_turn(turns, program, k):
    """Until the direction before ``k`` has ended, and what it wrote can be read. See ``_take_ticket``."""
    while tl.atomic_cas(turns + 1 + program, k, k, sem='acquire') != k:
        pass
    tl.debug_barrier()


@triton.jit
def _end_turn(turns, program, k):
    """The program of the next direction may go on. See ``_take_ticket``."""
    tl.debug_barrier()
    tl.atomic_xchg(turns + 1 + program, k + 1, sem='release')


@triton.jit
def _widen(low, grads, cs, us, bs, rows, PAIRS: tl.constexpr):
    return low if PAIRS else widen(low), widen(grads), cs, widen(us), bs, rows


@triton.jit(do_not_specialize=[*RUNTIME, 'group'])
def _scan_backward(x, dt, A, B, C, weight, bias, skip, order, grad, states, maps, sums_x, grad_x, grad_delta,
                   token_sums, sums, turns, group, turn, L, chunks, segs, each, dt_image, B_image, C_image,
                   order_image, order_row, height, magic, magic_rows, roll_y, roll_x,
                   D: tl.constexpr, N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, X_ROW: tl.constexpr,
                   DT_ROW: tl.constexpr, DT_K: tl.constexpr, B_ROW: tl.constexpr, B_K: tl.constexpr,
                   C_ROW: tl.constexpr, C_K: tl.constexpr, RANKS: tl.constexpr, SLOTS: tl.constexpr,
                   PAIRS: tl.constexpr, WARPS: tl.constexpr, CHANNELS: tl.constexpr, STEPS: tl.constexpr,
                   CHUNK: tl.constexpr, OUTPUT: tl.constexpr, SKIP: tl.constexpr, ORDER: tl.constexpr,
                   LOG: tl.constexpr, AT_ONCE: tl.constexpr, MAPS: tl.constexpr, SEGMENTED: tl.constexpr):
    """As ``_scan``, in reverse; a program takes all states in turn, with ``MAPS`` one. Blocks of tokens are chunks.

    ``turn``, ``AT_ONCE``, ``sums_x``, ``grad_x``: as ``turn``, ``AT_ONCE``, ``sums`` and ``y`` of ``_scan``; but of all
    directions in turn each has programs of its own, which wait, see ``_take_ticket`` for ``turns`` and ``group``.
    Layouts: grad (batch, L, N or 1, D), dense; grad_x and sums_x (batch, L, D) or (batch, K, L, D); grad_delta, where
    the states' shares add up, as sums_x, fp32; token_sums (batch, K, blocks of channels, L, R + N + N), the last N with
    ``OUTPUT`` only; sums (batch, segs, K, R + 1 + N + 1, D), the last with ``SKIP`` only.
    """
    BLOCKS: tl.constexpr = (D + CHANNELS * WARPS - 1) // (CHANNELS * WARPS)
    NS: tl.constexpr = N if MAPS else 1
    COLUMNS: tl.constexpr = R + N + (N if OUTPUT else 0)
    SUMS: tl.constexpr = R + 1 + N + (1 if SKIP else 0)
    GRAD_ROW: tl.constexpr = D if OUTPUT else N * D
    WIDTH: tl.constexpr = max(8, RANKS)
    APART: tl.constexpr = K > 1 and AT_ONCE == K
    ADDS: tl.constexpr = (N > 1 or K > 1 and not APART) and not MAPS
    ROWS = L + (L // 8 if ORDER == 5 else 0)
    program = tl.program_id(0)
    if AT_ONCE == 0:
        program, turn = _take_ticket(turns, group, K)
    block, seg, first_n, k, image = assignment(program, turn, segs, BLOCKS, NS, AT_ONCE)
    d = (block * WARPS + tl.arange(0, WARPS)[None, :, None]) * CHANNELS + tl.arange(0, CHANNELS)[None, None, :]
    in_d = d < D
    row = image * K + k
    x += image * L * X_ROW
    dt += image * dt_image + k * DT_K
    B += image * B_image + k * B_K
    C += image * C_image + k * C_K
    weight += k * D * R
    grad += image * L * GRAD_ROW
    summed = row if APART else image
    grad_x += summed * L * D
    if ADDS:
        sums_x += summed * L * D
    if N > 1:
        grad_delta += summed * ROWS * D
    token_sums += (row * BLOCKS + block) * ROWS * COLUMNS
    sums += ((image * segs + seg) * K + k) * SUMS * D
    walk = walk_of(order, image, k, L, K, order_image, order_row, height, magic, magic_rows, roll_y, roll_x, ORDER)
    bias += k * D
    if PAIRS:
        weights = load_projection_pairs(weight, block, D, R, WARPS, CHANNELS)
    elif SLOTS:
        weights = load_projection(weight, bias, block, dt.dtype.element_ty, D, R, RANKS, SLOTS, WARPS, CHANNELS)
    bias = load_bias(bias, block, D, WARPS, CHANNELS)
    g = tl.arange(0, GROUPS)[:, None, None]
    # Of the segment's tokens, a group has every GROUPS-th run of STEPS, or one run.
    apart = each * STEPS if MAPS else STEPS
    ahead = STEPS if MAPS else CHUNK
    first = (seg * each).to(tl.int64) * CHUNK
    count = each if MAPS else tl.minimum(each, tl.cdiv(L - first, CHUNK).to(tl.int32))
    if not MAPS:
        token = tl.arange(0, CHUNK)
        product_step, product_group = rows_of_steps(STEPS)
        product_token = product_group * STEPS + product_step
        column = tl.arange(0, WIDTH)
        own = product_channel(tl.arange(0, CHANNELS), CHANNELS)[None, :]
        own = ((block * WARPS + tl.arange(0, WARPS)[:, None]) * CHANNELS + own)[:, :, None]
        own_in = (own < D) & (column < R)[None, None, :]
        wide = tl.load(weight + own * R + column[None, None, :], mask=own_in, other=0.0).to(tl.float32)
        wide_high, wide_rest = split_tf32(wide)
        lines = tl.arange(0, max(WARPS // 2, 1)) * 32
        sum_bias = tl.zeros([GROUPS, WARPS, CHANNELS], tl.float32)
        sum_skip = tl.zeros([GROUPS, WARPS, CHANNELS], tl.float32)
        sum_weight = tl.zeros([WARPS, CHANNELS, WIDTH], tl.float32)
        if SKIP:
            skip_d = tl.load(skip + k * D + d, mask=in_d, other=0.0).to(tl.float32)

    if AT_ONCE == 0:
        _wait_for_turn(turns, program, k)
    for n in range(first_n, first_n + N // NS):
        rate = load_rate(A + k * D * N + d * N + n, LOG, in_d) + poison_of(walk, ORDER)
        grad_n = grad + (0 if OUTPUT else n * D)
        total = tl.zeros([GROUPS, WARPS, CHANNELS], tl.float32)
        sum_rate = tl.zeros([GROUPS, WARPS, CHANNELS], tl.float32)
        carry = tl.zeros([GROUPS, WARPS, CHANNELS], tl.float32)
        if SEGMENTED and not MAPS:
            carry = state_before(maps + (row * N + n) * segs * 2 * D, segs - 1 - seg, segs - 1, -1, D, 2 * D,
                                 fours(block, WARPS, CHANNELS))
        start = first + (count - 1) * ahead
        loaded = _load(x, dt, B + n, C + n, grad_n, walk, start, (L - start).to(tl.int32), apart, d, in_d, R, RANKS,
                       SLOTS, PAIRS, X_ROW, DT_ROW, B_ROW, C_ROW, GRAD_ROW, STEPS, OUTPUT, ORDER, MAPS)
        loaded = _widen(*loaded, PAIRS)
        for i in tl.range(0, count, num_stages=1):
            low, grads, cs, us, bs, rows = loaded
            back = count - 1 - i
            start = first + back * ahead
            left = (L - start).to(tl.int32)
            if ORDER == 5:
                seconds = has_seconds(walk, start, (GROUPS - 1) * apart + STEPS)
            if OUTPUT:
                cs = of_steps(cs, STEPS, CHANNELS)
            if not MAPS:
                bs = of_steps(bs, STEPS, CHANNELS)
            if not MAPS:  # in units of log(2), as steps are
                soon = tl.maximum(start // CHUNK - 2, 0)
                prefetch(states + ((row * chunks + soon) * N + n) * D
                         + tl.minimum(block * WARPS * CHANNELS + lines, D - 1))
                h = tl.load(states + ((row * chunks + start // CHUNK) * N + n) * D + d, mask=in_d, other=0.0) * LOG2_E
            # The block before is loaded while this one is worked on; before the first one, that one again.
            prior = first + tl.maximum(back - 1, 0) * ahead
            following = _load(x, dt, B + n, C + n, grad_n, walk, prior, (L - prior).to(tl.int32), apart, d, in_d,
                              R, RANKS, SLOTS, PAIRS, X_ROW, DT_ROW, B_ROW, C_ROW, GRAD_ROW, STEPS, OUTPUT, ORDER, MAPS)
            if ADDS:  # of the first direction and state, no token has a sum so far
                at = sums_x + (0 if ORDER else start) * D
                before = inside_of(tl.arange(0, GROUPS) * STEPS, tl.where(n + (0 if APART else k) > 0, left, 0), STEPS)
                before = among_tokens(walk, rows, before, ORDER)
                parts = load_steps(at, rows if ORDER else (tl.arange(0, GROUPS) * STEPS,) * STEPS, before, d, in_d, D,
                                   ORDER)
            if MAPS:
                ask_now(count)
            if PAIRS:
                projected = project_pairs(low, weights, bias, R, STEPS)
            elif SLOTS:
                projected = project(low, weights, bias, dt.dtype.element_ty, RANKS, STEPS)
            else:
                projected = project_many(dt, weight, bias, walk, start, left, apart, block, D, R, DT_ROW, WARPS,
                                         CHANNELS, STEPS, ORDER)
            deltas, decays = (), ()
            for s in tl.static_range(STEPS):
                step = soft_step(projected[s])
                deltas, decays = deltas + (step,), decays + (exp2_of_product(step, rate),)
            if MAPS:
                for s in tl.static_range(STEPS - 1, -1, -1):
                    total += deltas[s]
                    carry = decays[s] * (_times(cs, grads, s) + carry)
            else:
                begin = 0 if ORDER else start
                group_a = tl.full([GROUPS, WARPS, CHANNELS], 1.0, tl.float32)
                group_h = tl.zeros([GROUPS, WARPS, CHANNELS], tl.float32)
                group_r = tl.zeros([GROUPS, WARPS, CHANNELS], tl.float32)
                slopes, drives = (), ()
                for s in tl.static_range(STEPS):
                    slopes, drives = slopes + (slope_of(projected[s]),), drives + (us[s] * bs[s],)
                    group_a *= decays[s]
                    group_h = decays[s] * group_h + deltas[s] * drives[s]
                for s in tl.static_range(STEPS - 1, -1, -1):
                    group_r = decays[s] * (_times(cs, grads, s) + group_r)
                all_a, all_r, to_a, to_h, from_a, from_r = both_ways(group_a, group_h, group_r)
                behind = from_a * carry + from_r
                carry = all_a * carry + all_r
                h = to_a * h + to_h
                befores = ()
                for s in tl.static_range(STEPS):
                    befores = befores + (h,)
                    h = decays[s] * h + deltas[s] * drives[s]
                runs = tl.arange(0, GROUPS) * STEPS
                here = inside_of(runs, left, STEPS)
                if not ORDER:
                    rows = (runs,) * STEPS
                steps, sums_B, sums_C, ats, dxs = (), (), (), (), ()
                for s in tl.static_range(STEPS - 1, -1, -1):
                    inside = here[s][:, None, None] & in_d
                    at = begin * D + row_at(rows[s], D, ORDER, CHANNELS) + d + (0 if ORDER else s * D)
                    adjoint = _times(cs, grads, s) + behind
                    if OUTPUT:
                        h = decays[s] * befores[s] + deltas[s] * drives[s]
                        sums_C = (tl.sum(grads[s] * h, 2),) + sums_C
                    behind = decays[s] * adjoint
                    weighted = adjoint * deltas[s]
                    sums_B = (tl.sum(weighted * us[s], 2),) + sums_B
                    dx = weighted * (bs[s] * LN2)
                    reached = behind * befores[s]
                    dv = rate * LN2 * reached + adjoint * drives[s]
                    sum_rate += reached * deltas[s]
                    if SKIP and n == 0:
                        dx += skip_d * grads[s]
                        sum_skip += grads[s] * us[s]
                    if N > 1:
                        if n > 0:
                            dv += tl.load(grad_delta + at, mask=inside, other=0.0)
                        tl.store(grad_delta + at, dv, mask=inside)
                    if ADDS:
                        dx += parts[s]
                    ats, dxs = (at,) + ats, (dx,) + dxs
                    steps = (dv * slopes[s],) + steps
                here = among_tokens(walk, rows, here, ORDER)
                if not ADDS or APART or k * N + n == K * N - 1:
                    store_steps(grad_x, ats, dxs, here, in_d)
                else:
                    store_steps(sums_x, ats, dxs, here, in_d)
                at = token
                if ORDER:
                    at = token_at(walk, start + token, token < left, ORDER).to(tl.int64)
                columns = token_sums + begin * COLUMNS + at * COLUMNS + R + n
                of_B = LN2 * _over_warps(sums_B, CHUNK)
                tl.store(columns, of_B, mask=token < left)
                if OUTPUT:
                    of_C = LN2 * _over_warps(sums_C, CHUNK)
                    tl.store(columns + N, of_C, mask=token < left)
                if N == 1 or n == N - 1:
                    for s in tl.static_range(STEPS):
                        sum_bias += steps[s]
                    spot = product_token
                    in_l = product_token < left
                    if ORDER:
                        spot = token_at(walk, start + product_token, in_l, ORDER).to(tl.int64)
                    all_dv = to_product(steps)
                    high, rest = split_tf32(all_dv)
                    out = tl.dot(high, wide_high, input_precision='tf32')
                    out = tl.dot(rest, wide_high, out, input_precision='tf32')
                    out = tl.dot(high, wide_rest, out, input_precision='tf32')
                    out_at = token_sums + begin * COLUMNS + spot[:, None] * COLUMNS + column[None, :]
                    out = _sum_last(tl.permute(out, (1, 2, 0)))
                    tl.store(out_at, out, mask=in_l[:, None] & (column < R)[None, :])
                    is_read = is_token(walk, spot, in_l, ORDER)
                    dts = load_tile(dt + begin * DT_ROW, spot, column, is_read, DT_ROW, R).to(tl.float32)
                    if ORDER == 5:
                        if seconds:
                            second, there = second_of(walk, start + product_token, in_l)
                            second = second.to(tl.int64)
                            more = load_tile(dt, second, column, there, DT_ROW, R)
                            dts = (dts + more.to(tl.float32)).to(dt.dtype.element_ty).to(tl.float32)
                            copies = token_sums + second[:, None] * COLUMNS + column[None, :]
                            tl.store(copies, out, mask=there[:, None] & (column < R)[None, :])
                    dts = tl.broadcast_to(dts[None, :, :], (WARPS, CHUNK, WIDTH))
                    high, rest = split_tf32(tl.permute(all_dv, (0, 2, 1)))
                    if dt.dtype.element_ty == tl.float32:
                        dts, dts_rest = split_tf32(dts)
                        sum_weight = tl.dot(high, dts_rest, sum_weight, input_precision='tf32')
                    sum_weight = tl.dot(high, dts, sum_weight, input_precision='tf32')
                    sum_weight = tl.dot(rest, dts, sum_weight, input_precision='tf32')
                if ORDER == 5:
                    if seconds:
                        if not ADDS or APART or k * N + n == K * N - 1:
                            spots, there = places(walk, start, runs, left, WARPS, STEPS, ORDER, True)
                            store_rows(grad_x, spots, dxs, there, d, in_d, D)
                        second, there = second_of(walk, start + token, token < left)
                        copies = token_sums + second.to(tl.int64) * COLUMNS + R + n
                        tl.store(copies, of_B, mask=there)
                        tl.store(copies + N, of_C, mask=there)
            loaded = _widen(*following, PAIRS)
        if MAPS:
            a, r, _, _ = through_groups(exp2(rate * total), carry, True)
            at = maps + ((row * N + n) * segs + seg) * 2 * D + d
            tl.store(at + g * 0, a, mask=(g == 0) & in_d)
            tl.store(at + D + g * 0, r, mask=(g == 0) & in_d)
        else:
            tl.store(sums + (R + 1 + n) * D + d, LN2 * LN2 * tl.sum(sum_rate, 0, keep_dims=True), mask=in_d)
        if ADDS and N > 1:  # threads read what others wrote
            tl.debug_barrier()
    if not MAPS:
        tl.store(sums + column[None, None, :] * D + own, sum_weight, mask=own_in)
        tl.store(sums + R * D + d, tl.sum(sum_bias, 0, keep_dims=True), mask=in_d)
        if SKIP:
            tl.store(sums + (R + 1 + N) * D + d, tl.sum(sum_skip, 0, keep_dims=True), mask=in_d)
    if AT_ONCE == 0:
        _end_turn(turns, program, k)


@triton.jit
def _times(cs, grads, s: tl.constexpr):
    """What the output's gradient is for the state at step ``s``."""
    if len(cs) == 0:
        return grads[s]
    else:
        return cs[s] * grads[s]


@triton.jit
def _over_warps(parts, CHUNK: tl.constexpr):
    """A tuple of the steps' [groups, warps] as sums over the warps, [tokens]."""
    x = tl.permute(pack(parts), (0, 2, 3, 1))
    return tl.reshape(_sum_last(tl.reshape(x, (1, CHUNK, x.shape[3]))), (CHUNK,))


@triton.jit
def _sum_last(x):
    """The sum over the last dimension of three, a power of two, by halves: of one thread, so that what is added moves
    between threads once."""
    if x.shape[2] == 1:
        return tl.reshape(x, (x.shape[0], x.shape[1]))
    else:
        even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // 2, 2)))
        return _sum_last(even + odd)


@triton.jit(do_not_specialize=['parts'])
def _finish_parameters(sums, A, grad_A, grad_weight, grad_bias, grad_skip, parts, D: tl.constexpr, N: tl.constexpr,
                       K: tl.constexpr, R: tl.constexpr, SKIP: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr,
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
        place = (k * D + d) * N + which - R - 1
        if LOG:
            total *= load_rate(A + place, True, in_d)
        tl.store(grad_A + place, total, mask=in_d)
    elif SKIP:
        tl.store(grad_skip + k * D + d, total, mask=in_d)


@triton.jit(do_not_specialize=['L', 'rows', 'images'])
def _finish_tokens(token_sums, grad_dt, grad_B, grad_C, grad_rest, images, L, rows, BLOCKS: tl.constexpr,
                   N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, ROW_DT: tl.constexpr, ROW_B: tl.constexpr,
                   ROW_C: tl.constexpr, COLUMNS: tl.constexpr, LANES: tl.constexpr, VALUES: tl.constexpr):
    """Add up ``token_sums`` (batch, K, blocks of channels, rows, COLUMNS) in a fixed order. What is in rows behind L
    goes to ``grad_rest`` (batch, rows - L, K, COLUMNS)."""
    token = tl.program_id(0) * VALUES + tl.arange(0, VALUES).to(tl.int64)
    column = tl.arange(0, LANES)
    count = images.to(tl.int64) * K * rows
    inside = (token < count)[:, None] & (column < COLUMNS)[None, :]
    total = tl.zeros([VALUES, LANES], tl.float32)
    image, k, t = token // rows // K, token // rows % K, token % rows
    for block in range(BLOCKS):
        at = (token // rows * BLOCKS + block) * rows + t
        total += tl.load(token_sums + at[:, None] * COLUMNS + column[None, :], mask=inside, other=0.0)
    column = column[None, :]
    if grad_rest is not None:
        rest = ((image * (rows - L) + t - L) * K + k)[:, None] * COLUMNS + column
        tl.store(grad_rest + rest, total, mask=inside & (t >= L)[:, None])
        inside = inside & (t < L)[:, None]
    out = ((image * L + t) * K + k)[:, None]
    tl.store(grad_dt + out * ROW_DT + column, total, mask=inside & (column < R))
    tl.store(grad_B + out * ROW_B + column - R, total, mask=inside & (column >= R) & (column < R + N))
    tl.store(grad_C + out * ROW_C + column - R - N, total, mask=inside & (column >= R + N))


def backward(grad, x, dt, A, B, C, weight, bias, skip, order, states, *, chunk, log=False, grad_dt=None, grad_B=None,
             grad_C=None):
    """Gradients of the eight tensors before ``order``; None for those that are None. ``log`` as in forward.
    ``grad_dt``, ``grad_B``, ``grad_C``: where to put those, rows evenly spaced; all others are dense.

    Of a quadtree in the order 'released' a ninth comes after them: of the positions where there is no token, see
    quadtree.py, those of dt, B, C, (batch, L / 8, K, R + 2 N), dtype of ``dt``."""
    run = Launch(x, dt, A, B, C, weight, bias, skip, order, chunk, _WARPS, chunk // 8, log)
    batch, L, D, K, N, R = run.batch, run.L, run.D, run.K, run.N, run.R
    grads = [given if given is not None or t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
             for t, given in ((x, None), (dt, grad_dt), (A, None), (B, grad_B), (C, grad_C), (weight, None),
                              (bias, None), (skip, None))]
    if not x.numel():
        return [None if g is None else g.zero_() for g in grads]
    grad_x, grad_dt, grad_A, grad_B, grad_C, grad_weight, grad_bias, grad_skip = grads
    grad, states, fp32 = grad.contiguous(), states.contiguous(), dict(dtype=torch.float32)
    sums_x, apart = run.sums(), K > 1 and not run.in_turn
    if apart:
        grad_x = sums_x
    grad_delta = sums_x.new_empty((*sums_x.shape[:-2], run.rows, D)) if N > 1 else None
    columns = R + N + (N if run.output else 0)
    token_sums = x.new_empty((batch, K, run.blocks, run.rows, columns), **fp32)
    parts, rows = batch * run.segments, R + 1 + N + (skip is not None)
    sums = x.new_empty((parts, K, rows, D), **fp32)
    maps = run.maps(1)
    turns, waits = None, run.in_turn and maps is None
    if waits:
        turns = x.new_empty(1 + batch * run.blocks, dtype=torch.int32).zero_()
    buffers = (grad, states, maps, sums_x, grad_x, grad_delta, token_sums, sums, turns,
               cdiv(_WARPS_IN_TURN, run.num_warps))
    if maps is not None:
        run(_scan_backward, N, *buffers, constants=(True, True))
    for directions in run.launches():
        run(_scan_backward, K if waits else 1, *buffers, directions=directions, constants=(False, maps is not None))
    launch(_finish_parameters, (cdiv(D, _VALUES), K * rows, 1), sums, run.tensors[2], grad_A, grad_weight, grad_bias,
           grad_skip, parts, D, N, K, R, skip is not None, log, _ROWS, _VALUES)
    rest = [dt.new_empty((batch, run.rows - L, K, columns))] if run.rows > L else []
    launch(_finish_tokens, (cdiv(batch * K * run.rows, _VALUES), 1, 1), token_sums, grad_dt, grad_B,
           grad_B if grad_C is None else grad_C, rest[0] if rest else None, batch, L, run.rows, run.blocks, N, K, R,
           as_rows(grad_dt, 3)[1], as_rows(grad_B, 3)[1], N if grad_C is None else as_rows(grad_C, 3)[1], columns,
           next_power_of_2(columns), _VALUES)
    return [add_directions(grad_x, x.dtype) if apart else grad_x, *grads[1:], *rest]
