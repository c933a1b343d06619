from .interface import residual_norm
from .reference import residual_norm_reference

__all__ = ['residual_norm', 'residual_norm_reference']
