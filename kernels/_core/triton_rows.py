"""What forward and backward share: rows of channels in registers, and their moments."""
import triton
import triton.language as tl

from .triton_support import as_rows


def rows_of(tensor):
    """:func:`as_rows` over all dimensions but the last."""
    return as_rows(tensor, tensor.dim() - 1)


@triton.jit
def load(tensor, row, channel, mask, STRIDE: tl.constexpr):
    """Rows of ``tensor``, zero where ``mask`` says that there is nothing."""
    return tl.load(tensor + row.to(tl.int64)[:, None] * STRIDE + channel[None, :], mask=mask, other=0.0)


@triton.jit
def load_parameters(weight, bias, channel, DIM: tl.constexpr):
    """Weight and bias in float32, each (1, channels)."""
    return (tl.load(weight + channel, mask=channel < DIM, other=0.0).to(tl.float32)[None, :],
            tl.load(bias + channel, mask=channel < DIM, other=0.0).to(tl.float32)[None, :])


@triton.jit
def normalise(x, channel, EPS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """``x`` without its mean, divided by its standard deviation, and what it was multiplied by. The variance is
    taken about the mean, so that a large mean costs no digits."""
    x = x.to(tl.float32)
    x -= tl.sum(x, 1, keep_dims=True) / DIM
    if DIM != BLOCK_D:
        x = tl.where((channel < DIM)[None, :], x, 0.0)
    scale = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / DIM + EPS)
    return x * scale, scale
