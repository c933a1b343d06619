"""Orders in which tokens may be scanned, as tables for the argument ``order`` of the scan."""
import torch

from .._core.checks import check_integer


def two_way_order(length, device=None):
    """A sequence forwards and backwards: int64, (2, length).

    Raises:
        ValueError: ``length`` is no integer, or negative.
    """
    check_integer('two_way_order', 'length', length, 0)
    steps = torch.arange(length, device=device)
    return torch.stack([steps, steps.flip(0)])


def cross_scan_order(height, width, device=None):
    """The cross scan of a map (VMamba, arXiv 2401.10166): row by row, column by column, and both in reverse;
    int64, (4, height * width), tokens numbered row by row.

    Raises:
        ValueError: ``height`` or ``width`` is no integer, or negative.
    """
    check_integer('cross_scan_order', 'height', height, 0)
    check_integer('cross_scan_order', 'width', width, 0)
    rows = torch.arange(height * width, device=device)
    columns = rows.view(height, width).t().flatten()
    return torch.stack([rows, columns, rows.flip(0), columns.flip(0)])


def order_of_map(sides, directions, device=None):
    """The table for ``order=sides``, the height and width of a map: int64, (directions, height * width)."""
    height, width = sides
    return two_way_order(height * width, device) if directions == 2 else cross_scan_order(height, width, device)
