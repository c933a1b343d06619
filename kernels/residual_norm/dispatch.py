"""The backends of the residual LayerNorm, fastest first."""
import torch

from .._core.backends import Backend
from .._core.extension import why_not_cpu
from .._core.triton_support import why_not_triton
from .reference import residual, residual_norm_reference


def _torch_forward(x, branch, scale, weight, bias, eps, dtype):
    return residual_norm_reference(x, weight, bias, branch, scale, eps)


def _torch_backward(grad_y, grad_n, x, branch, scale, weight, bias, eps, *, branch_too):
    y = residual(x, branch, scale)
    _, mean, rstd = torch.native_layer_norm(y, y.shape[-1:], weight, bias, eps)
    grad_x, *grads = torch.ops.aten.native_layer_norm_backward(
        grad_n.contiguous(), y, y.shape[-1:], mean, rstd, weight, bias, [True] * 3)
    if branch is not None:
        grad_x = grad_x + grad_y
    grad_branch = None
    if branch_too:
        grad_branch = grad_x.clone() if scale is None else residual(torch.zeros_like(grad_x), grad_x, scale)
    return grad_x, grad_branch, *grads


def _triton_forward(*args):
    from .triton import forward
    return forward(*args)


def _triton_backward(*args, branch_too):
    from .triton import backward
    return backward(*args, branch_too=branch_too)


BACKENDS = (
    Backend('triton', why_not_triton, _triton_forward, _triton_backward, casts=True),
    Backend('cpu', why_not_cpu, _torch_forward, _torch_backward),  # PyTorch's own are as fast as memory
    Backend('torch', lambda tensor: None, _torch_forward, _torch_backward),
)
