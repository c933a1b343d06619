"""Linear recurrences in PyTorch operations, in log2(L) passes over the sequence instead of L steps."""
import torch


def double(a, b):
    """Inclusive scan of ``h_t = a_t h_{t-1} + b_t`` along dimension 1 by recursive doubling."""
    a, b = a.clone(), b.clone()
    step = 1
    while step < b.shape[1]:
        b[:, step:] += a[:, step:] * b[:, :-step].clone()
        a[:, step:] *= a[:, :-step].clone()
        step *= 2
    return b


class Recurrence(torch.autograd.Function):
    """The recurrence with its adjoint, which is the same recurrence backwards in time."""

    @staticmethod
    def forward(ctx, a, b):
        h = double(a, b)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx, grad):
        a, h = ctx.saved_tensors
        ahead = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1)
        g = double(ahead.flip(1), grad.flip(1)).flip(1)
        before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)
        return g * before, g
