"""The ``torch.library`` operator: schema, fake, autograd. Backends are chosen inside, so that a compiled
graph sees one opaque node."""
import torch

from .._core.backends import choose
from .._core.eager import backward_caller, caller
from .._core.precision import compute_dtype
from .._core.vjp import no_second_derivative
from .dispatch import BACKENDS, within_ranks
from .orders import order_of_map

#: Tokens per chunk: backward restarts the recurrence from one stored state per chunk.
CHUNK = 32

_ARGS = ('Tensor x, Tensor dt, Tensor A, Tensor B, Tensor? C, Tensor dt_weight, Tensor dt_bias, Tensor? D, '
         'Tensor? order, SymInt height, SymInt width')

lib = torch.library.Library('mmvssm', 'FRAGMENT')
lib.define(f'selective_scan({_ARGS}) -> (Tensor, Tensor)')
lib.define(f'selective_scan_backward(Tensor grad, {_ARGS}, Tensor states) -> '
           '(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)')


def _check_order(order):
    """Kernels write where ``order`` says. On a GPU the check would have to wait for it, so there is none."""
    if order is None or order.device.type != 'cpu' or order.numel() == 0:
        return
    low, high, length = *(int(t) for t in order.aminmax()), order.shape[-1]
    if low < 0 or high >= length or not torch.zeros(order.shape, dtype=torch.bool).scatter_(
            -1, order.long(), True).all():
        raise ValueError(f'selective_scan: order has tokens from {low} to {high}, expected each of '
                         f'0 to {length - 1} once in a row')


def _order_for(backend, order, height, width, dt):
    """``order``, or where there is a height and width what ``backend`` takes: these, or a table."""
    if not height:
        return order
    return (height, width) if backend.name == 'triton' else order_of_map((height, width), dt.shape[2], dt.device)


def _forward(*args):
    *tensors, order, height, width = args
    _check_order(order)
    x, dt = tensors[:2]
    backend = choose('selective_scan', within_ranks(BACKENDS, dt), x)
    args = *tensors, _order_for(backend, order, height, width, dt)
    y, states = backend.run('forward', args, compute_dtype(x), chunk=CHUNK)
    return y.to(x.dtype).contiguous(), states


def _backward(grad, *args_and_states):
    *tensors, order, height, width, states = args_and_states
    x, dt = tensors[:2]
    backend = choose('selective_scan', within_ranks(BACKENDS, dt), x)
    args = grad, *tensors, _order_for(backend, order, height, width, dt), states
    grads = backend.run('backward', args, compute_dtype(x), chunk=CHUNK)
    return tuple(_empty(x) if a is None else g.to(a.dtype).contiguous() for a, g in zip(tensors, grads, strict=True))


def _empty(x):
    return x.new_empty(0)


def _fake(x, dt, A, B, C, dt_weight, dt_bias, D, order, height, width):
    batch, length, dim = x.shape
    d_state, directions = B.shape[3], dt.shape[2]
    y = x.new_empty((batch, length, dim) if C is not None else (batch, length, d_state, dim))
    states = (batch, directions, -(-length // CHUNK), d_state, dim)
    return y, x.new_empty(states, dtype=compute_dtype(x))


def _fake_backward(grad, x, dt, A, B, C, dt_weight, dt_bias, D, order, height, width, states):
    return tuple(_empty(x) if a is None else a.new_empty(a.shape)
                 for a in (x, dt, A, B, C, dt_weight, dt_bias, D))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.height, ctx.width = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, _grad_states):
    *saved, states = ctx.saved_tensors
    if grad is None:
        return (None,) * 11
    grads = _call_backward(grad, *saved, ctx.height, ctx.width, states)
    return (*(None if a is None else g for a, g in zip(saved[:8], grads, strict=True)), None, None, None)


lib.impl('selective_scan', _forward, 'CompositeExplicitAutograd')
lib.impl('selective_scan_backward', _backward, 'CompositeExplicitAutograd')
torch.library.register_fake('mmvssm::selective_scan', _fake, lib=lib)
torch.library.register_fake('mmvssm::selective_scan_backward', _fake_backward, lib=lib)
torch.library.register_autograd('mmvssm::selective_scan', _autograd, setup_context=_setup_context, lib=lib)
torch.library.register_autograd('mmvssm::selective_scan_backward', no_second_derivative('selective_scan'), lib=lib)

_call_backward = backward_caller(torch.ops.mmvssm.selective_scan_backward, _backward)
#: What :mod:`interface` calls: the operator, or where nothing watches what it does.
selective_scan = caller(torch.ops.mmvssm.selective_scan, _forward, _setup_context, _autograd)
