from math import prod

from .._core.flops import register


def quadtree_flops(x, selected, *options):
    """Two products per element: the weights of the two walks."""
    return 2 * prod(x)


register('quadtree', quadtree_flops)
