"""The backends of the depthwise convolution, fastest first."""
import torch

from .._core.backends import Backend
from .._core.extension import why_not_cpu
from .._core.triton_support import why_not_triton
from .._core.vjp import vjp
from .reference import depthwise_conv_reference


def _triton_forward(*args):
    from .triton import forward
    return forward(*args)


def _triton_backward(*args):
    from .triton import backward
    return backward(*args)


def _cpu_forward(x, weight, bias, residual, silu):
    return torch.ops.mmvssm_cpu.depthwise_conv(x, weight.flatten(1), bias, residual, silu)


def _cpu_backward(grad, x, weight, bias, residual, silu):
    grad_x, grad_weight, grad_bias = torch.ops.mmvssm_cpu.depthwise_conv_backward(
        grad, x, weight.flatten(1), bias, residual, silu)
    return grad_x, grad_weight.view_as(weight), grad_bias


BACKENDS = (
    Backend('triton', why_not_triton, _triton_forward, _triton_backward, casts=True),
    Backend('cpu', why_not_cpu, _cpu_forward, _cpu_backward),
    Backend('torch', lambda tensor: None, depthwise_conv_reference,
            lambda grad, *args: vjp(depthwise_conv_reference, args, grad)[:3]),
)
