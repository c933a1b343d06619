"""The public scan with Mamba's interface: validates, documents, calls the operator."""
import torch

from .._core.checks import check_same_device, check_shape, check_tensor
from . import flops, ops  # noqa: F401  (flops registers its formula)

#: States per channel that the kernels take.
MOST_STATES = 256


def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                      return_last_state=False):
    r"""Selective state-space scan, a drop-in for ``mamba_ssm``'s function of this name (Gu and Dao, Mamba, arXiv
    2312.00752, Algorithm 2, with zero-order hold for ``A`` and Euler for ``B``).

    Per channel ``d`` and state ``n``, over the steps ``t`` of the sequence::

        step_t = delta_t + delta_bias,   with ``delta_softplus`` softplus of that
        h_t[n] = exp(step_t * A[n]) * h_{t-1}[n] + step_t * B_t[n] * u_t,      h_{-1} = 0
        out_t  = (sum_n C_t[n] * h_t[n] + D * u_t) * silu(z_t)

    ``softplus`` is the identity above 20. Internals are float32 (float64 for float64 ``u``).

    Args:
        u (Tensor): input, (B, D, L) with D 1 or more; any strides, fastest where the steps are adjacent in memory.
        delta (Tensor): steps, (B, D, L).
        A (Tensor): real decay rates, (D, N) with N from 1 to 256, negative for a stable recurrence.
        B, C (Tensor): input and output projections: constant (D, N), varying (B, N, L), or varying (B, G, N, L) for G
            groups of D / G consecutive channels.
        D (Tensor, optional): skip weight, (D,).
        z (Tensor, optional): gate, (B, D, L).
        delta_bias (Tensor, optional): (D,).
        delta_softplus (bool): softplus of the steps. Default False.
        return_last_state (bool): return the state after the last step as well. Default False.

    Every tensor gets its gradient. None flows back through the last state, as in ``mamba_ssm``.

    Returns:
        Tensor: ``out`` (B, D, L), dtype of ``u``, contiguous; with ``return_last_state`` a tuple of it and
        ``h_{L-1}`` (B, D, N), float32 (float64 for float64 ``u``).

    Raises:
        ValueError: a shape does not fit, or tensors are on different devices.
        TypeError: what must be a tensor is none, or it is not real floating point; complex ``A`` is not supported.
        BackendError: a requested backend cannot run the call.
    """
    op = 'selective_scan_fn'
    tensors = dict(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and tensor.is_complex():
            raise TypeError(f'{op}: {name} is complex ({tensor.dtype}), expected a real tensor: states are real here')
    check_same_device(op, tensors)
    for name in ('A', 'B', 'C'):
        check_tensor(op, name, tensors[name])
    if u.dim() != 3:
        raise ValueError(f'{op}: u has shape {tuple(u.shape)}, expected (B, D, L)')
    batch, dim, length = u.shape
    if dim == 0:
        raise ValueError(f'{op}: u has 0 channels, expected 1 or more; its shape is {tuple(u.shape)}')
    check_shape(op, 'delta', delta, u.shape, '(B, D, L)')
    if A.dim() != 2:
        raise ValueError(f'{op}: A has shape {tuple(A.shape)}, expected (D, N)')
    d_state = A.shape[1]
    check_shape(op, 'A', A, (dim, d_state), '(D, N)')
    if not 1 <= d_state <= MOST_STATES:
        raise ValueError(f'{op}: A has {d_state} states, expected 1 to {MOST_STATES}')
    for name, tensor in dict(B=B, C=C).items():
        if tensor.dim() == 2:
            check_shape(op, name, tensor, (dim, d_state), '(D, N)')
        elif tensor.dim() == 3:
            check_shape(op, name, tensor, (batch, d_state, length), '(B, N, L)')
        elif tensor.dim() == 4:
            groups = tensor.shape[1]
            check_shape(op, name, tensor, (batch, groups, d_state, length), '(B, G, N, L)')
            if groups == 0 or dim % groups:
                raise ValueError(f'{op}: {name} has {groups} groups, expected a divisor of the {dim} channels of u')
        else:
            raise ValueError(f'{op}: {name} has shape {tuple(tensor.shape)}, expected (D, N), (B, N, L) or '
                             '(B, G, N, L)')
    if D is not None:
        check_shape(op, 'D', D, (dim,), '(D,)')
    if z is not None:
        check_shape(op, 'z', z, u.shape, '(B, D, L)')
    if delta_bias is not None:
        check_shape(op, 'delta_bias', delta_bias, (dim,), '(D,)')
    B, C = (t.unsqueeze(1) if t.dim() == 3 else t for t in (B, C))
    out, states = ops.selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, bool(delta_softplus))
    return (out, states[:, :, -1].detach().clone()) if return_last_state else out
