"""The backends of the quadtree re-orderings, fastest first."""
import torch
import torch.nn.functional as F

from .._core.backends import Backend
from .._core.extension import why_not_cpu
from .._core.triton_support import why_not_triton
from .orders import tables
from .reference import quadtree_reference


def _cpu_forward(x, selected, height, width, shift, token_order, inverse):
    t = tables(height, width, tuple(shift), token_order, x.device)
    if inverse:
        return torch.ops.mmvssm_cpu.quadtree(x, selected, t.coarse_position, t.fine_position, t.window, t.window)
    return torch.ops.mmvssm_cpu.quadtree(x, selected, t.coarse, t.fine, t.window_of_coarse, t.window_of_fine)


def _torch_dots(tokens, sequence, coarse, fine):
    """What each token gains by the walk by sub-windows: (batch, L)."""
    return (tokens * (sequence[:, fine] - sequence[:, coarse])).sum(-1)


def _cpu_dots(*args):
    return torch.ops.mmvssm_cpu.quadtree_dots(*args)


def _backward(forward, dots):
    """The two re-orderings are each other's adjoint in ``x`` and have their gradient in ``selected`` in common."""

    def backward(grad, x, selected, height, width, shift, token_order, inverse):
        t = tables(height, width, tuple(shift), token_order, x.device)
        grad_x = forward(grad, selected, height, width, shift, token_order, not inverse)
        tokens, sequence = (grad, x) if inverse else (x, grad)
        by_token = dots(tokens, sequence, t.coarse_position, t.fine_position)
        return grad_x, by_token @ F.one_hot(t.window, 4).to(by_token)

    return backward


def _triton_forward(*args):
    from .triton import forward
    return forward(*args)


def _triton_backward(*args):
    from .triton import backward
    return backward(*args)


BACKENDS = (
    Backend('triton', why_not_triton, _triton_forward, _triton_backward, casts=True),
    Backend('cpu', why_not_cpu, _cpu_forward, _backward(_cpu_forward, _cpu_dots)),
    Backend('torch', lambda tensor: None, quadtree_reference, _backward(quadtree_reference, _torch_dots)),
)
