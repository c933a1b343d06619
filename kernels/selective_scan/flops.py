from math import prod

from .._core.flops import register


def selective_scan_flops(x, dt, A, B, C, dt_weight, dt_bias, D, order, height, width):
    """The publication's count: per token, channel and state 7 for the states alone, 9 with the output, 1 for
    the skip; and the step projection, a matrix product."""
    tokens_by_channels = prod(dt[:3]) * x[2]
    count = tokens_by_channels * (B[3] * (7 if C is None else 9) + dt[3])
    return count + (0 if D is None else tokens_by_channels)


register('selective_scan', selective_scan_flops)
