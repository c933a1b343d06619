from .interface import depthwise_conv
from .reference import depthwise_conv_reference

__all__ = ['depthwise_conv', 'depthwise_conv_reference']
