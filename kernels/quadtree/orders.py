"""Token orders of QuadMamba's quadtree as tables of integers, and the choice of the window to refine.

Paper: Xie et al., "QuadMamba: Learning Quadtree-based Selective Scan for Visual State Space Model", NeurIPS 2024,
https://arxiv.org/abs/2410.06806, section 3.2.
"""
from functools import lru_cache
from operator import index
from typing import NamedTuple

import torch

from .._core.checks import check_same_device

#: 'released': the sub-windows of the selected window keep their places in a walk over the whole map, as in the
#: authors' code and checkpoints. 'quadtree': in their window's own quarter of the sequence, as in the paper.
TOKEN_ORDERS = ('released', 'quadtree')


class Tables(NamedTuple):
    """Integers, (L,) each. A token is a place of the map, row by row; a position one of the sequence."""
    coarse: torch.Tensor  # the token at each position of the walk by windows
    fine: torch.Tensor  # the same by sub-windows
    coarse_position: torch.Tensor  # the position of each token in the walk by windows
    fine_position: torch.Tensor  # the same by sub-windows
    window: torch.Tensor  # 0 to 3, of each token
    window_of_coarse: torch.Tensor  # the same of the token at each position of the walk by windows
    window_of_fine: torch.Tensor  # and by sub-windows


@lru_cache(maxsize=32)  # a network at one size of image needs a few
def tables(height, width, shift, token_order, device):
    """:class:`Tables` of a map of ``height`` x ``width`` tokens, multiples of 4, rolled by ``shift`` (dy, dx)
    before it is cut into windows."""
    with torch.inference_mode(False), torch.device(device):
        length = height * width
        tokens = torch.arange(length).view(height, width).roll(shift, (0, 1))
        coarse = _by_windows(tokens, 2)
        if token_order == 'released':
            fine = _by_windows(tokens, 4)
        else:
            quarters = coarse.view(4, height // 2, width // 2)
            fine = torch.cat([_by_windows(quarter, 2) for quarter in quarters])
        coarse_position, fine_position = coarse.argsort(), fine.argsort()
        window = coarse_position // (length // 4)
        return Tables(coarse, fine, coarse_position, fine_position, window, window[coarse], window[fine])


def _by_windows(tokens, parts):
    """The tokens of a map (H, W) window by window of a grid of ``parts`` x ``parts``, both row by row."""
    height, width = (side // parts for side in tokens.shape)
    return tokens.view(parts, height, parts, width).transpose(1, 2).flatten()


def check_shift(op, shift):
    """``shift`` as two integers (dy, dx); raises ValueError for what is not."""
    try:
        # Tracers have tensors for integers, the compiler symbols that shall remain such.
        dy, dx = shift if torch.compiler.is_compiling() else map(index, shift)
    except (TypeError, ValueError):
        raise ValueError(f'{op}: shift is {shift}, expected two integers (dy, dx)') from None
    return dy, dx


def window_scores(scores, shift=(0, 0)):
    """Mean score of each of the 2 x 2 windows of a map.

    Args:
        scores (Tensor): (batch, H, W), even sides; any dtype of floating point.
        shift (tuple[int, int]): roll of the map (dy, dx) before it is cut into windows.

    Returns:
        Tensor: (batch, 4), windows row by row, dtype of ``scores``.

    Raises:
        ValueError: the shape of ``scores`` or ``shift`` does not fit.
        TypeError: ``scores`` is not floating point.
    """
    op = 'window_scores'
    check_same_device(op, dict(scores=scores))
    if scores.dim() != 3 or not all(side and side % 2 == 0 for side in scores.shape[1:]):
        raise ValueError(f'{op}: scores has shape {tuple(scores.shape)}, expected (batch, H, W) with even H and W')
    shift = check_shift(op, shift)
    batch, height, width = scores.shape
    if any(shift):
        scores = scores.roll(shift, (1, 2))
    return scores.view(batch, 2, height // 2, 2, width // 2).mean((2, 4)).flatten(1)


def select_window(logits, sample):
    """One of the windows as a one-hot row, differentiable by the straight-through estimator: forward it is
    exactly 0 and 1, backward it is the softmax (Gumbel-softmax, arXiv 1611.01144, at temperature 1).

    Args:
        logits (Tensor): (batch, windows); any dtype of floating point.
        sample (bool): draw the window with the probabilities of the softmax, from PyTorch's generator; else the
            highest logit wins.

    Returns:
        Tensor: (batch, windows), dtype of ``logits``.

    Raises:
        ValueError: ``logits`` has another shape.
        TypeError: ``logits`` is not floating point.
    """
    check_same_device('select_window', dict(logits=logits))
    if logits.dim() != 2 or not logits.shape[1]:
        raise ValueError(f'select_window: logits has shape {tuple(logits.shape)}, expected (batch, windows)')
    if sample:
        logits = logits - torch.empty_like(logits).exponential_().log()
    soft = logits.softmax(-1)
    hard = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.)
    return hard + (soft - soft.detach())
