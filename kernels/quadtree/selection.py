"""From scores to the selected window in one kernel, and back in another: what ``window_scores`` and ``select_window``
of orders.py compute from the last layer of a score predictor, for blocks that run as one function."""
import torch
import triton
import triton.language as tl

from .._core.triton_math import LN2, exp, log2, reciprocal
from .._core.triton_support import launch

_TOKENS = 2048  # that a program has at a time
_WARPS = 8


@triton.jit
def _difference(z, image, token, there, L):
    """By how much a token's second number is larger than its first."""
    at = z + (image * L + token) * 2
    first = tl.load(at, mask=there, other=0.0).to(tl.float32)
    return tl.load(at + 1, mask=there, other=0.0).to(tl.float32) - first


@triton.jit
def _window(token, height, width, dy, dx):
    """The window of the 2 x 2 grid that a token is in when the map is rolled by ``dy`` and ``dx``, not negative."""
    row, column = (token // width + dy) % height, (token % width + dx) % width
    return row // (height // 2) * 2 + column // (width // 2)


@triton.jit(do_not_specialize=['height', 'width', 'dy', 'dx'])
def _select(z, noise, selected, soft, height, width, dy, dx, TOKENS: tl.constexpr):
    """One image: the mean over windows of the log-probability of the first of two classes; the softmax of the windows'
    means, with Gumbel noise where ``noise`` has exponential numbers; the largest as 1, all others as 0; NaN stays."""
    image = tl.program_id(0).to(tl.int64)
    L = height * width
    four = tl.arange(0, 4)
    total = tl.zeros([TOKENS, 4], tl.float32)
    for start in range(0, L, TOKENS):
        token = start + tl.arange(0, TOKENS)
        there = token < L
        d = _difference(z, image, token, there, L)
        # The difference of the difference is 0, or NaN where that is infinite, as PyTorch's softmax.
        score = -tl.maximum(d, 0.0) - LN2 * log2(1 + exp(-tl.abs(d))) + (d - d)
        window = _window(token, height, width, dy, dx)
        total += tl.where((window[:, None] == four[None, :]) & there[:, None], score[:, None], 0.0)
    logits = tl.sum(total, 0) * 4 / L
    if noise is not None:
        logits -= tl.log(tl.load(noise + image * 4 + four))
    weights = tl.exp(logits - tl.max(logits, 0))
    weights = weights / tl.sum(weights, 0)
    first = tl.min(tl.where(weights == tl.max(weights, 0), four, 4), 0)
    tl.store(selected + image * 4 + four, tl.where(four == first, 1.0, 0.0) + (weights - weights))
    if soft is not None:
        tl.store(soft + image * 4 + four, weights)


@triton.jit
def _sum_of(gains, image, L, window, TOKENS: tl.constexpr):
    """Of (batch, 4, L / 4), the sum for one window of an image."""
    count = L // 4
    total = tl.zeros([TOKENS], tl.float32)
    for start in range(0, count, TOKENS):
        at = start + tl.arange(0, TOKENS)
        total += tl.load(gains + image * L + window * count + at, mask=at < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=['height', 'width', 'dy', 'dx'])
def _select_backward(z, soft, gains, grad_z, height, width, dy, dx, TOKENS: tl.constexpr):
    """One image: the gradient of ``z`` from those of the selection, by token, as through the softmax."""
    image = tl.program_id(0).to(tl.int64)
    L = height * width
    four = tl.arange(0, 4)
    grad = tl.zeros([4], tl.float32)
    for i in tl.static_range(4):
        total = _sum_of(gains, image, L, i, TOKENS)
        grad = tl.where(four == i, total, grad)
    weights = tl.load(soft + image * 4 + four)
    grad = weights * (grad - tl.sum(weights * grad, 0)) * 4 / L
    for start in range(0, L, TOKENS):
        token = start + tl.arange(0, TOKENS)
        there = token < L
        window = _window(token, height, width, dy, dx)
        d = _difference(z, image, token, there, L)
        of_score = tl.sum(tl.where(window[:, None] == four[None, :], grad[None, :], 0.0), 1)
        value = of_score * reciprocal(1 + exp(-d))
        at = grad_z + (image * L + token) * 2
        tl.store(at, value, mask=there)
        tl.store(at + 1, -value, mask=there)


def _map(height, width, shift):
    return height, width, shift[0] % height, shift[1] % width


def select(z, noise, height, width, shift, keeps):
    """The selected window of each image and, where it ``keeps`` that for backward, the softmax: (batch, 4), float32.

    Args:
        z (Tensor): the predictor's two numbers for each token, (batch, height * width, 2), contiguous.
        noise (Tensor | None): exponentially distributed, (batch, 4), float32, to sample; None: the highest score wins.
        shift (tuple[int, int]): roll (dy, dx) of the map whose windows these are.
    """
    selected = torch.empty((z.shape[0], 4), dtype=torch.float32, device=z.device)
    soft = torch.empty_like(selected) if keeps else None
    launch(_select, (z.shape[0], 1, 1), z, noise, selected, soft, *_map(height, width, shift), _TOKENS,
           num_warps=_WARPS)
    return selected, soft


def select_backward(z, soft, gains, height, width, shift):
    """The gradient of ``z``. ``gains``: (batch, 4, height * width / 4), float32, what the selection of a window adds to
    the loss by each of its tokens."""
    grad_z = torch.empty_like(z)
    launch(_select_backward, (z.shape[0], 1, 1), z, soft, gains, grad_z, *_map(height, width, shift),
           _TOKENS, num_warps=_WARPS)
    return grad_z
