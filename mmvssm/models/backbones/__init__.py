from .quad_mamba import QuadMamba
from .spatial_mamba import SpatialMamba

__all__ = ['QuadMamba', 'SpatialMamba']
