"""The backends of the convolution of a downsampling, fastest first."""
import torch

from .._core.backends import Backend
from .._core.extension import why_not_cpu
from .._core.triton_support import why_not_triton
from .reference import downsample_conv_reference


def _triton_forward(*args):
    from .triton import forward
    return forward(*args)


def _triton_backward(*args):
    from .triton import backward
    return backward(*args)


def _torch_backward(grad, y, x, weight, bias):
    """As autograd would, but that the convolution is not computed again for the sign of its result."""
    grad = torch.ops.aten.threshold_backward(grad, y, 0).permute(0, 3, 1, 2)
    before = x.relu().permute(0, 3, 1, 2)
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad, before, weight, bias.shape, (2, 2), (1, 1), (1, 1), False, (0, 0), x.shape[-1], (True, True, True))
    grad_x = torch.ops.aten.threshold_backward(grad_x.permute(0, 2, 3, 1), x, 0)
    return grad_x, grad_weight.flatten().view_as(weight), grad_bias


BACKENDS = (
    Backend('triton', why_not_triton, _triton_forward, _triton_backward, casts=True),
    Backend('cpu', why_not_cpu, downsample_conv_reference, _torch_backward),  # PyTorch's own is fast
    Backend('torch', lambda tensor: None, downsample_conv_reference, _torch_backward),
)
