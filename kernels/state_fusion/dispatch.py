"""The backends of state fusion, fastest first."""
import torch

from .._core.backends import Backend
from .._core.extension import why_not_cpu
from .._core.triton_support import why_not_triton
from .._core.vjp import vjp
from .reference import state_fusion_reference


def _stack(kernels):
    return torch.stack([k.flatten(1) for k in kernels])  # (3, D, 9)


def _cpu_forward(h, C, x, D, *kernels_and_alpha):
    *kernels, alpha = kernels_and_alpha
    return torch.ops.mmvssm_cpu.state_fusion(h, C, x, D, _stack(kernels), alpha)


def _cpu_backward(grad, h, C, x, D, *kernels_and_alpha):
    *kernels, alpha = kernels_and_alpha
    *grads, grad_kernels, grad_alpha = torch.ops.mmvssm_cpu.state_fusion_backward(
        grad, h, C, x, D, _stack(kernels), alpha)
    return (*grads, *(g.view_as(kernels[0]).clone() for g in grad_kernels), grad_alpha)


def _triton_forward(*args):
    from . import triton  # it may be absent
    return triton.forward(*args)


def _triton_backward(*args):
    from . import triton
    return triton.backward(*args)


BACKENDS = (
    Backend('triton', why_not_triton, _triton_forward, _triton_backward, casts=True),
    Backend('cpu', why_not_cpu, _cpu_forward, _cpu_backward),
    Backend('torch', lambda tensor: None, state_fusion_reference,
            lambda grad, *args: vjp(state_fusion_reference, args, grad)),
)
