from .interface import from_quadtree, to_quadtree
from .orders import select_window, window_scores
from .reference import quadtree_reference

__all__ = ['from_quadtree', 'quadtree_reference', 'select_window', 'to_quadtree', 'window_scores']
