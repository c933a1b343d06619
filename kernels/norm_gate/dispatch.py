"""The backends of the gated LayerNorm, fastest first."""
import torch

from .._core.backends import Backend
from .._core.extension import why_not_cpu
from .._core.triton_support import why_not_triton
from .._core.vjp import vjp
from .reference import norm_gate_reference


def _triton_forward(*args):
    from .triton import forward
    return forward(*args)


def _triton_backward(*args):
    from .triton import backward
    return backward(*args)


BACKENDS = (
    Backend('triton', why_not_triton, _triton_forward, _triton_backward, casts=True),
    Backend('cpu', why_not_cpu, lambda *args: torch.ops.mmvssm_cpu.norm_gate(*args),
            lambda *args: torch.ops.mmvssm_cpu.norm_gate_backward(*args)),
    Backend('torch', lambda tensor: None, norm_gate_reference,
            lambda grad, *args: vjp(norm_gate_reference, args, grad)[:4]),
)
