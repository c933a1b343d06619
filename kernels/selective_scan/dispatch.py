"""The backends of the selective scan, fastest first."""
import torch

from .._core.backends import Backend
from .._core.extension import why_not_cpu
from .._core.triton_support import why_not_triton
from . import composed


def _triton_forward(*args, chunk):
    from .triton import forward
    return forward(*args, chunk=chunk)


def _triton_backward(*args, chunk):
    from .triton import backward
    return backward(*args, chunk=chunk)


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
