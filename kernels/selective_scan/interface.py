"""The public selective scan: validates, documents, calls the operator."""
import torch

from .._core.checks import check_integer, check_same_device, check_shape, check_tensor
from . import flops, ops  # noqa: F401  (flops registers its formula)

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def selective_scan(x, dt, A, B, C=None, *, dt_weight, dt_bias, D=None, order=None):
    r"""Selective state-space scan with the low-rank step projection inside (Mamba, arXiv 2312.00752,
    eq. 2-3 with zero-order hold for ``A`` and Euler for ``B``; Spatial-Mamba, arXiv 2410.15091).

    Per channel ``d`` and state ``n``, over the tokens ``t`` of the sequence::

        delta_t = softplus(dt_t @ dt_weight.T + dt_bias)
        h_t[n]  = exp(delta_t * A[n]) * h_{t-1}[n] + delta_t * B_t[n] * x_t,      h_{-1} = 0
        y_t     = sum_n C_t[n] * h_t[n] + D * x_t

    ``softplus`` is the identity above 20. Internals are float32 (float64 for float64 ``x``).

    Args:
        x (Tensor): input, (batch, L, D), channels last; any strides.
        dt (Tensor): low-rank steps, (batch, L, R).
        A (Tensor): decay rates, (D, N), negative for a stable recurrence.
        B (Tensor): input projection, (batch, L, N).
        C (Tensor, optional): output projection, (batch, L, N). Without it the states are returned.
        dt_weight (Tensor): step projection, (D, R).
        dt_bias (Tensor): its bias, (D,).
        D (Tensor, optional): skip weight, (D,); needs ``C``.
        order (Tensor | tuple[int, int], optional): integer tokens in the order in which they are scanned, a
            permutation of 0..L-1 of shape (L,), (K, L) or (batch, K, L). Or the height and width of a map whose
            tokens are numbered row by row: 2 directions walk it row by row, forwards and backwards, 4 as
            :func:`cross_scan_order` says, without a table. Inputs and outputs stay at their tokens.

    For ``K`` directions at once, give ``dt``, ``B``, ``C`` as (batch, L, K, ...) and ``A``, ``dt_weight``,
    ``dt_bias``, ``D`` as (K, ...); the directions' outputs are summed, in the order of ``k``.

    Returns:
        Tensor: ``y`` (batch, L, D), or without ``C`` the states ``h`` (batch, L, N, D); dtype of ``x``.

    Raises:
        ValueError: a shape does not fit, tensors are on different devices, ``D`` or several directions
            without ``C``, or ``order``, on the CPU, is no permutation (on a GPU nobody checks), or no sides of a
            map of L tokens, with 2 or 4 directions.
        TypeError: a tensor is not floating point, or ``order`` is not of one of :data:`INTEGERS`.
        BackendError: a requested backend cannot run the call.
    """
    op = 'selective_scan'
    check_same_device(op, dict(x=x, dt=dt, A=A, B=B, C=C, dt_weight=dt_weight, dt_bias=dt_bias, D=D))
    for name, tensor in (('dt', dt), ('B', B)):
        check_tensor(op, name, tensor)
    if x.dim() != 3:
        raise ValueError(f'{op}: x has shape {tuple(x.shape)}, expected (batch, L, D)')
    if dt.dim() not in (3, 4):
        raise ValueError(f'{op}: dt has shape {tuple(dt.shape)}, expected (batch, L, R) or (batch, L, K, R)')
    if D is not None and C is None:
        raise ValueError(f'{op}: D is given without C; the skip belongs to the output, not to the states')
    if B.dim() != dt.dim():
        raise ValueError(f'{op}: B has shape {tuple(B.shape)}, expected (batch, L, N) or (batch, L, K, N) as dt '
                         f'{tuple(dt.shape)}')
    batch, length, dim = x.shape
    rank, d_state, K = dt.shape[-1], B.shape[-1], dt.shape[2:-1]
    if not 1 <= d_state <= 256:
        raise ValueError(f'{op}: B has {d_state} states, expected 1 to 256')
    if 0 in K:
        raise ValueError(f'{op}: dt has no direction, its shape is {tuple(dt.shape)}')
    check_shape(op, 'dt', dt, (batch, length, *K, rank), '(batch, L, [K,] R)')
    check_shape(op, 'B', B, (batch, length, *K, d_state), '(batch, L, [K,] N)')
    check_shape(op, 'A', A, (*K, dim, d_state), '([K,] D, N)')
    check_shape(op, 'dt_weight', dt_weight, (*K, dim, rank), '([K,] D, R)')
    check_shape(op, 'dt_bias', dt_bias, (*K, dim), '([K,] D)')
    if C is not None:
        check_shape(op, 'C', C, (batch, length, *K, d_state), '(batch, L, [K,] N)')
    elif K and K[0] > 1:
        raise ValueError(f'{op}: {K[0]} directions need C; states of several directions have no sum')
    if D is not None:
        check_shape(op, 'D', D, (*K, dim), '([K,] D)')
    if not K:
        dt, B, A = dt.unsqueeze(2), B.unsqueeze(2), A.unsqueeze(0)
        C = None if C is None else C.unsqueeze(2)
        dt_weight, dt_bias = dt_weight.unsqueeze(0), dt_bias.unsqueeze(0)
        D = None if D is None else D.unsqueeze(0)
    height = width = 0
    if isinstance(order, tuple):
        height, width = _check_sides(op, order, length, dt.shape[2])
        order = None
    elif order is not None:
        check_tensor(op, 'order', order)
        if order.dtype not in INTEGERS:
            raise TypeError(f"{op}: order has dtype {order.dtype}, expected one of {', '.join(map(str, INTEGERS))}")
        full = (batch, dt.shape[2], length)
        if order.dim() not in (1, 2, 3) or tuple(order.shape) != full[3 - order.dim():]:
            raise ValueError(f'{op}: order has shape {tuple(order.shape)}, expected (L,), (K, L) or '
                             f'(batch, K, L) with (batch, K, L) = {full}')
        if order.device != x.device:
            raise ValueError(f'{op}: tensors must be on one device, got x on {x.device}, '
                             f'order on {order.device}')
    return ops.selective_scan(x, dt, A, B, C, dt_weight, dt_bias, D, order, height, width)[0]


def _check_sides(op, order, length, directions):
    """``order`` as the sides of a map."""
    if len(order) != 2:
        raise ValueError(f'{op}: order is {order}, expected a tensor, or the height and width of a map')
    height, width = order
    check_integer(op, 'order[0]', height, 1)
    check_integer(op, 'order[1]', width, 1)
    if height * width != length:
        raise ValueError(f'{op}: order is a map of {height} x {width} tokens, but x has {length}')
    if directions not in (2, 4):
        raise ValueError(f'{op}: order is a map, which is walked in 2 or 4 directions, got {directions}')
    return height, width
