"""Backend ``torch``: the selective scan composed of PyTorch operations. Runs on every device and needs
nothing built; the recurrence takes log2(L) passes over the sequence instead of L steps."""
import torch

from .._core.vjp import vjp
from .reference import selective_scan_reference


def _double(a, b):
    """Inclusive scan of ``h_t = a_t h_{t-1} + b_t`` along dimension 1 by recursive doubling."""
    a, b = a.clone(), b.clone()
    step = 1
    while step < b.shape[1]:
        b[:, step:] += a[:, step:] * b[:, :-step].clone()
        a[:, step:] *= a[:, :-step].clone()
        step *= 2
    return b


class _Recurrence(torch.autograd.Function):
    """The recurrence with its adjoint, which is the same recurrence backwards in time."""

    @staticmethod
    def forward(ctx, a, b):
        h = _double(a, b)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx, grad):
        a, h = ctx.saved_tensors
        ahead = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1)
        g = _double(ahead.flip(1), grad.flip(1)).flip(1)
        before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)
        return g * before, g


def _scan(x, dt, A, B, C, dt_weight, dt_bias, D, order, recurrence=_Recurrence.apply):
    return selective_scan_reference(x, dt, A, B, C, dt_weight=dt_weight, dt_bias=dt_bias, D=D, order=order,
                                    recurrence=recurrence)


def forward(*args, chunk):
    """Returns ``y`` and the state before each chunk of ``chunk`` tokens."""
    states = []

    def recurrence(a, b):
        h = _double(a, b)
        states.append(torch.cat([torch.zeros_like(h[:, :1]), h[:, chunk - 1:-1:chunk]], 1))
        return h

    return _scan(*args, recurrence=recurrence), torch.stack(states, 1)


def backward(grad, *args_and_states, chunk):
    """Gradients of the eight tensor arguments; recomputes what it needs, the states included."""
    return vjp(_scan, args_and_states[:-1], grad)[:8]
