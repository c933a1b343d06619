from .interface import downsample_conv
from .reference import downsample_conv_reference

__all__ = ['downsample_conv', 'downsample_conv_reference']
