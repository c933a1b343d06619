from math import prod

from .._core.flops import register


def residual_conv_norm_flops(x, branch, scale, conv_weight, conv_bias, norm_weight, norm_bias, eps):
    """Nine taps per element, and the norm as MMEngine counts a LayerNorm with affine parameters."""
    return (9 + 5) * prod(x)


register('residual_conv_norm', residual_conv_norm_flops)
