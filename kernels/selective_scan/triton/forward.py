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
    ask_now,
    fours,
    load_bias,
    load_fours,
    load_projection,
    load_ranks,
    load_rate,
    load_scalars,
    load_steps,
    of_steps,
    places,
    prefetch,
    project,
    project_many,
    rate_of,
    state_before,
    store_fours,
    through_groups,
    widen,
)


@triton.jit
def _load(x, dt, B, order, start, left, apart, d, in_d, R: tl.constexpr, RANKS: tl.constexpr, SLOTS: tl.constexpr,
          X_ROW: tl.constexpr, DT_ROW: tl.constexpr, B_ROW: tl.constexpr, STEPS: tl.constexpr, ORDER: tl.constexpr):
    """What a block of tokens takes as it is in memory: ``dt`` for ``project``, ``x`` by step, ``B`` for ``of_steps``.
    """
    begin = 0 if ORDER else start
    rows, here = places(order, start, tl.arange(0, GROUPS) * apart, left, STEPS, ORDER)
    low = ()
    if SLOTS:
        low = load_ranks(dt + begin * DT_ROW, rows, here, R, RANKS, d.shape[1], DT_ROW, ORDER)
    return (low, load_steps(x + begin * X_ROW, rows, here, d, in_d, X_ROW, ORDER),
            load_scalars(B, order, start, tl.arange(0, GROUPS) * apart, left, B_ROW, d.shape[1], STEPS, ORDER))


@triton.jit
def _widen(low, us, bs):
    return widen(low), widen(us), bs


@triton.jit(do_not_specialize=RUNTIME)
def _scan(x, dt, A, B, C, weight, bias, skip, order, maps, y, states, L, chunks, segs, each, dt_image, B_image, C_image,
          order_image, order_row, D: tl.constexpr, N: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
          X_ROW: tl.constexpr, DT_ROW: tl.constexpr, DT_K: tl.constexpr, B_ROW: tl.constexpr, B_K: tl.constexpr,
          C_ROW: tl.constexpr, C_K: tl.constexpr, RANKS: tl.constexpr, SLOTS: tl.constexpr, WARPS: tl.constexpr,
          CHANNELS: tl.constexpr, STEPS: tl.constexpr, CHUNK: tl.constexpr, OUTPUT: tl.constexpr, SKIP: tl.constexpr,
          ORDER: tl.constexpr, LOG: tl.constexpr, MAPS: tl.constexpr, SEGMENTED: tl.constexpr, OVERLAP: tl.constexpr):
    """One segment of one image and direction, ``CHANNELS * WARPS`` channels, and one state; all states with ``OUTPUT``.

    ``MAPS``: only what the segment does to a state, for the segments after it, and what its groups up to each do, for
    the next pass; from its end to its beginning, so that the next pass finds in the cache what it reads first.
    ``OVERLAP``: the next pass begins while this one ends.
    Layouts: y (batch, L, N, D) without ``OUTPUT``, else (batch, K, L, D); states (batch, K, chunks, N, D); maps
    (batch, K, N, segs, 1 + groups, 2, D).
    """
    BLOCKS: tl.constexpr = (D + CHANNELS * WARPS - 1) // (CHANNELS * WARPS)
    NS: tl.constexpr = N if MAPS or not OUTPUT else 1  # states that are programs of their own
    BLOCK: tl.constexpr = GROUPS * STEPS
    pid = tl.program_id(0)
    block = pid % BLOCKS
    d = (block * WARPS + tl.arange(0, WARPS)[None, :, None]) * CHANNELS + tl.arange(0, CHANNELS)[None, None, :]
    in_d = d < D
    ds = fours(block, WARPS, CHANNELS)
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
    bias += k * D
    if SLOTS:
        weights = load_projection(weight, bias, block, dt.dtype.element_ty, D, R, RANKS, SLOTS, WARPS, CHANNELS)
    bias = load_bias(bias, block, D, WARPS, CHANNELS)
    if OUTPUT:
        C += image * C_image + k * C_K
        y += row * L * D
    else:
        y += image * L * N * D + first_n * D
    if ORDER:
        order += image * order_image + k * order_row
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
        loaded = _load(x, dt, B + n, order, start, (L - start).to(tl.int32), apart, d, in_d, R, RANKS, SLOTS, X_ROW,
                       DT_ROW, B_ROW, STEPS, ORDER)
        if CHANNELS == 16:
            rate = load_rate(A + k * D * N + d * N + n, LOG, in_d)
        else:  # there is one state
            rate = rate_of(load_fours(A + k * D + g * 0, ds, g >= 0, D, 0.0), LOG)
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
        loaded = _widen(*loaded)
        for i in tl.range(0, each, num_stages=1):
            low, us, bs = loaded
            bs = of_steps(bs, STEPS, CHANNELS)
            start = first + (each - 1 - i if MAPS else i) * ahead
            left = (L - start).to(tl.int32)
            further = first + tl.maximum(each - 2 - i, 0) * ahead if MAPS else start + ahead
            # The next block is loaded while this one is worked on.
            following = _load(x, dt, B + n, order, further, (L - further).to(tl.int32), apart, d, in_d, R, RANKS,
                              SLOTS, X_ROW, DT_ROW, B_ROW, STEPS, ORDER)
            ask_now(each)
            if STEPS > 4:  # few warps and no segments: the one after that
                soon = tl.minimum(2 * BLOCK + tl.arange(0, BLOCK), left - 1)
                prefetch(x + start * X_ROW + soon * X_ROW + block * WARPS * CHANNELS)
            if SLOTS:
                projected = project(low, weights, bias, dt.dtype.element_ty, RANKS, STEPS)
            else:
                projected = project_many(dt, weight, bias, order, start, left, apart, block, D, R, DT_ROW, WARPS,
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
                begin = 0 if ORDER else start
                rows, here = places(order, start, runs, left, STEPS, ORDER)
                if OUTPUT:
                    cs = load_scalars(C + n, order, start, runs, left, C_ROW, WARPS, STEPS, ORDER)
                    cs = of_steps(cs, STEPS, CHANNELS)
                for s in tl.static_range(STEPS):
                    inside = here[s][:, None, None] & in_d
                    enter = decays[s] * enter + drives[s]
                    out = y + begin * Y_ROW + rows[s][:, None, None] * Y_ROW + d + (0 if ORDER else s * Y_ROW)
                    if OUTPUT:
                        value = cs[s] * enter
                        if n > 0:
                            value += tl.load(out, mask=inside, other=0.0)
                        elif SKIP:
                            skip_d = tl.load(skip + k * D + d, mask=in_d, other=0.0).to(tl.float32)
                            value += skip_d * us[s]
                        tl.store(out, value, mask=inside)
                    else:
                        tl.store(out, enter, mask=inside)
                if SEGMENTED:
                    h = enter
            loaded = _widen(*following)
        if MAPS:
            a, b, to_a, to_b = through_groups(through, h)
            store_fours(own + g * 0, ds, a, g == 0, D)
            store_fours(own + D + g * 0, ds, b, g == 0, D)
            store_fours(own + (1 + g) * 2 * D, ds, to_a, g >= 0, D)
            store_fours(own + (1 + g) * 2 * D + D, ds, to_b, g >= 0, D)


#: Warps of a program, steps of a group, and those where few warps have no order, which takes registers.
_WARPS, _STEPS, _STEPS_ALONE = 4, 4, 8


def _registers(run, half):
    """The registers of a thread, where the assembler has to be told: of itself it takes fewer for these, works out one
    step size after another, and waits for each of their operations. Others have what they need or would spill."""
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
    if not run.output:
        y = x.new_empty((run.batch, run.L, run.N, run.D))
    else:
        sums = run.K * run.N > 1
        y = x.new_empty((run.batch, run.K, run.L, run.D), dtype=torch.float32 if sums else x.dtype)
    if x.numel():
        maps, options = run.maps(1 + GROUPS.value), _registers(run, x.dtype.itemsize == 2)
        overlap = maps is not None and overlaps(x)
        if maps is not None:
            run(_scan, run.N, maps, y, states, constants=(True, True, overlap), **options)
        if overlap:
            options['launch_pdl'] = True
        run(_scan, 1 if run.output else run.N, maps, y, states, constants=(False, maps is not None, overlap), **options)
    if run.output:
        y = add_directions(y, x.dtype)
    return y, states
