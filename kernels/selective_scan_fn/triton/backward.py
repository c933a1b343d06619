"""Backward of the scan with Mamba's interface: chunks from the last to the first, each recomputed from the state before
it while the adjoint recurrence runs through it in reverse."""
import torch
import triton
import triton.language as tl

from ..._core.partial_sums import add_up
from ..._core.triton_math import LN2, exp2, exp2_of_product, sigmoid
from ..._core.triton_support import cdiv, launch
from .tiles import (
    RUN,
    RUNTIME,
    UNIT,
    Launch,
    both_ways,
    ends_in,
    ends_of,
    from_segments,
    load_parameter,
    load_projection,
    load_walked,
    no_runs,
    pick,
    place,
    projection_runs,
    rows_of,
    states_of,
    steps_in_order,
    steps_of,
    store_runs,
    through_softplus,
    walked_runs,
)

#: Programs' sums that one step of a finishing kernel adds, and values that one of its programs finishes.
_ROWS, _VALUES = 32, 64


@triton.jit(do_not_specialize=RUNTIME)
def _scan_fn_backward(u, delta, A, B, C, skip, z, bias, grad, sums, ends, states, grad_u, grad_delta, grad_z, parts_B,
                      parts_C, totals, batch, D, L, N, chunks, segs, each, span, span_blocks, B_span, C_span, u_batch,
                      u_stride, delta_batch, delta_stride, z_batch, z_stride, grad_batch, grad_stride, B_batch, B_group,
                      B_row, C_batch, C_group, C_row, SOFTPLUS: tl.constexpr, CONSTANT_B: tl.constexpr,
                      CONSTANT_C: tl.constexpr, LAST: tl.constexpr, STEP_UNIT: tl.constexpr,
                      CHANNEL_UNIT: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, STATES: tl.constexpr,
                      MAPS: tl.constexpr, SEGMENTED: tl.constexpr):
    """As ``_scan_fn``, in reverse; with ``MAPS`` only what segments make of no gradient behind them. The fourth bit of
    ``LAST`` is of ``grad``.

    Layouts: ``parts_B`` and ``parts_C`` (B, blocks, N, L rounded up), where they vary; ``totals`` (3, segs, B, N + 1,
    D): sums over steps, for ``A`` and last the bias, for a constant ``B`` and last the skip, for a constant ``C``.
    """
    block, blocks, image, seg, first, last, span_begin, d, in_d = place(D, segs, each, chunks, span, span_blocks,
                                                                        BLOCK_D, CHANNEL_UNIT)
    end, padded = ends_of(L, STEP_UNIT)
    states_n = states_of(TILE, STATES)
    of_states = in_d[:, None, None] & (states_n < N)
    us = rows_of(u, image, u_batch, d, u_stride, LAST & 1, STEP_UNIT, CHANNEL_UNIT)
    deltas = rows_of(delta, image, delta_batch, d, delta_stride, LAST & 2, STEP_UNIT, CHANNEL_UNIT)
    grads = rows_of(grad, image, grad_batch, d, grad_stride, LAST & 8, STEP_UNIT, CHANNEL_UNIT)
    if not CONSTANT_B:
        B += image * B_batch * UNIT + (span_begin // B_span).to(tl.int64) * B_group * UNIT
    if not CONSTANT_C:
        C += image * C_batch * UNIT + (span_begin // C_span).to(tl.int64) * C_group * UNIT
    if z is not None:
        zs = rows_of(z, image, z_batch, d, z_stride, LAST & 4, STEP_UNIT, CHANNEL_UNIT)
    shift = load_parameter(bias, d, in_d)
    skips = load_parameter(skip, d, in_d)
    rates = tl.load(A + d[:, None, None] * N + states_n, mask=of_states, other=0.0).to(tl.float32)
    place_out = ((image * D + d) * end)[:, None]
    parts = (image * blocks + block) * N * padded
    carry = tl.zeros(rates.shape, tl.float32)
    if SEGMENTED and not MAPS:
        carry = from_segments(sums, ends, segs - 1, segs - 1 - seg, -1, image, batch, d, in_d, rates, states_n, D, N)
    elapsed = tl.zeros([BLOCK_D], tl.float32)
    total_A = tl.zeros(rates.shape, tl.float32)
    total_B = tl.zeros(rates.shape, tl.float32)
    total_C = tl.zeros(rates.shape, tl.float32)
    total_skip = tl.zeros([BLOCK_D], tl.float32)
    total_bias = tl.zeros([BLOCK_D], tl.float32)

    for i in range(last - first):
        chunk = last - 1 - i
        begin = chunk * TILE
        t = begin + tl.arange(0, TILE)
        in_t = t < padded
        if MAPS:
            inside, in_row = in_d[:, None] & (t < end)[None, :], in_d[:, None] & in_t[None, :]
            gy = load_walked(grads, t, grad_stride, inside, LAST & 8, CHANNEL_UNIT)
            if z is not None:
                gate = load_walked(zs, t, z_stride, inside, LAST & 4, CHANNEL_UNIT)
                gy *= gate * sigmoid(gate)
            step = load_walked(deltas, t, delta_stride, inside, LAST & 2, CHANNEL_UNIT)
            step, _ = steps_of(step, shift, inside, SOFTPLUS)
            through = tl.cumsum(step, 1)
            total = tl.sum(step, 1)
            elapsed += total
            carry *= exp2(total[:, None, None] * rates)
            for n in range(N):
                rate = tl.load(A + d * N + n, mask=in_d, other=0.0).to(tl.float32)
                c = load_projection(C, n, d, in_d, t, in_row, N, C_row, CONSTANT_C)
                added = tl.sum(exp2(through * rate[:, None]) * (gy * c), 1)
                carry += tl.where(states_n == n, added[:, None, None], 0.0)
        else:
            inside = ends_in(begin, end, in_d, TILE)
            gys = walked_runs(grads, begin, end, grad_stride, in_d, LAST & 8, CHANNEL_UNIT, TILE)
            raws = walked_runs(deltas, begin, end, delta_stride, in_d, LAST & 2, CHANNEL_UNIT, TILE)
            xs = walked_runs(us, begin, end, u_stride, in_d, LAST & 1, CHANNEL_UNIT, TILE)
            if z is not None:
                gates = walked_runs(zs, begin, end, z_stride, in_d, LAST & 4, CHANNEL_UNIT, TILE)
                gated = ()
                for s in tl.static_range(RUN):
                    gated = gated + (gys[s] * gates[s] * sigmoid(gates[s]),)
                gys = gated
            steps, drives = (), ()
            for s in tl.static_range(RUN):
                step, _ = steps_of(raws[s], shift, inside[s], SOFTPLUS)
                steps, drives = steps + (step,), drives + (step * xs[s] * LN2,)
            ys, g_drives, g_steps = no_runs(BLOCK_D, TILE), no_runs(BLOCK_D, TILE), no_runs(BLOCK_D, TILE)
            before = states + ((image * D + d) * (chunks + 1) + chunk) * N
            for n in range(N):
                rate = tl.load(A + d * N + n, mask=in_d, other=0.0).to(tl.float32)[:, None]
                bs = projection_runs(B, n, d, in_d, begin, padded, N, B_row, CONSTANT_B, TILE)
                cs = projection_runs(C, n, d, in_d, begin, padded, N, C_row, CONSTANT_C, TILE)
                decays, added, grads_h = (), (), ()
                for s in tl.static_range(RUN):
                    decays = decays + (exp2_of_product(steps[s], rate),)
                    added = added + (drives[s] * bs[s],)
                    grads_h = grads_h + (gys[s] * cs[s],)
                a, h, g = decays[0], added[0], decays[RUN - 1] * grads_h[RUN - 1]
                for s in tl.static_range(1, RUN):
                    a *= decays[s]
                    h = decays[s] * h + added[s]
                    g = decays[RUN - 1 - s] * (grads_h[RUN - 1 - s] + g)
                all_a, all_r, to_a, to_b, from_a, from_r = both_ways(a, h, g)
                is_n = states_n == n
                behind = pick(carry, is_n)[:, None]
                carry = tl.where(is_n, (all_a * behind + all_r)[:, :, None], carry)
                h = to_a * tl.load(before + n, mask=in_d, other=0.0)[:, None] + to_b
                g = from_a * behind + from_r
                # Each state before its step's drive is added: a difference would have few digits.
                decayed, sums_y, products_C = (), (), ()
                for s in tl.static_range(RUN):
                    h *= decays[s]
                    decayed = decayed + (h,)
                    h += added[s]
                    products_C = products_C + (gys[s] * h,)
                    if z is not None:
                        sums_y = sums_y + (ys[s] + h * cs[s],)
                    else:
                        sums_y = sums_y + (ys[s],)
                ys = sums_y
                reversed_B, reversed_drives, reversed_steps = (), (), ()
                by_A = tl.zeros(a.shape, tl.float32)
                for s in tl.static_range(RUN - 1, -1, -1):
                    g += grads_h[s]
                    exponent = g * decayed[s]
                    reversed_B = (g * drives[s],) + reversed_B
                    reversed_drives = (g_drives[s] + g * bs[s],) + reversed_drives
                    reversed_steps = (g_steps[s] + exponent * rate,) + reversed_steps
                    by_A += exponent * steps[s]
                    g *= decays[s]
                g_drives, g_steps = reversed_drives, reversed_steps
                total_A += tl.where(is_n, tl.sum(by_A, 1)[:, None, None], 0.0)
                by_B, by_C = steps_in_order(reversed_B), steps_in_order(products_C)
                if CONSTANT_B:
                    total_B += tl.where(is_n, tl.sum(by_B, 1)[:, None, None], 0.0)
                else:
                    tl.store(parts_B + parts + n * padded + t, tl.sum(by_B, 0), mask=in_t)
                if CONSTANT_C:
                    total_C += tl.where(is_n, tl.sum(by_C, 1)[:, None, None], 0.0)
                else:
                    tl.store(parts_C + parts + n * padded + t, tl.sum(by_C, 0), mask=in_t)
            # Read again what the loop over states would have kept from registers.
            xs = walked_runs(us, begin, end, u_stride, in_d, LAST & 1, CHANNEL_UNIT, TILE)
            raws = walked_runs(deltas, begin, end, delta_stride, in_d, LAST & 2, CHANNEL_UNIT, TILE)
            by_skip, by_bias = tl.zeros(step.shape, tl.float32), tl.zeros(step.shape, tl.float32)
            grads_x, grads_raw = (), ()
            for s in tl.static_range(RUN):
                _, raw = steps_of(raws[s], shift, inside[s], SOFTPLUS)
                g_raw = through_softplus(g_steps[s] + g_drives[s] * xs[s], raw, SOFTPLUS)
                g_raw = tl.where(inside[s], g_raw, 0.0)
                grads_raw = grads_raw + (g_raw,)
                grads_x = grads_x + (g_drives[s] * steps[s] * LN2 + gys[s] * skips[:, None],)
                by_skip += gys[s] * xs[s]
                by_bias += g_raw
            total_skip += tl.sum(by_skip, 1)
            total_bias += tl.sum(by_bias, 1)
            store_runs(grad_u + place_out, grads_x, begin, end, in_d, TILE)
            store_runs(grad_delta + place_out, grads_raw, begin, end, in_d, TILE)
            if z is not None:
                gates = walked_runs(zs, begin, end, z_stride, in_d, LAST & 4, CHANNEL_UNIT, TILE)
                gys = walked_runs(grads, begin, end, grad_stride, in_d, LAST & 8, CHANNEL_UNIT, TILE)
                grads_z = ()
                for s in tl.static_range(RUN):
                    opened = sigmoid(gates[s])
                    slope = opened * (1 + gates[s] * (1 - opened))
                    grads_z = grads_z + (gys[s] * slope * (ys[s] + xs[s] * skips[:, None]),)
                store_runs(grad_z + place_out, grads_z, begin, end, in_d, TILE)
    row = (seg * batch + image) * D + d
    if MAPS:
        tl.store(sums + row, elapsed, mask=in_d)
        tl.store(ends + row[:, None, None] * N + states_n, carry, mask=of_states)
    else:
        mine = totals + (seg * batch + image) * (N + 1) * D + d
        apart = segs * batch.to(tl.int64) * (N + 1) * D
        columns = mine[:, None, None] + states_n * D
        tl.store(columns, total_A * LN2, mask=of_states)
        tl.store(mine + N * D, total_bias, mask=in_d)
        tl.store(mine + apart + N * D, total_skip, mask=in_d)
        if CONSTANT_B:
            tl.store(columns + apart, total_B, mask=of_states)
        if CONSTANT_C:
            tl.store(columns + 2 * apart, total_C, mask=of_states)


@triton.jit(do_not_specialize=['count', 'N', 'L', 'padded', 'pieces'])
def _add_blocks(parts, total, count, N, L, padded, pieces, BLOCK: tl.constexpr):
    """The sums of ``count`` blocks of channels, one after the other: (B, G, count, N, ``padded``) to (B, G, N, L).
    ``pieces`` of a row are programs."""
    pid = tl.program_id(0)
    t = pid % pieces * BLOCK + tl.arange(0, BLOCK)
    row = (pid // pieces).to(tl.int64)
    mask = t < L
    parts += (row // N * count * N + row % N) * padded
    sum_ = tl.zeros([BLOCK], tl.float32)
    for i in range(count):
        sum_ += tl.load(parts + i * N.to(tl.int64) * padded + t, mask=mask, other=0.0)
    tl.store(total + row * L + t, sum_.to(total.dtype.element_ty), mask=mask)


def _total(run, tensor, parts):
    """The gradient of a varying B or C, from those of the blocks of channels."""
    total = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    groups = tensor.shape[1]
    block = min(1024, run.tile)
    pieces = cdiv(run.L, block)
    launch(_add_blocks, (run.batch * groups * run.N * pieces, 1, 1), parts, total, run.blocks // groups, run.N, run.L,
           run.row, pieces, block, num_warps=4)
    return total


def _add_up(run, totals, weight, bias):
    """Adds up the sums of segments and images."""
    launch(add_up, (cdiv((run.N + 1) * run.D, _VALUES), 1, 1), totals, weight, bias, run.segments * run.batch, run.D,
           run.N, 1, _ROWS, _VALUES, num_warps=4)


#: Warps of a program, at most: more channels leave fewer sums over channels in memory.
_WARPS = 8
#: So many states take few registers.
_FEW_STATES = 32


def backward(grad, u, delta, A, B, C, D, z, bias, softplus, states, *, chunk):
    """Gradients of the eight tensors; see ``ops.py``. None for those that are not there."""
    if not u.numel():
        return [None if t is None else torch.zeros_like(t) for t in (u, delta, A, B, C, D, z, bias)]
    run = Launch(u, delta, A, B, C, D, z, bias, softplus, grad, chunk, _WARPS)
    grad_u, grad_delta = run.like(u), run.like(delta)
    grad_z = None if z is None else run.like(z)
    parts_B, parts_C = (None if t.dim() == 2 else run.empty(run.batch, run.blocks, run.N, run.row) for t in (B, C))
    totals = run.empty(3, run.segments * run.batch, run.N + 1, run.D)
    maps = run.maps()
    buffers = (*maps, states, grad_u, grad_delta, grad_z, parts_B, parts_C, totals)
    if run.segments > 1:
        run(_scan_fn_backward, *buffers, constants=(True, True))
    # With more registers a multiprocessor has eight warps, not sixteen; what is spilled is not in the loop over states.
    options = {'maxnreg': 128} if run.tile == chunk and run.warps == _WARPS and run.N <= _FEW_STATES else {}
    run(_scan_fn_backward, *buffers, constants=(False, run.segments > 1), **options)
    grad_A, grad_bias = torch.empty_like(run.tensors[2]), None if bias is None else torch.empty_like(run.tensors[7])
    _add_up(run, totals[0], grad_A, grad_bias)
    grad_B, grad_C = (torch.empty_like(t) if t.dim() == 2 else None for t in run.tensors[3:5])
    grad_D = None if D is None else torch.empty_like(run.tensors[5])
    if grad_B is not None or grad_D is not None:
        _add_up(run, totals[1], grad_B, grad_D)
    if grad_C is not None:
        _add_up(run, totals[2], grad_C, None)
    if parts_B is not None:
        grad_B = _total(run, B, parts_B)
    if parts_C is not None:
        grad_C = _total(run, C, parts_C)
    return grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias
