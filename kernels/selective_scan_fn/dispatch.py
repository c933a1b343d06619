"""The backends of the scan with Mamba's interface, fastest first but for what ``forward_order`` says."""
import torch

from .._core.backends import Backend
from .._core.extension import why_not_cpu, why_not_cuda
from .._core.triton_support import has_triton, why_not_triton
from . import composed


def _cuda_forward(*args, chunk):
    return torch.ops.mmvssm_cuda.selective_scan_fn(*args, chunk)


def _cuda_backward(*args, chunk):
    return torch.ops.mmvssm_cuda.selective_scan_fn_backward(*args, chunk)


def _triton_forward(*args, chunk):
    from .triton import forward
    return forward(*args, chunk=chunk)


def _triton_backward(*args, chunk):
    from .triton import backward
    return backward(*args, chunk=chunk)


def _cpu_forward(*args, chunk):
    return torch.ops.mmvssm_cpu.selective_scan_fn(*args, chunk)


def _cpu_backward(*args, chunk):
    return torch.ops.mmvssm_cpu.selective_scan_fn_backward(*args, chunk)


BACKENDS = (
    Backend('cuda', why_not_cuda, _cuda_forward, _cuda_backward, casts=True),
    Backend('triton', why_not_triton, _triton_forward, _triton_backward, casts=True),
    Backend('cpu', why_not_cpu, _cpu_forward, _cpu_backward),
    Backend('torch', lambda tensor: None, composed.forward, composed.backward),
)


def forward_order(backends, u, d_state):
    """``backends``, fastest first for a forward pass: with one state that is Triton's, as measured (README.md)."""
    return sorted(backends, key=lambda b: b.name != 'triton') if d_state == 1 and has_triton(u) else backends
