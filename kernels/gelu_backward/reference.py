"""Both functions in plain PyTorch: what the kernels are compared with, and what runs elsewhere."""
import torch
import torch.nn.functional as F

from .._core.precision import compute_dtype


def gelu_backward_reference(grad, x):
    """See :func:`mmvssm.kernels.gelu_backward.gelu_backward`."""
    x = x.contiguous()
    grad_x = torch.ops.aten.gelu_backward(grad.to(x.dtype).contiguous(), x)
    return grad_x, F.gelu(x), column_sums_reference(grad_x)


def column_sums_reference(x):
    """See :func:`mmvssm.kernels.gelu_backward.column_sums`."""
    return x.flatten(0, -2).sum(0, dtype=compute_dtype(x))
