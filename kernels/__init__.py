"""Operators of vision state-space models. One folder each; see README.md beside this file."""
from ._core.backends import BackendError, use_backend
from .depthwise_conv import depthwise_conv, depthwise_conv_reference
from .norm_gate import norm_gate, norm_gate_reference
from .selective_scan import selective_scan, selective_scan_reference
from .state_fusion import state_fusion, state_fusion_reference

__all__ = [
    'BackendError', 'use_backend', 'depthwise_conv', 'depthwise_conv_reference', 'norm_gate',
    'norm_gate_reference', 'selective_scan', 'selective_scan_reference', 'state_fusion', 'state_fusion_reference',
]
