from .interface import residual_conv_norm
from .reference import residual_conv_norm_reference

__all__ = ['residual_conv_norm', 'residual_conv_norm_reference']
