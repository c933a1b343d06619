"""The backends of the gated LayerNorm, fastest first."""
import torch

from .._core.backends import Backend
from .._core.extension import why_not_cpu
from .._core.vjp import vjp
from .reference import norm_gate_reference

BACKENDS = (
    Backend('cpu', why_not_cpu, lambda *args: torch.ops.mmvssm_cpu.norm_gate(*args),
            lambda *args: torch.ops.mmvssm_cpu.norm_gate_backward(*args)),
    Backend('torch', lambda tensor: None, norm_gate_reference,
            lambda grad, *args: vjp(norm_gate_reference, args, grad)[:4]),
)
