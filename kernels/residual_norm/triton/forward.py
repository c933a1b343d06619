"""The residual LayerNorm: each row is read once and stays in registers."""
import torch
import triton
import triton.language as tl

from ..._core.triton_rows import load, load_parameters, normalise, plan, rows_of
from ..._core.triton_support import launch


@triton.jit
def add_branch(x, branch, scale, row, mask, each):
    """``x + scale * branch`` in float32; rows of an image follow one another, ``each`` of them."""
    x = x.to(tl.float32)
    if branch is not None:
        added = branch.to(tl.float32)
        if scale is not None:
            added *= tl.load(scale + row // each, mask=mask, other=0.0).to(tl.float32)[:, None]
        x += added
    return x


@triton.jit(do_not_specialize=['rows', 'each'], do_not_specialize_on_alignment=['scale'])
def _kernel(x, branch, scale, weight, bias, y, n, rows, each, EPS: tl.constexpr, DIM: tl.constexpr,
            X_STRIDE: tl.constexpr, BRANCH_STRIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.arange(0, BLOCK_D)
    mask = (row < rows)[:, None] & (channel < DIM)[None, :]
    added = branch
    if branch is not None:
        added = load(branch, row, channel, mask, BRANCH_STRIDE)
    value = add_branch(load(x, row, channel, mask, X_STRIDE), added, scale, row, row < rows, each)
    weights, biases = load_parameters(weight, bias, channel, DIM)
    at = row.to(tl.int64)[:, None] * DIM + channel[None, :]
    if branch is not None:
        tl.store(y + at, value, mask=mask)
    normal, _ = normalise(value, channel, EPS, DIM, BLOCK_D)
    tl.store(n + at, normal * weights + biases, mask=mask)


def forward(x, branch, scale, weight, bias, eps, dtype):
    """The sum, None where there is no branch, and its norm in ``dtype``."""
    n = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    y = None if branch is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    if n.numel():
        dim = x.shape[-1]
        rows = n.numel() // dim
        each = rows // x.shape[0]
        x, x_stride = rows_of(x)
        branch, branch_stride = (None, dim) if branch is None else rows_of(branch)
        programs, block_r, block_d, warps = plan(rows, dim)
        launch(_kernel, (programs, 1, 1), x, branch, None if scale is None else scale.contiguous(), weight.contiguous(),
               bias.contiguous(), y, n, rows, each, eps, dim, x_stride, branch_stride, block_r, block_d,
               num_warps=warps)
    return y, n
