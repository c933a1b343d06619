"""The public gated LayerNorm: validates, documents, calls the operator."""
from .._core.checks import check_same_device, check_shape
from . import flops, ops  # noqa: F401  (flops registers its formula)


def norm_gate(x, z, weight, bias, eps=1e-5):
    """``LayerNorm(x) * SiLU(z)`` over the last dimension in one pass: the gate of Mamba-style mixers.

    Internals are float32 (float64 for float64 ``x``).

    Args:
        x (Tensor): (..., D).
        z (Tensor): gate, same shape as ``x``.
        weight, bias (Tensor): of the LayerNorm, (D,).
        eps (float): of the LayerNorm. Default 1e-5.

    Returns:
        Tensor: same shape and dtype as ``x``, contiguous.

    Raises:
        ValueError: a shape does not fit, or tensors are on different devices.
        TypeError: a tensor is not floating point.
        BackendError: a requested backend cannot run the call.
    """
    op = 'norm_gate'
    check_same_device(op, dict(x=x, z=z, weight=weight, bias=bias))
    if x.dim() == 0:
        raise ValueError(f'{op}: x has shape (), expected (..., D)')
    check_shape(op, 'z', z, x.shape, 'that of x')
    check_shape(op, 'weight', weight, x.shape[-1:], '(D,)')
    check_shape(op, 'bias', bias, x.shape[-1:], '(D,)')
    return ops.norm_gate(x, z, weight, bias, eps)
