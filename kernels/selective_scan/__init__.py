from .interface import selective_scan
from .orders import cross_scan_order, two_way_order
from .reference import selective_scan_reference

__all__ = ['cross_scan_order', 'selective_scan', 'selective_scan_reference', 'two_way_order']
