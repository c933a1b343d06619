from .interface import norm_gate
from .reference import norm_gate_reference

__all__ = ['norm_gate', 'norm_gate_reference']
