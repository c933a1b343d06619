"""Forward of the selective scan."""
import torch
import triton
import triton.language as tl

from ..._core.triton_math import LN2, exp2_of_product, let_next_start, soft_step, wait_for_previous
from ..._core.triton_support import overlaps
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
    fours,
    inside_of,
    load_fours,
    load_rate,
    load_scalars,
    load_steps,
    of_steps,
    places,
    prefetch,
    rate_of,
    row_at,
    state_before,
    store_fours,
    store_rows,
    store_steps,
    through_groups,
    walk_of,
    widen,
)
from .projection import (
    load_bias,
    load_pairs,
    load_projection,
    load_projection_pairs,
    load_ranks,
    project,
    project_many,
    project_pairs,
)
from .quadtree import has_seconds, poison_of


@triton.jit
def _load(x, dt, B, C, walk, start, left, apart, d, in_d, R: tl.constexpr, RANKS: tl.constexpr, SLOTS: tl.constexpr,
          PAIRS: tl.constexpr, X_ROW: tl.constexpr, DT_ROW: tl.constexpr, B_ROW: tl.constexpr, C_ROW: tl.constexpr,
          STEPS: tl.constexpr, ORDER: tl.constexpr, EARLY: tl.constexpr):
    """What a block of tokens takes as it is in memory: ``dt`` for ``project``, ``x`` by step, ``B`` for ``of_steps``;
    with ``EARLY`` what is needed last as well, ``C`` likewise and where the tokens are.
    """
    begin = 0 if ORDER else start
    runs = tl.arange(0, GROUPS) * apart
    rows, here = places(walk, start, runs, left, d.shape[1], STEPS, ORDER)
    low, cs = (), ()
    if PAIRS:
        low = load_pairs(dt + begin * DT_ROW, rows, here, R, d.shape[1], DT_ROW, ORDER)
    elif SLOTS:
        low = load_ranks(dt + begin * DT_ROW, rows, here, R, RANKS, d.shape[1], DT_ROW, ORDER)
    us = load_steps(x + begin * X_ROW, rows, here, d, in_d, X_ROW, ORDER)
    bs = load_scalars(B, walk, start, runs, left, B_ROW, d.shape[1], STEPS, ORDER)
    if EARLY:
        cs = load_scalars(C, walk, start, runs, left, C_ROW, d.shape[1], STEPS, ORDER)
    if ORDER == 5:
        if has_seconds(walk, start, (GROUPS - 1) * apart + STEPS):
            seconds, here = places(walk, start, runs, left, d.shape[1], STEPS, ORDER, True)
            if PAIRS:
                low = add_pairs(low, load_pairs(dt, seconds, here, R, d.shape[1], DT_ROW, ORDER))
            elif SLOTS:
                low = add_steps(low, load_ranks(dt, seconds, here, R, RANKS, d.shape[1], DT_ROW, ORDER))
            us = add_steps(us, load_steps(x, seconds, here, d, in_d, X_ROW, ORDER))
            bs = add_steps(bs, load_scalars(B, walk, start, runs, left, B_ROW, d.shape[1], STEPS, ORDER, True))
            if EARLY:
                cs = add_steps(cs, load_scalars(C, walk, start, runs, left, C_ROW, d.shape[1], STEPS, ORDER, True))
    return low, us, bs, cs, rows if EARLY else ()


@triton.jit
def _widen(low, us, bs, cs, rows, PAIRS: tl.constexpr):
    return low if PAIRS else widen(low), widen(us), bs, cs, rows


@triton.jit
def _walk(block, seg, first_n, k, image, x, dt, A, B, C, weight, bias, skip, order, maps, sums, y, states, L, chunks,
          segs, each, dt_image, B_image, C_image, order_image, order_row, height, magic, magic_rows, roll_y, roll_x,
          D: tl.constexpr, N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, X_ROW: tl.constexpr, DT_ROW: tl.constexpr,
          DT_K: tl.constexpr, B_ROW: tl.constexpr, B_K: tl.constexpr, C_ROW: tl.constexpr, C_K: tl.constexpr,
          RANKS: tl.constexpr, SLOTS: tl.constexpr, PAIRS: tl.constexpr, WARPS: tl.constexpr, CHANNELS: tl.constexpr,
          STEPS: tl.constexpr, CHUNK: tl.constexpr, OUTPUT: tl.constexpr, SKIP: tl.constexpr, ORDER: tl.constexpr,
          LOG: tl.constexpr, AT_ONCE: tl.constexpr, MAPS: tl.constexpr, SEGMENTED: tl.constexpr, OVERLAP: tl.constexpr):
    """One segment of one image in direction ``k``, see ``_scan``."""
    NS: tl.constexpr = N if MAPS or not OUTPUT else 1  # states that are programs of their own
    BLOCK: tl.constexpr = GROUPS * STEPS
    APART: tl.constexpr = K > 1 and AT_ONCE == K  # there are sums for each direction
    EARLY: tl.constexpr = OUTPUT and (N > 1 or K > 1 and not APART) and not MAPS  # what is needed last is loaded first
    d = (block * WARPS + tl.arange(0, WARPS)[None, :, None]) * CHANNELS + tl.arange(0, CHANNELS)[None, None, :]
    in_d = d < D
    ds = fours(block, WARPS, CHANNELS)
    row = image * K + k
    x += image * L * X_ROW
    dt += image * dt_image + k * DT_K
    B += image * B_image + k * B_K
    weight += k * D * R
    bias += k * D
    if PAIRS:
        weights = load_projection_pairs(weight, block, D, R, WARPS, CHANNELS)
    elif SLOTS:
        weights = load_projection(weight, bias, block, dt.dtype.element_ty, D, R, RANKS, SLOTS, WARPS, CHANNELS)
    bias = load_bias(bias, block, D, WARPS, CHANNELS)
    if OUTPUT:
        C += image * C_image + k * C_K
        y += (row if APART else image) * L * D
        if EARLY:
            sums += (row if APART else image) * L * D
    else:
        y += image * L * N * D + first_n * D
    walk = walk_of(order, image, k, L, K, order_image, order_row, height, magic, magic_rows, roll_y, roll_x, ORDER)
    Y_ROW: tl.constexpr = D if OUTPUT else N * D
    MAP: tl.constexpr = (1 + GROUPS) * 2 * D
    g = tl.arange(0, GROUPS)[:, None, None]
    # Of the tokens of its segment a group has one run. Where there is one segment, which nobody walked before, groups
    # have every GROUPS-th run of STEPS, and in each block tell those behind what they do to a state.
    apart = each * STEPS if SEGMENTED else STEPS
    ahead = STEPS if SEGMENTED else BLOCK
    runs = tl.arange(0, GROUPS) * apart
    first = (seg * each).to(tl.int64) * BLOCK

    if OVERLAP and MAPS:
        let_next_start()
    for n in range(first_n, first_n + N // NS):
        start = first + (each - 1) * ahead if MAPS else first
        loaded = _load(x, dt, B + n, C + n, walk, start, (L - start).to(tl.int32), apart, d, in_d, R, RANKS, SLOTS,
                       PAIRS, X_ROW, DT_ROW, B_ROW, C_ROW, STEPS, ORDER, EARLY)
        if CHANNELS == 16:
            rate = load_rate(A + k * D * N + d * N + n, LOG, in_d)
        else:  # there is one state
            rate = rate_of(load_fours(A + k * D + g * 0, ds, g >= 0, D, 0.0), LOG)
        rate += poison_of(walk, ORDER)
        h = tl.zeros([GROUPS, WARPS, CHANNELS], tl.float32)
        through = tl.full([GROUPS, WARPS, CHANNELS], 1.0, tl.float32)
        if SEGMENTED:
            maps_n = maps + (row * N + n) * segs * MAP
            own = maps_n + seg * MAP
        if SEGMENTED and not MAPS:
            if OVERLAP:
                wait_for_previous()
            to_a = load_fours(own + (1 + g) * 2 * D, ds, g >= 0, D, 0.0)
            to_b = load_fours(own + (1 + g) * 2 * D + D, ds, g >= 0, D, 0.0)
            h = to_a * state_before(maps_n, seg, 0, 1, D, MAP, ds) + to_b
        loaded = _widen(*loaded, PAIRS)
        for i in tl.range(0, each, num_stages=1):
            low, us, bs, cs, rows = loaded
            start = first + (each - 1 - i if MAPS else i) * ahead
            left = (L - start).to(tl.int32)
            if ORDER == 5:
                seconds = has_seconds(walk, start, (GROUPS - 1) * apart + STEPS)
            bs = of_steps(bs, STEPS, CHANNELS)
            further = first + tl.maximum(each - 2 - i, 0) * ahead if MAPS else start + ahead
            # The next block is loaded while this one is worked on.
            following = _load(x, dt, B + n, C + n, walk, further, (L - further).to(tl.int32), apart, d, in_d, R, RANKS,
                              SLOTS, PAIRS, X_ROW, DT_ROW, B_ROW, C_ROW, STEPS, ORDER, EARLY)
            begin = 0 if ORDER else start
            if EARLY:  # of the first direction and state, no token has a sum so far
                here = inside_of(runs, tl.where(n + (0 if APART else k) > 0, left, 0), STEPS)
                here = among_tokens(walk, rows, here, ORDER)
                parts = load_steps(sums + begin * D, rows, here, d, in_d, D, ORDER)
            ask_now(each)
            if STEPS > 4:  # few warps and no segments: the one after that
                soon = tl.minimum(2 * BLOCK + tl.arange(0, BLOCK), left - 1)
                prefetch(x + start * X_ROW + soon * X_ROW + block * WARPS * CHANNELS)
            if PAIRS:
                projected = project_pairs(low, weights, bias, R, STEPS)
            elif SLOTS:
                projected = project(low, weights, bias, dt.dtype.element_ty, RANKS, STEPS)
            else:
                projected = project_many(dt, weight, bias, walk, start, left, apart, block, D, R, DT_ROW, WARPS,
                                         CHANNELS, STEPS, ORDER)
            group_a = tl.full([GROUPS, WARPS, CHANNELS], 1.0, tl.float32)
            group_b = tl.zeros([GROUPS, WARPS, CHANNELS], tl.float32)
            decays, drives = (), ()
            for s in tl.static_range(STEPS):
                step = soft_step(projected[s])
                a = exp2_of_product(step, rate)
                b = step * us[s] * (bs[s] * LN2)
                decays, drives = decays + (a,), drives + (b,)
                if not MAPS and not SEGMENTED:
                    group_a *= a
                    group_b = a * group_b + b
            if MAPS:
                for s in tl.static_range(STEPS - 1, -1, -1):
                    h += through * drives[s]
                    through *= decays[s]
            else:
                enter = h
                if not SEGMENTED:
                    all_a, all_b, enter_a, enter_b = through_groups(group_a, group_b)
                    enter = enter_a * h + enter_b
                    h = all_a * h + all_b
                ran = i * ahead + g * apart
                chunk = first // CHUNK + ran // CHUNK
                store_fours(states + ((row * chunks + chunk) * N + n) * D, ds, enter,
                            (ran % CHUNK == 0) & (chunk < chunks), D)
                if EARLY:
                    here = among_tokens(walk, rows, inside_of(runs, left, STEPS), ORDER)
                else:
                    rows, here = places(walk, start, runs, left, d.shape[1], STEPS, ORDER)
                    if OUTPUT:
                        cs = load_scalars(C, walk, start, runs, left, C_ROW, WARPS, STEPS, ORDER)
                        if ORDER == 5:
                            if seconds:
                                more = load_scalars(C, walk, start, runs, left, C_ROW, WARPS, STEPS, ORDER, True)
                                cs = add_steps(cs, more)
                if OUTPUT:
                    cs = of_steps(cs, STEPS, CHANNELS)
                ats, values = (), ()
                for s in tl.static_range(STEPS):
                    at = begin * Y_ROW + row_at(rows[s], Y_ROW, ORDER, CHANNELS) + d + (0 if ORDER else s * Y_ROW)
                    enter = decays[s] * enter + drives[s]
                    value = enter
                    if OUTPUT:
                        value = cs[s] * enter
                        if SKIP and n == 0:
                            skip_d = tl.load(skip + k * D + d, mask=in_d, other=0.0).to(tl.float32)
                            value += skip_d * us[s]
                    if EARLY:
                        value += parts[s]
                    ats, values = ats + (at,), values + (value,)
                if not EARLY or APART or k * N + n == K * N - 1:
                    store_steps(y, ats, values, here, in_d)
                    if ORDER == 5:
                        if seconds:
                            spots, there = places(walk, start, runs, left, WARPS, STEPS, ORDER, True)
                            store_rows(y, spots, values, there, d, in_d, Y_ROW)
                else:
                    store_steps(sums, ats, values, here, in_d)
                if SEGMENTED:
                    h = enter
            loaded = _widen(*following, PAIRS)
        if MAPS:
            a, b, to_a, to_b = through_groups(through, h)
            store_fours(own + g * 0, ds, a, g == 0, D)
            store_fours(own + D + g * 0, ds, b, g == 0, D)
            store_fours(own + (1 + g) * 2 * D, ds, to_a, g >= 0, D)
            store_fours(own + (1 + g) * 2 * D + D, ds, to_b, g >= 0, D)
        if EARLY and N > 1:  # threads read what others wrote
            tl.debug_barrier()


@triton.jit(do_not_specialize=RUNTIME)
def _scan(x, dt, A, B, C, weight, bias, skip, order, maps, sums, y, states, turn, L, chunks, segs, each, dt_image,
          B_image, C_image, order_image, order_row, height, magic, magic_rows, roll_y, roll_x, D: tl.constexpr,
          N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, X_ROW: tl.constexpr, DT_ROW: tl.constexpr,
          DT_K: tl.constexpr, B_ROW: tl.constexpr, B_K: tl.constexpr, C_ROW: tl.constexpr, C_K: tl.constexpr,
          RANKS: tl.constexpr, SLOTS: tl.constexpr, PAIRS: tl.constexpr, WARPS: tl.constexpr, CHANNELS: tl.constexpr,
          STEPS: tl.constexpr, CHUNK: tl.constexpr, OUTPUT: tl.constexpr, SKIP: tl.constexpr, ORDER: tl.constexpr,
          LOG: tl.constexpr, AT_ONCE: tl.constexpr, MAPS: tl.constexpr, SEGMENTED: tl.constexpr,
          OVERLAP: tl.constexpr):
    """One segment of one image and direction, ``CHANNELS * WARPS`` channels, and one state; all states with ``OUTPUT``.

    ``turn``, ``AT_ONCE``: see ``Launch.launches``; where that says all in turn, a program takes all directions. What is
    summed so far of directions and states is in ``sums``, fp32, and the last ones are added for ``y``. Of directions
    side by side each has sums of its own, which is all that there is in the end: ``y`` and ``sums`` are the same then.
    ``MAPS``: only what the segment does to a state, for the segments after it, and what its groups up to each do, for
    the next pass; from its end to its beginning, so that the next pass finds in the cache what it reads first.
    ``OVERLAP``: the next pass begins while this one ends.
    Layouts: y (batch, L, N, D) without ``OUTPUT``, else (batch, L, D), as sums, or (batch, K, L, D);
    states (batch, K, chunks, N, D); maps (batch, K, N, segs, 1 + groups, 2, D).
    """
    BLOCKS: tl.constexpr = (D + CHANNELS * WARPS - 1) // (CHANNELS * WARPS)
    NS: tl.constexpr = N if MAPS or not OUTPUT else 1  # states that are programs of their own
    TURNS: tl.constexpr = K if AT_ONCE == 0 else 1
    block, seg, first_n, k, image = assignment(tl.program_id(0), turn, segs, BLOCKS, NS, AT_ONCE)
    for further in tl.range(0, TURNS, num_stages=1):
        _walk(block, seg, first_n, k + further, image, x, dt, A, B, C, weight, bias, skip, order, maps, sums, y,
              states, L, chunks, segs, each, dt_image, B_image, C_image, order_image, order_row, height, magic,
              magic_rows, roll_y, roll_x, D, N, K, R, X_ROW, DT_ROW, DT_K, B_ROW, B_K, C_ROW, C_K, RANKS, SLOTS, PAIRS,
              WARPS, CHANNELS, STEPS, CHUNK, OUTPUT, SKIP, ORDER, LOG, AT_ONCE, MAPS, SEGMENTED, OVERLAP)
        if TURNS > 1:  # threads read what others wrote
            tl.debug_barrier()


#: Warps of a program, steps of a group, and those where few warps have no order, which takes registers.
_WARPS, _STEPS, _STEPS_ALONE = 4, 4, 8


def _registers(run, half):
    """The registers of a thread, where the assembler has to be told: of itself it takes fewer for these, works out one
    step size after another, and waits for each of their operations. Others have what they need or would spill."""
    if run.in_turn and run.segments == 1:
        return {'maxnreg': 168} if half else {}
    if run.N > 1 or run.output or run.R > (8 if half else 4):
        return {}
    if run.steps == 8:  # there are no segments
        return {'maxnreg': 216}
    if run.channels == 32:
        return {'maxnreg': 168}
    return {'maxnreg': 120} if run.segments > 1 and run.R <= 4 and run.tensors[-1] is None else {}


def forward(x, dt, A, B, C, weight, bias, skip, order, *, chunk, log=False):
    """``y`` and the state before each chunk; see ``ops.py``. ``log``: ``A`` has logarithms, of the rates' opposites."""
    run = Launch(x, dt, A, B, C, weight, bias, skip, order, chunk, _WARPS, _STEPS, log,
                 _STEPS_ALONE if order is None else None, B.shape[3] == 1 and C is None and order is None)
    states = x.new_empty((run.batch, run.K, run.chunks, run.N, run.D), dtype=torch.float32)
    sums = run.sums() if run.output else None
    if run.output and run.K > 1 and not run.in_turn:
        y = sums
    else:
        y = x.new_empty((run.batch, run.L, run.D) if run.output else (run.batch, run.L, run.N, run.D))
    if x.numel():
        maps, options = run.maps(1 + GROUPS.value), _registers(run, x.dtype.itemsize == 2)
        overlap = maps is not None and overlaps(x)
        buffers, programs = (maps, sums, y, states), 1 if run.output else run.N
        if maps is not None:
            run(_scan, run.N, *buffers, constants=(True, True, overlap), **options)
        if overlap:
            options['launch_pdl'] = True
        for directions in run.launches():
            run(_scan, programs, *buffers, directions=directions, constants=(False, maps is not None, overlap),
                **options)
            options.pop('launch_pdl', None)  # the next direction waits for the end of this one
    return (add_directions(y, x.dtype) if y is sums and run.output else y), states
