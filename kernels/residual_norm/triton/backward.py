"""Its gradients: the moments are recomputed, the sums over rows stay in registers until a program's last row; a
second kernel adds up those of all programs."""
import torch
import triton
import triton.language as tl

from ..._core.partial_sums import add_up
from ..._core.triton_rows import load, load_parameters, normalise, plan_sums, rows_of, through_norm
from ..._core.triton_support import cdiv, launch, unit_of
from .forward import add_branch

_UNROLL = 2


@triton.jit(do_not_specialize=['rows', 'each'], do_not_specialize_on_alignment=['scale'])
def _kernel(x, branch, scale, weight, grad_y, grad_n, grad_x, grad_branch, partials, rows, each, EPS: tl.constexpr,
            DIM: tl.constexpr, GRAD_Y_STRIDE: tl.constexpr, GRAD_N_STRIDE: tl.constexpr, X_STRIDE: tl.constexpr,
            BRANCH_STRIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr):
    """A program's sums for the weight and the bias go to its row of ``partials``, (programs, 2 * DIM)."""
    channel = tl.arange(0, BLOCK_D)
    weights, _ = load_parameters(weight, weight, channel, DIM)
    weight_sum = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    bias_sum = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    step: tl.constexpr = BLOCK_R * UNROLL
    for start in range(tl.program_id(0) * step, rows, tl.num_programs(0) * step):
        loaded = ()
        for u in tl.static_range(UNROLL):  # all loads first, to have many under way
            row = start + u * BLOCK_R + tl.arange(0, BLOCK_R)
            mask = (row < rows)[:, None] & (channel < DIM)[None, :]
            tile = (load(x, row, channel, mask, X_STRIDE), load(grad_n, row, channel, mask, GRAD_N_STRIDE))
            if branch is not None:
                tile = tile + (load(branch, row, channel, mask, BRANCH_STRIDE),
                               load(grad_y, row, channel, mask, GRAD_Y_STRIDE))
            loaded = loaded + (tile, )
        for u in tl.static_range(UNROLL):
            row = start + u * BLOCK_R + tl.arange(0, BLOCK_R)
            mask = (row < rows)[:, None] & (channel < DIM)[None, :]
            added = branch
            if branch is not None:
                added = loaded[u][2]
            value = add_branch(loaded[u][0], added, scale, row, row < rows, each)
            normal, inverse = normalise(value, channel, EPS, DIM, BLOCK_D)
            upstream = loaded[u][1].to(tl.float32)
            weight_sum += upstream * normal
            bias_sum += upstream
            value = through_norm(upstream, normal, inverse, weights, DIM)
            if branch is not None:
                value += loaded[u][3].to(tl.float32)
            at = row.to(tl.int64)[:, None] * DIM + channel[None, :]
            tl.store(grad_x + at, value, mask=mask)
            if grad_branch is not None:
                if scale is not None:
                    value *= tl.load(scale + row // each, mask=row < rows, other=0.0).to(tl.float32)[:, None]
                tl.store(grad_branch + at, value, mask=mask)
    partials += tl.program_id(0) * (2 * DIM) + channel
    tl.store(partials, tl.sum(weight_sum, 0), mask=channel < DIM)
    tl.store(partials + DIM, tl.sum(bias_sum, 0), mask=channel < DIM)


def backward(grad_y, grad_n, x, branch, scale, weight, bias, eps, branch_too):
    """Gradients of ``x``, with ``branch_too`` of ``branch``, of ``weight`` and ``bias``."""
    grad_x, grad_branch = torch.empty_like(x, memory_format=torch.contiguous_format), None
    if branch_too and branch is not None:
        grad_branch = torch.empty_like(branch, memory_format=torch.contiguous_format)
    if not x.numel():
        return grad_x, grad_branch, torch.zeros_like(weight), torch.zeros_like(bias)
    dim = x.shape[-1]
    rows = x.numel() // dim
    each = rows // x.shape[0]
    (x, x_stride), (grad_n, grad_n_stride) = rows_of(x), rows_of(grad_n)
    branch_stride = grad_y_stride = dim
    if branch is not None:
        (branch, branch_stride), (grad_y, grad_y_stride) = rows_of(branch), rows_of(grad_y)
    programs, block_r, block_d, warps = plan_sums(rows, dim, _UNROLL)
    partials = x.new_empty(programs * 2 * dim, dtype=torch.float32)
    launch(_kernel, (programs, 1, 1), x, branch, None if scale is None else scale.contiguous(), weight.contiguous(),
           None if branch is None else grad_y, grad_n, grad_x, grad_branch, partials, rows, each, eps, dim,
           grad_y_stride, grad_n_stride, x_stride, branch_stride, block_r, block_d, _UNROLL, num_warps=warps)
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
    unit = unit_of(dim)
    launch(add_up, (cdiv(2 * dim, 16), 1, 1), partials, grad_weight, grad_bias, programs, dim // unit, 1, unit, 256, 16,
           num_warps=4)
    return grad_x, grad_branch, grad_weight, grad_bias
