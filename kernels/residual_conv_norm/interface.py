"""The public residual convolution with norm: validates, documents, calls the operator."""
from .._core.checks import check_map, check_same_device, check_shape
from . import flops, ops  # noqa: F401  (flops registers its formula)


def residual_conv_norm(x, conv_weight, conv_bias, norm_weight, norm_bias, branch=None, scale=None, eps=1e-5):
    """What stands between two branches of a block, in one pass: the addition of the last branch, a depthwise 3x3
    convolution with residual (stride 1, zero padding, channels last), and the LayerNorm before the next branch:

        u = x + scale * branch
        y = u + conv(u) + conv_bias
        n = LayerNorm(y)

    Internals are float32 (float64 for float64 ``x``): ``n`` is the norm of ``y`` before it is rounded.

    Args:
        x (Tensor): input, (batch, H, W, D), none but the batch empty; any strides.
        conv_weight (Tensor): kernels of the convolution, (D, 1, 3, 3).
        conv_bias (Tensor, optional): of the convolution, (D,).
        norm_weight, norm_bias (Tensor): of the LayerNorm over the channels, (D,).
        branch (Tensor, optional): what to add to ``x``, same shape.
        scale (Tensor, optional): of ``branch`` by image, (batch,): stochastic depth. It gets no gradient.
        eps (float): of the LayerNorm. Default 1e-5.

    Returns:
        (Tensor, Tensor): ``y`` and ``n``, (batch, H, W, D), contiguous, dtype of ``x``.

    Raises:
        ValueError: a shape does not fit, ``scale`` comes without ``branch``, or tensors are on different devices.
        TypeError: a tensor is not floating point.
        BackendError: a requested backend cannot run the call.
    """
    op = 'residual_conv_norm'
    check_same_device(op, dict(x=x, conv_weight=conv_weight, conv_bias=conv_bias, norm_weight=norm_weight,
                               norm_bias=norm_bias, branch=branch, scale=scale))
    check_map(op, 'x', x)
    batch, _, _, dim = x.shape
    check_shape(op, 'conv_weight', conv_weight, (dim, 1, 3, 3), '(D, 1, 3, 3)')
    for name, tensor in dict(conv_bias=conv_bias, norm_weight=norm_weight, norm_bias=norm_bias).items():
        if tensor is not None:
            check_shape(op, name, tensor, (dim,), '(D,)')
    if branch is not None:
        check_shape(op, 'branch', branch, x.shape, 'that of x')
    if scale is not None:
        if branch is None:
            raise ValueError(f'{op}: scale is given without the branch that it scales')
        check_shape(op, 'scale', scale, (batch,), '(batch,)')
    return ops.residual_conv_norm(x, branch, scale, conv_weight, conv_bias, norm_weight, norm_bias, eps)
