"""The selective scan in plain PyTorch, step by step: what every backend is compared with. Any dtype, any
device, differentiable, slow."""
import torch
import torch.nn.functional as F

from .orders import order_of_map


def recurrence_by_steps(a, b):
    """``h_t = a_t * h_{t-1} + b_t`` along dimension 1, one step at a time, from ``h_{-1} = 0``."""
    h, states = torch.zeros_like(b[:, 0]), []
    for a_t, b_t in zip(a.unbind(1), b.unbind(1), strict=True):
        h = a_t * h + b_t
        states.append(h)
    return torch.stack(states, 1)


def selective_scan_reference(x, dt, A, B, C=None, *, dt_weight, dt_bias, D=None, order=None,
                             recurrence=recurrence_by_steps):
    """See :func:`mmvssm.kernels.selective_scan` for shapes. ``recurrence(a, b)`` solves the linear
    recurrence."""
    if dt.dim() == 3:  # one direction
        dt, B, C = dt.unsqueeze(2), B.unsqueeze(2), None if C is None else C.unsqueeze(2)
        A, dt_weight, dt_bias = A.unsqueeze(0), dt_weight.unsqueeze(0), dt_bias.unsqueeze(0)
        D = None if D is None else D.unsqueeze(0)
    if isinstance(order, tuple):
        order = order_of_map(order, dt.shape[2], x.device)
    total = 0
    for k in range(dt.shape[2]):
        if order is None:
            tokens = None
        else:
            tokens = order.expand(x.shape[0], dt.shape[2], x.shape[1])[:, k].long()

        def walk(t, tokens=tokens):
            return t if tokens is None else t.gather(1, tokens.unsqueeze(-1).expand_as(t))

        u = walk(x)
        delta = F.softplus(walk(F.linear(dt[:, :, k], dt_weight[k], dt_bias[k])))
        decay = torch.exp(delta.unsqueeze(2) * A[k].t())                         # (batch, L, N, D)
        drive = (delta * u).unsqueeze(2) * walk(B[:, :, k]).unsqueeze(3)
        y = recurrence(decay, drive)
        if C is not None:
            y = (y * walk(C[:, :, k]).unsqueeze(3)).sum(2)
            if D is not None:
                y = y + D[k] * u
        if tokens is not None:
            y = walk_back(y, tokens)
        total = total + y
    return total


def walk_back(y, tokens):
    """Put step ``t`` of ``y`` (batch, L, ...) at its token ``tokens[:, t]``."""
    place = tokens.view(tokens.shape + (1,) * (y.dim() - 2)).expand_as(y)
    return torch.zeros_like(y).scatter(1, place, y)
