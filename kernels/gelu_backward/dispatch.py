"""The backends of both functions, fastest first. ``torch`` stands in for ``cpu`` too: PyTorch's own is good there."""
import torch

from .._core.backends import Backend
from .._core.triton_support import why_not_triton
from .reference import column_sums_reference, gelu_backward_reference


def _why_not_triton(tensor):
    if type(tensor) is not torch.Tensor:  # a fake one, for example
        return f'it takes plain tensors, this one is a {type(tensor).__name__}'
    return why_not_triton(tensor)


def _why_not_cpu(tensor):
    return None if tensor.device.type == 'cpu' else f'it runs CPU tensors, this one is on {tensor.device}'


def _triton_gelu_backward(grad, x):
    from .triton import gelu_backward
    return gelu_backward(grad, x)


def _triton_column_sums(x):
    from .triton import column_sums
    return column_sums(x)


def _backends(triton, composed):
    return (Backend('triton', _why_not_triton, triton, None, casts=True),
            Backend('cpu', _why_not_cpu, composed, None, casts=True),
            Backend('torch', lambda tensor: None, composed, None, casts=True))


BACKENDS = _backends(_triton_gelu_backward, gelu_backward_reference)
COLUMN_SUMS = _backends(_triton_column_sums, column_sums_reference)
