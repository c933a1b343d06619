"""The public residual LayerNorm: validates, documents, calls the operator."""
from .._core.checks import FLOATS, check_same_device, check_shape
from . import flops, ops  # noqa: F401  (flops registers its formula)


def residual_norm(x, weight, bias, branch=None, scale=None, eps=1e-5, dtype=None):
    """What stands between two branches of a block, in one pass: the addition of the last branch and the LayerNorm,
    over the last dimension, before the next:

        y = x + scale * branch
        n = LayerNorm(y)

    Internals are float32 (float64 for float64 ``x``): ``n`` is the norm of ``y`` before it is rounded.

    Args:
        x (Tensor): input, (batch, ..., D); any strides.
        weight, bias (Tensor): of the LayerNorm, (D,).
        branch (Tensor, optional): what to add to ``x``, same shape.
        scale (Tensor, optional): of ``branch`` by image, (batch,): stochastic depth. It gets no gradient.
        eps (float): of the LayerNorm. Default 1e-5.
        dtype (torch.dtype, optional): of ``n``, floating point. Default that of ``x``.

    Returns:
        (Tensor, Tensor): ``y``, which is ``x`` itself where there is no branch, and ``n``, contiguous; of the shape of
        ``x``, and ``y`` of its dtype.

    Raises:
        ValueError: a shape does not fit, ``scale`` comes without ``branch``, or tensors are on different devices.
        TypeError: a tensor is not floating point.
        BackendError: a requested backend cannot run the call.
    """
    op = 'residual_norm'
    check_same_device(op, dict(x=x, weight=weight, bias=bias, branch=branch, scale=scale))
    if x.dim() < 2:
        raise ValueError(f'{op}: x has shape {tuple(x.shape)}, expected (batch, ..., D)')
    check_shape(op, 'weight', weight, x.shape[-1:], '(D,)')
    check_shape(op, 'bias', bias, x.shape[-1:], '(D,)')
    if branch is not None:
        check_shape(op, 'branch', branch, x.shape, 'that of x')
    if scale is not None:
        if branch is None:
            raise ValueError(f'{op}: scale is given without the branch that it scales')
        check_shape(op, 'scale', scale, x.shape[:1], '(batch,)')
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"{op}: dtype is {dtype}, expected one of {', '.join(map(str, FLOATS))}")
    y, n = ops.residual_norm(x, branch, scale, weight, bias, eps, dtype)
    return x if branch is None else y, n
