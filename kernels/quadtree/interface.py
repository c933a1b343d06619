"""The public re-orderings: validate, document, call the operator."""
import torch

from .._core.checks import check_integer, check_same_device, check_shape
from . import flops, ops  # noqa: F401  (register the operator)
from .orders import TOKEN_ORDERS, check_shift


def to_quadtree(x, selected, *, shift=(0, 0), token_order='released'):
    """A map as QuadMamba's sequence: by windows of a 2 x 2 grid, but the tokens of the selected window by
    sub-windows of the 4 x 4 grid (arXiv 2410.06806, section 3.2).

    With ``m`` the selection of a token's window, a position holds ``(1 - m) x`` of the token that the walk by
    windows has there plus ``m x`` of the token that the walk by sub-windows has there.

    Args:
        x (Tensor): map, (batch, H, W, D), channels last, H and W multiples of 4; any strides.
        selected (Tensor): selection of the four windows, row by row, (batch, 4); usually one-hot, see
            :func:`select_window`.
        shift (tuple[int, int]): roll of the map (dy, dx) before it is cut into windows, as by ``torch.roll``.
        token_order (str): 'quadtree', the selected window keeps its own quarter of the sequence, so that every
            position has one token; or 'released', as in the authors' code: the walk by sub-windows goes over
            the whole map, so that some positions have two tokens, summed, and some none.

    Returns:
        Tensor: (batch, H * W, D), contiguous, dtype of ``x``.

    Raises:
        ValueError: a shape, ``shift`` or ``token_order`` does not fit, or tensors are on different devices.
        TypeError: a tensor is not floating point.
        BackendError: a requested backend cannot run the call.
    """
    op = 'to_quadtree'
    check_same_device(op, dict(x=x, selected=selected))
    if x.dim() != 4:
        raise ValueError(f'{op}: x has shape {tuple(x.shape)}, expected (batch, H, W, D)')
    batch, height, width, _ = x.shape
    shift = _check(op, 'x', batch, height, width, selected, shift, token_order)
    return torch.ops.mmvssm.quadtree(x.flatten(1, 2), selected, height, width, shift, token_order, False)


def from_quadtree(y, selected, height, width, *, shift=(0, 0), token_order='released'):
    """The map of a sequence that :func:`to_quadtree` made: a token reads ``(1 - m) y`` at its position in the
    walk by windows plus ``m y`` at its position in the walk by sub-windows.

    Args:
        y (Tensor): sequence, (batch, height * width, D); any strides.
        selected, shift, token_order: as for :func:`to_quadtree`.
        height, width (int): sides of the map, multiples of 4.

    Returns:
        Tensor: (batch, height, width, D), contiguous, dtype of ``y``.

    Raises:
        ValueError, TypeError, BackendError: as :func:`to_quadtree`.
    """
    op = 'from_quadtree'
    check_same_device(op, dict(y=y, selected=selected))
    check_integer(op, 'height', height, 1)
    check_integer(op, 'width', width, 1)
    if y.dim() != 3 or y.shape[1] != height * width:
        raise ValueError(f'{op}: y has shape {tuple(y.shape)}, expected (batch, {height} * {width}, D)')
    shift = _check(op, 'height, width', y.shape[0], height, width, selected, shift, token_order)
    x = torch.ops.mmvssm.quadtree(y, selected, height, width, shift, token_order, True)
    return x.unflatten(1, (height, width))


def _check(op, what, batch, height, width, selected, shift, token_order):
    if height % 4 or width % 4 or not height or not width:
        raise ValueError(f'{op}: {what}: a map of {height} x {width} tokens, expected multiples of 4; pad it')
    check_shape(op, 'selected', selected, (batch, 4), '(batch, 4)')
    check_token_order(op, token_order)
    return check_shift(op, shift)


def check_token_order(owner, token_order):
    """Raise ValueError unless ``token_order`` is one of :data:`TOKEN_ORDERS`."""
    if token_order not in TOKEN_ORDERS:
        raise ValueError(f"{owner}: token_order={token_order!r}, expected one of {', '.join(TOKEN_ORDERS)}")
