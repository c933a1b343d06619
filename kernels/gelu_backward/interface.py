"""The public functions. They are steps of a backward pass, so nothing is recorded for gradients of theirs."""
from .._core.backends import choose
from .dispatch import BACKENDS, COLUMN_SUMS


def gelu_backward(grad, x):
    """What the backward pass of an MLP needs around its GELU (exact), in one pass: ``y = gelu(x)`` again, so that only
    ``x`` has to be kept, and the gradients of ``x`` and of the bias that was added last to make it.

    Internals are float32 (float64 for float64 ``x``). Equal calls give equal bits.

    Args:
        grad (Tensor): gradient of ``y``, (..., D), at least two dimensions.
        x (Tensor): same shape as ``grad``.

    Returns:
        tuple[Tensor]: gradient of ``x`` and ``y``, both in the shape and dtype of ``x``, contiguous; sums of the former
        over all dimensions but the last, (D,), float32 (float64 for float64 ``x``).

    Raises:
        ValueError: shapes or devices differ.
        BackendError: a requested backend cannot run the call.
    """
    if grad.shape != x.shape or grad.device != x.device:
        raise ValueError(f'gelu_backward: grad is {tuple(grad.shape)} on {grad.device}, x is {tuple(x.shape)} on '
                         f'{x.device}; expected the same')
    return choose('gelu_backward', BACKENDS, x).forward(grad, x)


def column_sums(x):
    """Sums over all dimensions but the last: the gradient of a bias from that of what it was added to.

    Args:
        x (Tensor): (..., D), at least two dimensions.

    Returns:
        Tensor: (D,), float32 (float64 for float64 ``x``). Equal calls give equal bits.

    Raises:
        BackendError: a requested backend cannot run the call.
    """
    return choose('column_sums', COLUMN_SUMS, x).forward(x)
