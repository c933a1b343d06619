"""The gated LayerNorm: each row is read once and stays in registers."""
import torch
import triton
import triton.language as tl

from ..._core.triton_math import sigmoid
from ..._core.triton_rows import load, load_parameters, normalise, plan, rows_of
from ..._core.triton_support import launch


@triton.jit(do_not_specialize=['rows'])
def _kernel(x, z, weight, bias, y, rows, EPS: tl.constexpr, DIM: tl.constexpr, X_STRIDE: tl.constexpr,
            Z_STRIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.arange(0, BLOCK_D)
    mask = (row < rows)[:, None] & (channel < DIM)[None, :]
    gate = load(z, row, channel, mask, Z_STRIDE)
    normal, _ = normalise(load(x, row, channel, mask, X_STRIDE), channel, EPS, DIM, BLOCK_D)
    scale, shift = load_parameters(weight, bias, channel, DIM)
    gate = gate.to(tl.float32)
    value = (normal * scale + shift) * (gate * sigmoid(gate))
    tl.store(y + row.to(tl.int64)[:, None] * DIM + channel[None, :], value.to(y.dtype.element_ty), mask=mask)


def forward(x, z, weight, bias, eps):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel():
        dim = x.shape[-1]
        rows = y.numel() // dim
        (x, x_stride), (z, z_stride) = rows_of(x), rows_of(z)
        programs, block_r, block_d, warps = plan(rows, dim)
        launch(_kernel, (programs, 1, 1), x, z, weight.contiguous(), bias.contiguous(), y, rows, eps,
               dim, x_stride, z_stride, block_r, block_d, num_warps=warps)
    return y
