"""Backend ``torch``: the scan composed of PyTorch operations, chunk after chunk, so that tensors (B, L, D, N) are never
longer than a chunk. Runs on every device and needs nothing built."""
import torch
import torch.nn.functional as F

from .._core.recurrence import Recurrence
from .._core.vjp import vjp

#: Which of the arguments ``u`` to ``delta_bias`` end in the steps of the sequence; ``B`` and ``C`` where they vary.
_WALKED = (0, 1, 6)


def _projection(t):
    """``B`` or ``C`` beside tensors (B, L, G, D / G, N)."""
    return t.permute(0, 3, 1, 2).unsqueeze(3) if t.dim() == 4 else t.view(1, 1, 1, *t.shape)


def _times(states, t):
    """The product of (B, L, D, N) with ``B`` or ``C``."""
    t = _projection(t)
    return (states.unflatten(2, (t.shape[2], -1)) * t).flatten(2, 3)


def _chunk(u, delta, A, B, C, D, z, delta_bias, delta_softplus, state):
    """The outputs of one chunk that starts from ``state``, and the state at its end."""
    step = delta if delta_bias is None else delta + delta_bias.unsqueeze(-1)
    step = F.softplus(step) if delta_softplus else step
    decay = torch.exp(step.mT.unsqueeze(3) * A)                              # (B, L, D, N)
    drive = _times((step * u).mT.unsqueeze(3).expand_as(decay), B)
    drive = torch.cat([drive[:, :1] + decay[:, :1] * state.unsqueeze(1), drive[:, 1:]], 1)
    h = Recurrence.apply(decay, drive)
    y = _times(h, C).sum(3).mT
    if D is not None:
        y = y + D.unsqueeze(-1) * u
    if z is not None:
        y = y * F.silu(z)
    return y, h[:, -1]


def _walks(i, t):
    return t is not None and (i in _WALKED or i in (3, 4) and t.dim() == 4)


def _cut(tensors, start, chunk):
    return [t[..., start:start + chunk] if _walks(i, t) else t for i, t in enumerate(tensors)]


def forward(*args, chunk):
    """Returns the output and the states before each chunk of ``chunk`` steps and after the last."""
    *tensors, delta_softplus = args
    u, A = tensors[0], tensors[2]
    outputs, states = [u[..., :0]], [u.new_zeros(*u.shape[:2], A.shape[1])]
    for start in range(0, u.shape[2], chunk):
        y, state = _chunk(*_cut(tensors, start, chunk), delta_softplus, states[-1])
        outputs.append(y)
        states.append(state)
    return torch.cat(outputs, 2), torch.stack(states, 2)


def backward(grad, *args, chunk):
    """Gradients of the eight tensor arguments, from the last chunk to the first; recomputes what it needs."""
    *tensors, delta_softplus, states = args
    walked = [[] for _ in tensors]
    total = [None if t is None else torch.zeros_like(t) for t in tensors]
    grad_state = torch.zeros_like(states[:, :, 0])
    for k in reversed(range(states.shape[2] - 1)):
        start = k * chunk
        cut = (*_cut(tensors, start, chunk), delta_softplus, states[:, :, k])
        *grads, _, grad_state = vjp(_chunk, cut, (grad[..., start:start + chunk], grad_state))
        for i, (t, g) in enumerate(zip(tensors, grads, strict=True)):
            if _walks(i, t):
                walked[i].insert(0, g)
            elif t is not None:
                total[i] = total[i] + g
    return [torch.cat(parts, -1) if parts else t for parts, t in zip(walked, total, strict=True)]
