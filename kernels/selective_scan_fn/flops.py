from math import prod

from .._core.flops import register


def selective_scan_fn_flops(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """The publication's count: 9 per step, channel and state, 1 each for the skip and the gate."""
    return prod(u) * (9 * A[1] + (D is not None) + (z is not None))


register('selective_scan_fn', selective_scan_fn_flops)
