"""Backward of the scan with Mamba's interface: chunks from the last to the first, each recomputed from the state before
it while the adjoint recurrence runs through it in reverse."""
import torch
import triton
import triton.language as tl

from ..._core.partial_sums import add_up
from ..._core.triton_math import LN2, exp2, exp2_of_product, sigmoid
from ..._core.triton_support import cdiv, launch
from .tiles import (
    RUNTIME,
    UNIT,
    Launch,
    add_to,
    compose_apart,
    compose_before,
    ends_of,
    from_segments,
    load_parameter,
    load_projection,
    load_walked,
    pick,
    place,
    put,
    rows_of,
    step_of,
    steps_of,
    through_softplus,
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
    block, blocks, image, seg, first, last, begin, d, in_d = place(D, segs, each, chunks, span, span_blocks, BLOCK_D,
                                                                   CHANNEL_UNIT)
    end, padded = ends_of(L, STEP_UNIT)
    n_all = tl.arange(0, STATES)[None, :]
    of_states = in_d[:, None] & (n_all < N)
    us = rows_of(u, image, u_batch, d, u_stride, LAST & 1, STEP_UNIT, CHANNEL_UNIT)
    deltas = rows_of(delta, image, delta_batch, d, delta_stride, LAST & 2, STEP_UNIT, CHANNEL_UNIT)
    grads = rows_of(grad, image, grad_batch, d, grad_stride, LAST & 8, STEP_UNIT, CHANNEL_UNIT)
    if not CONSTANT_B:
        B += image * B_batch * UNIT + (begin // B_span).to(tl.int64) * B_group * UNIT
    if not CONSTANT_C:
        C += image * C_batch * UNIT + (begin // C_span).to(tl.int64) * C_group * UNIT
    if z is not None:
        zs = rows_of(z, image, z_batch, d, z_stride, LAST & 4, STEP_UNIT, CHANNEL_UNIT)
    shift = load_parameter(bias, d, in_d)
    skips = load_parameter(skip, d, in_d)
    rates = tl.load(A + d[:, None] * N + n_all, mask=of_states, other=0.0).to(tl.float32)
    kept = states + ((image * D + d) * (chunks + 1))[:, None] * N + n_all
    place_out = ((image * D + d) * end)[:, None]
    parts = (image * blocks + block) * N * padded
    carry = tl.zeros([BLOCK_D, STATES], tl.float32)
    if SEGMENTED and not MAPS:
        carry = from_segments(sums, ends, segs - 1, segs - 1 - seg, -1, image, batch, d, in_d, rates, D, N)
    elapsed = tl.zeros([BLOCK_D], tl.float32)
    total_A = tl.zeros([BLOCK_D, STATES], tl.float32)
    total_B = tl.zeros([BLOCK_D, STATES], tl.float32)
    total_C = tl.zeros([BLOCK_D, STATES], tl.float32)
    total_skip = tl.zeros([BLOCK_D], tl.float32)
    total_bias = tl.zeros([BLOCK_D], tl.float32)

    for i in range(last - first):
        chunk = last - 1 - i
        t = chunk * TILE + tl.arange(0, TILE)
        in_t = t < padded
        inside, in_row = in_d[:, None] & (t < end)[None, :], in_d[:, None] & in_t[None, :]
        gy = load_walked(grads, t, grad_stride, inside, LAST & 8, CHANNEL_UNIT)
        if z is not None:
            gate = load_walked(zs, t, z_stride, inside, LAST & 4, CHANNEL_UNIT)
            gy *= gate * sigmoid(gate)
        step = load_walked(deltas, t, delta_stride, inside, LAST & 2, CHANNEL_UNIT)
        step, _ = steps_of(step, shift, inside, SOFTPLUS)
        if MAPS:
            through = tl.cumsum(step, 1)
            total = tl.sum(step, 1)
            elapsed += total
            added = tl.zeros([BLOCK_D, STATES], tl.float32)
            for n in range(N):
                rate = tl.load(A + d * N + n, mask=in_d, other=0.0).to(tl.float32)
                c = load_projection(C, n, d, in_d, t, in_row, N, C_row, CONSTANT_C)
                added = put(added, n, tl.sum(exp2(through * rate[:, None]) * (gy * c), 1))
            carry = exp2(total[:, None] * rates) * carry + added
        else:
            before = tl.load(kept + chunk * N, mask=of_states, other=0.0)
            drive = load_walked(us, t, u_stride, inside, LAST & 1, CHANNEL_UNIT) * step * LN2
            y = tl.zeros([BLOCK_D, TILE], tl.float32)
            g_drive = tl.zeros([BLOCK_D, TILE], tl.float32)
            g_step = tl.zeros([BLOCK_D, TILE], tl.float32)
            for n in range(N):
                rate = tl.load(A + d * N + n, mask=in_d, other=0.0).to(tl.float32)[:, None]
                b = load_projection(B, n, d, in_d, t, in_row, N, B_row, CONSTANT_B)
                c = load_projection(C, n, d, in_d, t, in_row, N, C_row, CONSTANT_C)
                decay = exp2_of_product(step, rate)
                drives = drive * b
                a, decayed, _ = tl.associative_scan((decay, tl.zeros_like(decay), drives), 1, compose_apart)
                decayed += a * pick(before, n)[:, None]
                h = decayed + drives
                if z is not None:
                    y += h * c
                if CONSTANT_C:
                    total_C = add_to(total_C, n, tl.sum(gy * h, 1))
                else:
                    tl.store(parts_C + parts + n * padded + t, tl.sum(gy * h, 0), mask=in_t)
                a, g, _ = tl.associative_scan((tl.full([BLOCK_D, TILE], 1.0, tl.float32), gy * c, decay), 1,
                                              compose_before, reverse=True)
                g += a * pick(carry, n)[:, None]
                carry = put(carry, n, step_of(g * decay, 0))
                g_drive += g * b
                if CONSTANT_B:
                    total_B = add_to(total_B, n, tl.sum(g * drive, 1))
                else:
                    tl.store(parts_B + parts + n * padded + t, tl.sum(g * drive, 0), mask=in_t)
                g *= decayed
                g_step += g * rate
                total_A = add_to(total_A, n, tl.sum(g * step, 1))
            # Read again what the loop over states would have kept from registers.
            x = load_walked(us, t, u_stride, inside, LAST & 1, CHANNEL_UNIT)
            g_x = g_drive * step * LN2 + gy * skips[:, None]
            tl.store(grad_u + place_out + t[None, :], g_x.to(grad_u.dtype.element_ty), mask=inside)
            total_skip += tl.sum(gy * x, 1)
            raw = load_walked(deltas, t, delta_stride, inside, LAST & 2, CHANNEL_UNIT)
            _, raw = steps_of(raw, shift, inside, SOFTPLUS)
            g_raw = tl.where(inside, through_softplus(g_step + g_drive * x, raw, SOFTPLUS), 0.0)
            total_bias += tl.sum(g_raw, 1)
            tl.store(grad_delta + place_out + t[None, :], g_raw.to(grad_delta.dtype.element_ty), mask=inside)
            if z is not None:
                gate = load_walked(zs, t, z_stride, inside, LAST & 4, CHANNEL_UNIT)
                opened = sigmoid(gate)
                gy = load_walked(grads, t, grad_stride, inside, LAST & 8, CHANNEL_UNIT)
                gz = gy * (opened * (1 + gate * (1 - opened))) * (y + x * skips[:, None])
                tl.store(grad_z + place_out + t[None, :], gz.to(grad_z.dtype.element_ty), mask=inside)
    row = (seg * batch + image) * D + d
    if MAPS:
        tl.store(sums + row, elapsed, mask=in_d)
        tl.store(ends + row[:, None] * N + n_all, carry, mask=of_states)
    else:
        mine = totals + (seg * batch + image) * (N + 1) * D + d
        apart = segs * batch.to(tl.int64) * (N + 1) * D
        columns = mine[:, None] + n_all * D
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


#: Warps of a program, at most. More channels leave fewer sums over channels in memory.
_WARPS = 8


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
    run(_scan_fn_backward, *buffers, constants=(False, run.segments > 1))
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
