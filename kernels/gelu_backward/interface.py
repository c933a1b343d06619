"""The public functions. They are steps of a backward pass, so nothing is recorded for gradients of theirs."""
from .._core.backends import choose
from .._core.checks import check_same_device, check_shape
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
        ValueError: shapes or devices differ, or there are less than two dimensions.
        TypeError: a tensor is not floating point.
        BackendError: a requested backend cannot run the call.
    """
    op = 'gelu_backward'
    check_same_device(op, dict(grad=grad, x=x))
    check_shape(op, 'grad', grad, x.shape, 'that of x')
    _check_rows(op, x)
    return choose(op, BACKENDS, x).forward(grad, x)


def column_sums(x):
    """Sums over all dimensions but the last: the gradient of a bias from that of what it was added to.

    Args:
        x (Tensor): (..., D), at least two dimensions.

    Returns:
        Tensor: (D,), float32 (float64 for float64 ``x``). Equal calls give equal bits.

    Raises:
        ValueError: ``x`` has less than two dimensions.
        TypeError: it is not floating point.
        BackendError: a requested backend cannot run the call.
    """
    op = 'column_sums'
    check_same_device(op, dict(x=x))
    _check_rows(op, x)
    return choose(op, COLUMN_SUMS, x).forward(x)


def _check_rows(op, x):
    if x.dim() < 2:
        raise ValueError(f'{op}: x has shape {tuple(x.shape)}, expected (..., D) with at least two dimensions')
