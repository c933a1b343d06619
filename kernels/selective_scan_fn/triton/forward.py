"""Forward of the scan with Mamba's interface."""
import torch
import triton
import triton.language as tl

from ..._core.triton_math import LN2, exp2, exp2_of_product, sigmoid
from ..._core.triton_support import cdiv
from .tiles import (
    RUN,
    RUNTIME,
    UNIT,
    Launch,
    add_apart,
    ends_in,
    ends_of,
    from_segments,
    load_parameter,
    load_projection,
    load_walked,
    pick,
    place,
    projection_runs,
    rows_of,
    states_of,
    steps_of,
    store_runs,
    through_runs,
    walked_runs,
)


@triton.jit(do_not_specialize=RUNTIME)
def _scan_fn(u, delta, A, B, C, skip, z, bias, grad, sums, ends, out, states, batch, D, L, N, chunks, segs, each, span,
             span_blocks, B_span, C_span, u_batch, u_stride, delta_batch, delta_stride, z_batch, z_stride, grad_batch,
             grad_stride, B_batch, B_group, B_row, C_batch, C_group, C_row, SOFTPLUS: tl.constexpr,
             CONSTANT_B: tl.constexpr, CONSTANT_C: tl.constexpr, LAST: tl.constexpr, STEP_UNIT: tl.constexpr,
             CHANNEL_UNIT: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, STATES: tl.constexpr,
             MAPS: tl.constexpr, SEGMENTED: tl.constexpr):
    """One block of channels, all states, and a segment of an image's steps. With ``MAPS`` only what the segment does to
    a state of zeros, ``ends`` (segs, B, D, N), and the ``sums`` (segs, B, D) of its steps in units of log(2), from
    which those with ``SEGMENTED`` start. ``LAST``: bits, of ``u``, ``delta``, ``z``, for those whose channels are
    adjacent, not the steps. ``out`` is dense."""
    block, blocks, image, seg, first, last, span_begin, d, in_d = place(D, segs, each, chunks, span, span_blocks,
                                                                        BLOCK_D, CHANNEL_UNIT)
    end, padded = ends_of(L, STEP_UNIT)
    states_n = states_of(TILE, STATES)
    of_states = in_d[:, None, None] & (states_n < N)
    us = rows_of(u, image, u_batch, d, u_stride, LAST & 1, STEP_UNIT, CHANNEL_UNIT)
    deltas = rows_of(delta, image, delta_batch, d, delta_stride, LAST & 2, STEP_UNIT, CHANNEL_UNIT)
    outs = out + ((image * D + d) * end)[:, None]
    if not CONSTANT_B:
        B += image * B_batch * UNIT + (span_begin // B_span).to(tl.int64) * B_group * UNIT
    if not CONSTANT_C:
        C += image * C_batch * UNIT + (span_begin // C_span).to(tl.int64) * C_group * UNIT
    if z is not None:
        zs = rows_of(z, image, z_batch, d, z_stride, LAST & 4, STEP_UNIT, CHANNEL_UNIT)
    shift = load_parameter(bias, d, in_d)
    skips = load_parameter(skip, d, in_d)
    rates = tl.load(A + d[:, None, None] * N + states_n, mask=of_states, other=0.0).to(tl.float32)
    kept = states + ((image * D + d) * (chunks + 1))[:, None, None] * N + states_n
    state = tl.zeros(rates.shape, tl.float32)
    if SEGMENTED and not MAPS:
        state = from_segments(sums, ends, 0, seg, 1, image, batch, d, in_d, rates, states_n, D, N)
    elapsed = tl.zeros([BLOCK_D], tl.float32)

    for chunk in range(first, last):
        begin = chunk * TILE
        if MAPS:
            t = begin + tl.arange(0, TILE)
            inside, in_row = in_d[:, None] & (t < end)[None, :], in_d[:, None] & (t < padded)[None, :]
            step = load_walked(deltas, t, delta_stride, inside, LAST & 2, CHANNEL_UNIT)
            step, _ = steps_of(step, shift, inside, SOFTPLUS)
            drive = load_walked(us, t, u_stride, inside, LAST & 1, CHANNEL_UNIT) * step * LN2
            _, behind = tl.associative_scan((step, tl.zeros_like(step)), 1, add_apart, reverse=True)
            total = tl.sum(step, 1)
            elapsed += total
            state *= exp2(total[:, None, None] * rates)
            for n in range(N):
                rate = tl.load(A + d * N + n, mask=in_d, other=0.0).to(tl.float32)
                b = load_projection(B, n, d, in_d, t, in_row, N, B_row, CONSTANT_B)
                added = tl.sum(exp2(behind * rate[:, None]) * (drive * b), 1)
                state += tl.where(states_n == n, added[:, None, None], 0.0)
        else:
            tl.store(kept + chunk * N, state, mask=of_states)
            xs = walked_runs(us, begin, end, u_stride, in_d, LAST & 1, CHANNEL_UNIT, TILE)
            raws = walked_runs(deltas, begin, end, delta_stride, in_d, LAST & 2, CHANNEL_UNIT, TILE)
            inside = ends_in(begin, end, in_d, TILE)
            steps, drives, ys = (), (), ()
            for s in tl.static_range(RUN):
                step, _ = steps_of(raws[s], shift, inside[s], SOFTPLUS)
                steps, drives, ys = steps + (step,), drives + (step * xs[s] * LN2,), ys + (xs[s] * skips[:, None],)
            for n in range(N):
                rate = tl.load(A + d * N + n, mask=in_d, other=0.0).to(tl.float32)[:, None]
                bs = projection_runs(B, n, d, in_d, begin, padded, N, B_row, CONSTANT_B, TILE)
                cs = projection_runs(C, n, d, in_d, begin, padded, N, C_row, CONSTANT_C, TILE)
                decays, added = (), ()
                for s in tl.static_range(RUN):
                    decays = decays + (exp2_of_product(steps[s], rate),)
                    added = added + (drives[s] * bs[s],)
                a, h = decays[0], added[0]
                for s in tl.static_range(1, RUN):
                    h = decays[s] * h + added[s]
                    a *= decays[s]
                all_a, all_b, to_a, to_b = through_runs(a, h)
                before = pick(state, states_n == n)[:, None]
                h = to_a * before + to_b
                state = tl.where(states_n == n, (all_a * before + all_b)[:, :, None], state)
                sums_y = ()
                for s in tl.static_range(RUN):
                    h = decays[s] * h + added[s]
                    sums_y = sums_y + (ys[s] + h * cs[s],)
                ys = sums_y
            if z is not None:
                gates = walked_runs(zs, begin, end, z_stride, in_d, LAST & 4, CHANNEL_UNIT, TILE)
                gated = ()
                for s in tl.static_range(RUN):
                    gated = gated + (ys[s] * gates[s] * sigmoid(gates[s]),)
                ys = gated
            store_runs(outs, ys, begin, end, in_d, TILE)
    if MAPS:
        row = (seg * batch + image) * D + d
        tl.store(sums + row, elapsed, mask=in_d)
        tl.store(ends + row[:, None, None] * N + states_n, state, mask=of_states)
    else:
        tl.store(kept + chunks * N, state, mask=of_states & (seg == segs - 1))


#: Warps of a program, at most.
_WARPS = 4


def forward(u, delta, A, B, C, D, z, bias, softplus, *, chunk):
    """The output and the states before each chunk and after the last; see ``ops.py``."""
    if not u.numel():
        states = u.new_zeros(*u.shape[:2], cdiv(u.shape[2], chunk) + 1, A.shape[1], dtype=torch.float32)
        return torch.empty_like(u), states
    run = Launch(u, delta, A, B, C, D, z, bias, softplus, None, chunk, _WARPS)
    out, states, maps = run.like(u), run.empty(run.batch, run.D, run.chunks + 1, run.N), run.maps()
    if run.segments > 1:
        run(_scan_fn, *maps, out, states, constants=(True, True))
    run(_scan_fn, *maps, out, states, constants=(False, run.segments > 1))
    return out, states
