"""Backend ``torch``: the selective scan composed of PyTorch operations. Runs on every device and needs
nothing built; the recurrence takes log2(L) passes over the sequence instead of L steps."""
import torch

from .._core.recurrence import Recurrence, double
from .._core.vjp import vjp
from .reference import selective_scan_reference


def _scan(x, dt, A, B, C, dt_weight, dt_bias, D, order, recurrence=Recurrence.apply):
    return selective_scan_reference(x, dt, A, B, C, dt_weight=dt_weight, dt_bias=dt_bias, D=D, order=order,
                                    recurrence=recurrence)


def forward(*args, chunk):
    """Returns ``y`` and the state before each chunk of ``chunk`` tokens."""
    states = []

    def recurrence(a, b):
        h = double(a, b)
        states.append(torch.cat([torch.zeros_like(h[:, :1]), h[:, chunk - 1:-1:chunk]], 1))
        return h

    return _scan(*args, recurrence=recurrence), torch.stack(states, 1)


def backward(grad, *args_and_states, chunk):
    """Gradients of the eight tensor arguments; recomputes what it needs, the states included."""
    return vjp(_scan, args_and_states[:-1], grad)[:8]
