"""The backends of the selective scan, fastest first."""
import torch

from .._core.backends import Backend, requested_backend
from .._core.extension import why_not_cpu
from .._core.triton_support import warn_once, why_not_triton
from . import composed

#: Ranks of ``dt`` that Triton's backward pass can hold the sums of.
MOST_RANKS = 128
#: What its kernels do not read, and what they get instead.
_READ_AS = {torch.float64: torch.float32, torch.int8: torch.int32, torch.uint8: torch.int32, torch.int16: torch.int32}


def _readable(args):
    return [a.to(_READ_AS[a.dtype]) if isinstance(a, torch.Tensor) and a.dtype in _READ_AS else a for a in args]


def _triton_forward(*args, chunk):
    from .triton import forward
    return forward(*_readable(args), chunk=chunk)


def _triton_backward(*args, chunk):
    from .triton import backward
    return backward(*_readable(args), chunk=chunk)


def _cpu_forward(*args, chunk):
    return torch.ops.mmvssm_cpu.selective_scan(*args, chunk)


def _cpu_backward(grad, x, dt, A, B, C, dt_weight, dt_bias, D, order, states, *, chunk):
    grad_x, grad_delta, grad_A, grad_B, grad_C, grad_D = torch.ops.mmvssm_cpu.selective_scan_backward(
        grad, x, dt, A, B, C, dt_weight, dt_bias, D, order, states, chunk)
    rows = grad_delta.flatten(0, 1).transpose(0, 1)                    # (K, batch * L, D)
    grad_dt = torch.bmm(rows, dt_weight).transpose(0, 1).reshape(dt.shape)
    grad_weight = torch.bmm(rows.transpose(1, 2), dt.flatten(0, 1).transpose(0, 1))
    return grad_x, grad_dt, grad_A, grad_B, grad_C, grad_weight, rows.sum(1), grad_D


BACKENDS = (
    Backend('triton', why_not_triton, _triton_forward, _triton_backward, casts=True),
    Backend('cpu', why_not_cpu, _cpu_forward, _cpu_backward),
    Backend('torch', lambda tensor: None, composed.forward, composed.backward),
)


def within_ranks(backends, dt):
    """``backends`` without Triton where it was not asked for and ``dt`` has more ranks than it takes; says so once."""
    if dt.shape[-1] <= MOST_RANKS or requested_backend() == 'triton':
        return backends
    if dt.is_cuda:
        warn_once(f'selective_scan: Triton takes dt of rank 1 to {MOST_RANKS}, got {dt.shape[-1]}')
    return [b for b in backends if b.name != 'triton']
