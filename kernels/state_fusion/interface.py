"""The public state fusion: validates, documents, calls the operator."""
from .._core.checks import check_map, check_same_device, check_shape
from . import flops, ops  # noqa: F401  (flops registers its formula)


def state_fusion(h, C, x, D, kernels, alpha):
    r"""Structure-aware state fusion with its epilogue (Spatial-Mamba, arXiv 2410.15091, eq. 6-7)::

        fused = sum_k alpha[k] * depthwise_conv3x3(h; kernels[k], dilation d_k),      d = 1, 3, 5
        y     = sum_n C[n] * fused[n] + D * x

    with replicate padding. Internals are float32 (float64 for float64 ``h``).

    Args:
        h (Tensor): states on the map, (batch, H, W, N, D), none but the batch empty; the last dimension are
            channels.
        C (Tensor): output projection, (batch, H, W, N).
        x (Tensor): the scan's input, (batch, H, W, D).
        D (Tensor): skip weight, (D,).
        kernels (sequence of Tensor): three depthwise kernels, (D, 1, 3, 3), of dilation 1, 3 and 5; every
            state of a channel shares them.
        alpha (Tensor): their weights, (3,).

    Returns:
        Tensor: ``y`` (batch, H, W, D), contiguous, dtype of ``x``.

    Raises:
        ValueError: a shape does not fit, or tensors are on different devices.
        TypeError: a tensor is not floating point.
        BackendError: a requested backend cannot run the call.
    """
    op = 'state_fusion'
    if len(kernels) != 3:
        raise ValueError(f'{op}: kernels has {len(kernels)} tensors, expected 3 (dilations 1, 3, 5)')
    named = {f'kernels[{i}]': kernel for i, kernel in enumerate(kernels)}
    check_same_device(op, dict(h=h, C=C, x=x, D=D, alpha=alpha, **named))
    check_map(op, 'h', h, '(batch, H, W, N, D)', ('rows', 'columns', 'states', 'channels'))
    *place, d_state, dim = h.shape
    check_shape(op, 'C', C, (*place, d_state), '(batch, H, W, N)')
    check_shape(op, 'x', x, (*place, dim), '(batch, H, W, D)')
    check_shape(op, 'D', D, (dim,), '(D,)')
    check_shape(op, 'alpha', alpha, (3,), '(3,)')
    for name, kernel in named.items():
        check_shape(op, name, kernel, (dim, 1, 3, 3), '(D, 1, 3, 3)')
    return ops.state_fusion(h, C, x, D, *kernels, alpha)
