"""Operators of vision state-space models. One folder each; see README.md beside this file."""
from ._core.backends import BackendError, use_backend
from .depthwise_conv import depthwise_conv, depthwise_conv_reference
from .downsample_conv import downsample_conv, downsample_conv_reference
from .gelu_backward import column_sums, gelu_backward
from .norm_gate import norm_gate, norm_gate_reference
from .quadtree import from_quadtree, quadtree_reference, select_window, to_quadtree, window_scores
from .residual_conv_norm import residual_conv_norm, residual_conv_norm_reference
from .residual_norm import residual_norm, residual_norm_reference
from .selective_scan import cross_scan_order, selective_scan, selective_scan_reference, two_way_order
from .selective_scan_fn import selective_scan_fn, selective_scan_fn_reference
from .state_fusion import state_fusion, state_fusion_reference

__all__ = [
    'BackendError', 'use_backend', 'column_sums', 'cross_scan_order', 'depthwise_conv', 'depthwise_conv_reference',
    'downsample_conv', 'downsample_conv_reference', 'from_quadtree', 'gelu_backward', 'norm_gate',
    'norm_gate_reference', 'quadtree_reference', 'residual_conv_norm', 'residual_conv_norm_reference',
    'residual_norm', 'residual_norm_reference', 'select_window', 'selective_scan', 'selective_scan_fn',
    'selective_scan_fn_reference', 'selective_scan_reference', 'state_fusion', 'state_fusion_reference',
    'to_quadtree', 'two_way_order', 'window_scores',
]
