"""Its gradients: the moments are recomputed, the sums over rows stay in registers until a program's last row; a
second kernel adds up those of all programs."""
import torch
import triton
import triton.language as tl

from ..._core.partial_sums import add_up
from ..._core.triton_math import sigmoid
from ..._core.triton_rows import load, load_parameters, normalise, plan_sums, rows_of, through_norm
from ..._core.triton_support import cdiv, launch, unit_of

_UNROLL = 2


@triton.jit(do_not_specialize=['rows'])
def _kernel(grad, x, z, weight, bias, grad_x, grad_z, partials, rows, EPS: tl.constexpr, DIM: tl.constexpr,
            GRAD_STRIDE: tl.constexpr, X_STRIDE: tl.constexpr, Z_STRIDE: tl.constexpr, GRAD_Z_STRIDE: tl.constexpr,
            BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr):
    """A program's sums for the weight and the bias go to its row of ``partials``, (programs, 2 * DIM)."""
    channel = tl.arange(0, BLOCK_D)
    scale, shift = load_parameters(weight, bias, channel, DIM)
    weight_sum = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    bias_sum = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    step: tl.constexpr = BLOCK_R * UNROLL
    for start in range(tl.program_id(0) * step, rows, tl.num_programs(0) * step):
        loaded = ()
        for u in tl.static_range(UNROLL):  # all loads first, to have many under way
            row = start + u * BLOCK_R + tl.arange(0, BLOCK_R)
            mask = (row < rows)[:, None] & (channel < DIM)[None, :]
            loaded = loaded + ((load(x, row, channel, mask, X_STRIDE), load(z, row, channel, mask, Z_STRIDE),
                                load(grad, row, channel, mask, GRAD_STRIDE)), )
        for u in tl.static_range(UNROLL):
            row = start + u * BLOCK_R + tl.arange(0, BLOCK_R)
            mask = (row < rows)[:, None] & (channel < DIM)[None, :]
            normal, inverse = normalise(loaded[u][0], channel, EPS, DIM, BLOCK_D)
            gate = loaded[u][1].to(tl.float32)
            upstream = loaded[u][2].to(tl.float32)
            open_ = sigmoid(gate)
            slope = open_ * (1 + gate * (1 - open_))
            at_z = upstream * (normal * scale + shift) * slope
            tl.store(grad_z + row.to(tl.int64)[:, None] * GRAD_Z_STRIDE + channel[None, :],
                     at_z.to(grad_z.dtype.element_ty), mask=mask)
            upstream *= gate * open_  # at the LayerNorm's output
            weight_sum += upstream * normal
            bias_sum += upstream
            at_x = through_norm(upstream, normal, inverse, scale, DIM)
            tl.store(grad_x + row.to(tl.int64)[:, None] * DIM + channel[None, :], at_x.to(grad_x.dtype.element_ty),
                     mask=mask)
    partials += tl.program_id(0) * (2 * DIM) + channel
    tl.store(partials, tl.sum(weight_sum, 0), mask=channel < DIM)
    tl.store(partials + DIM, tl.sum(bias_sum, 0), mask=channel < DIM)


def backward(grad, x, z, weight, bias, eps, grad_z=None):
    """Gradients of the four tensors. ``grad_z``: where to put that of ``z``, rows of channels evenly spaced."""
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    if grad_z is None:
        grad_z = torch.empty_like(z, memory_format=torch.contiguous_format)
    if not x.numel():
        return grad_x, grad_z, torch.zeros_like(weight), torch.zeros_like(bias)
    dim = x.shape[-1]
    rows = x.numel() // dim
    (grad, grad_stride), (x, x_stride), (z, z_stride) = rows_of(grad), rows_of(x), rows_of(z)
    weight, bias = weight.contiguous(), bias.contiguous()
    grad_z_stride = grad_z.stride(-2) if grad_z.dim() > 1 else dim
    programs, block_r, block_d, warps = plan_sums(rows, dim, _UNROLL)
    partials = x.new_empty(programs * 2 * dim, dtype=torch.float32)
    launch(_kernel, (programs, 1, 1), grad, x, z, weight, bias, grad_x, grad_z, partials, rows, eps, dim, grad_stride,
           x_stride, z_stride, grad_z_stride, block_r, block_d, _UNROLL, num_warps=warps)
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
    unit = unit_of(dim)
    launch(add_up, (cdiv(2 * dim, 16), 1, 1), partials, grad_weight, grad_bias, programs, dim // unit, 1, unit, 256, 16,
           num_warps=4)
    return grad_x, grad_z, grad_weight, grad_bias
