from .interface import state_fusion
from .reference import state_fusion_reference

__all__ = ['state_fusion', 'state_fusion_reference']
