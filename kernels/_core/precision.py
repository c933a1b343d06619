"""Internals in float32 whatever the precision around them."""
import functools

import torch


def compute_dtype(tensor):
    """The type that kernels calculate in: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def autocast_on(x):
    """Whether autocast is on for the device of ``x``. PyTorch raises where asked for ``meta``."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def without_autocast(fn):
    """Run ``fn`` with autocast off: PyTorch operations inside an operator must not lower its precision."""

    @functools.wraps(fn)
    def wrapped(x, *args, **kwargs):
        if not autocast_on(x):
            return fn(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return fn(x, *args, **kwargs)

    return wrapped
