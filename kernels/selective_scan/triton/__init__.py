from .backward import backward
from .forward import forward
from .quadtree import Quadtree, gains_of

__all__ = ['Quadtree', 'backward', 'forward', 'gains_of']
