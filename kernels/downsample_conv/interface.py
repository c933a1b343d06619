"""The public convolution of a downsampling: validates, documents, calls the operator."""
from .._core.checks import check_map, check_same_device, check_shape
from . import flops, ops  # noqa: F401  (flops registers its formula)


def downsample_conv(x, weight, bias):
    """Depthwise 3x3 convolution, stride 2, zero padding, channels last, between two ReLUs:
    ``y = relu(conv(relu(x)) + bias)``, the middle of a downsampling in Spatial-Mamba (arXiv 2410.15091) and in
    linear-attention backbones, between its two 1x1 convolutions.

    Args:
        x (Tensor): input, (batch, H, W, D), none but the batch empty; any strides.
        weight (Tensor): kernels, (D, 1, 3, 3).
        bias (Tensor): (D,).

    Returns:
        Tensor: ``y`` (batch, H/2, W/2, D), sides rounded up, contiguous, dtype of ``x``.

    Raises:
        ValueError: a shape does not fit, or tensors are on different devices.
        TypeError: a tensor is not floating point.
        BackendError: a requested backend cannot run the call.
    """
    op = 'downsample_conv'
    check_same_device(op, dict(x=x, weight=weight, bias=bias))
    check_map(op, 'x', x)
    dim = x.shape[-1]
    check_shape(op, 'weight', weight, (dim, 1, 3, 3), '(D, 1, 3, 3)')
    check_shape(op, 'bias', bias, (dim,), '(D,)')
    return ops.downsample_conv(x, weight, bias)
