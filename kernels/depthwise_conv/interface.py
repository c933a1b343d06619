"""The public depthwise convolution: validates, documents, calls the operator."""
from .._core.checks import check_map, check_same_device, check_shape
from . import flops, ops  # noqa: F401  (flops registers its formula)


def depthwise_conv(x, weight, bias=None, *, residual=False, activation=None):
    """Depthwise 3x3 convolution, stride 1, zero padding, channels last, with what follows it fused in:
    ``y = act(conv(x) + bias)``, plus ``x`` if ``residual``.

    Args:
        x (Tensor): input, (batch, H, W, D), none but the batch empty; any strides.
        weight (Tensor): kernels, (D, 1, 3, 3).
        bias (Tensor, optional): (D,).
        residual (bool): add ``x`` to the result.
        activation (str, optional): ``'silu'`` or None.

    Returns:
        Tensor: ``y`` (batch, H, W, D), contiguous, dtype of ``x``.

    Raises:
        ValueError: a shape or ``activation`` does not fit, or tensors are on different devices.
        TypeError: a tensor is not floating point.
        BackendError: a requested backend cannot run the call.
    """
    op = 'depthwise_conv'
    check_same_device(op, dict(x=x, weight=weight, bias=bias))
    if activation not in (None, 'silu'):
        raise ValueError(f"{op}: activation is {activation!r}, expected 'silu' or None")
    check_map(op, 'x', x)
    dim = x.shape[-1]
    check_shape(op, 'weight', weight, (dim, 1, 3, 3), '(D, 1, 3, 3)')
    if bias is not None:
        check_shape(op, 'bias', bias, (dim,), '(D,)')
    return ops.depthwise_conv(x, weight, bias, residual, activation == 'silu')
