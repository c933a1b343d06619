"""Which implementation of an operator runs, and why not another.

Every operator lists its :class:`Backend`\\ s, fastest first. Each says, for the tensors of a call, whether it
can run them or the reason why it cannot. Without a request the first that can is taken; a request,
by ``MMVSSM_BACKEND=name`` or :func:`use_backend`, is met or raises with the reason.
"""
import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .precision import without_autocast

_requested = None  # a plain global: autograd runs backward passes in threads of its own


class BackendError(RuntimeError):
    """A requested backend cannot run this call."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    Args:
        name: what users request, e.g. ``'cpu'``.
        why_not: called with the operator's first tensor; the reason why this backend cannot run, or None.
        forward, backward: the implementation, with the arguments of the operator and its backward.
        casts: it reads floating-point tensors of any precision itself; the others get them in the precision
            that they compute in.
    """
    name: str
    why_not: Callable
    forward: Callable
    backward: Callable
    casts: bool = False

    def run(self, step, args, dtype, **kwargs):
        """``step``, ``'forward'`` or ``'backward'``, on ``args``, computing in ``dtype`` whatever autocast says."""
        function = getattr(self, step)
        if self.casts:
            return function(*args, **kwargs)
        args = [a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        return without_autocast(function)(*args, **kwargs)


def requested_backend():
    """The name asked for by :func:`use_backend` or ``MMVSSM_BACKEND``, or None."""
    return _requested or os.environ.get('MMVSSM_BACKEND') or None


@contextlib.contextmanager
def use_backend(name):
    """Run the operators called inside the ``with`` block on backend ``name`` (``'triton'``, ``'cuda'``, ``'cpu'``,
    ``'torch'``), or raise :class:`BackendError` with the reason. ``None`` asks for nothing: ``MMVSSM_BACKEND`` or the
    automatic choice decides.

    A backward pass follows the request in force when it runs.
    """
    global _requested
    before, _requested = _requested, name
    try:
        yield
    finally:
        _requested = before


def choose(op, backends, tensor):
    """The backend that runs operator ``op`` on ``tensor``; raises :class:`BackendError` where none can."""
    name = requested_backend()
    known = [b for b in backends if name in (None, b.name)]
    if not known:
        raise BackendError(f"{op}: there is no backend '{name}' of this operator; it has "
                           f"{', '.join(b.name for b in backends)}")
    reasons = []
    for backend in known:
        reason = backend.why_not(tensor)
        if reason is None:
            return backend
        reasons.append(f'{backend.name}: {reason}')
    raise BackendError(f"{op}: no {'requested ' if name else ''}backend can run this call: "
                       + '; '.join(reasons))
