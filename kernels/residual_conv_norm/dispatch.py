"""The backends of the residual convolution with norm, fastest first."""
import torch
import torch.nn.functional as F

from .._core.backends import Backend
from .._core.extension import why_not_cpu
from .._core.triton_support import why_not_triton
from .._core.vjp import vjp
from .reference import residual_conv_norm_reference


def _residual(x, branch, scale):
    if branch is None:
        return x
    return x + (branch if scale is None else scale[:, None, None, None] * branch)


def _conv(x, branch, scale, conv_weight, conv_bias):
    """``y`` and what the convolution was applied to."""
    u = _residual(x, branch, scale)
    return torch.ops.mmvssm_cpu.depthwise_conv(u, conv_weight.flatten(1), conv_bias, True, False), u


def _cpu_forward(x, branch, scale, conv_weight, conv_bias, norm_weight, norm_bias, eps):
    y, _ = _conv(x, branch, scale, conv_weight, conv_bias)
    return y, F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, eps)


def _cpu_backward(grad_y, grad_n, x, branch, scale, conv_weight, conv_bias, norm_weight, norm_bias, eps, *,
                  branch_too):
    y, u = _conv(x, branch, scale, conv_weight, conv_bias)
    _, mean, rstd = torch.native_layer_norm(y, y.shape[-1:], norm_weight, norm_bias, eps)
    grad, *grad_norm = torch.ops.aten.native_layer_norm_backward(
        grad_n, y, y.shape[-1:], mean, rstd, norm_weight, norm_bias, [True] * 3)
    grad_u, grad_weight, grad_bias = torch.ops.mmvssm_cpu.depthwise_conv_backward(
        grad + grad_y, u, conv_weight.flatten(1), conv_bias, True, False)
    grad_branch = None
    if branch_too:
        grad_branch = grad_u.clone() if scale is None else scale[:, None, None, None] * grad_u
    return grad_u, grad_branch, grad_weight.view_as(conv_weight), grad_bias, *grad_norm


def _torch_forward(x, branch, scale, conv_weight, conv_bias, norm_weight, norm_bias, eps):
    return residual_conv_norm_reference(x, conv_weight, conv_bias, norm_weight, norm_bias, branch, scale, eps)


def _torch_backward(grad_y, grad_n, *args, branch_too):
    grad_x, grad_branch, _, *grads, _ = vjp(_torch_forward, args, (grad_y, grad_n))
    return grad_x, grad_branch if branch_too else None, *grads


def _triton_forward(*args):
    from .triton import forward
    return forward(*args)


def _triton_backward(*args, branch_too):
    from .triton import backward
    return backward(*args, branch_too=branch_too)


BACKENDS = (
    Backend('triton', why_not_triton, _triton_forward, _triton_backward, casts=True),
    Backend('cpu', why_not_cpu, _cpu_forward, _cpu_backward),
    Backend('torch', lambda tensor: None, _torch_forward, _torch_backward),
)
