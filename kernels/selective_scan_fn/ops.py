"""The ``torch.library`` operator: schema, fake, autograd. ``B`` and ``C`` are (D, N) or (B, G, N, L) here."""
import torch

from .._core.backends import choose
from .._core.eager import backward_caller, caller
from .._core.precision import compute_dtype
from .._core.vjp import no_second_derivative
from .dispatch import BACKENDS, forward_order

#: Steps per chunk: backward restarts the recurrence from one stored state per chunk. A warp of the CUDA kernels takes
#: as many at a time, eight per thread.
CHUNK = 256

_ARGS = ('Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, '
         'bool delta_softplus')

lib = torch.library.Library('mmvssm', 'FRAGMENT')
lib.define(f'selective_scan_fn({_ARGS}) -> (Tensor, Tensor)')
lib.define(f'selective_scan_fn_backward(Tensor grad, {_ARGS}, Tensor states) -> '
           '(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)')


def _forward(u, delta, A, *args):
    backend = choose('selective_scan_fn', forward_order(BACKENDS, u, A.shape[1]), u)
    out, states = backend.run('forward', (u, delta, A, *args), compute_dtype(u), chunk=CHUNK)
    return out.to(u.dtype).contiguous(), states


def _backward(grad, *args):
    backend = choose('selective_scan_fn', BACKENDS, args[0])
    grads = backend.run('backward', (grad, *args), compute_dtype(args[0]), chunk=CHUNK)
    return tuple(args[0].new_empty(0) if a is None else g.to(a.dtype).contiguous()
                 for a, g in zip(args[:8], grads, strict=True))


def _fake(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    batch, dim, length = u.shape
    states = (batch, dim, -(-length // CHUNK) + 1, A.shape[1])
    return u.new_empty(u.shape), u.new_empty(states, dtype=compute_dtype(u))


def _fake_backward(grad, *args):
    return tuple(args[0].new_empty(0 if a is None else a.shape, dtype=(args[0] if a is None else a).dtype)
                 for a in args[:8])


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, _grad_states):
    *tensors, states = ctx.saved_tensors
    if grad is None:
        return (None,) * 9
    grads = _call_backward(grad, *tensors, ctx.delta_softplus, states)
    return (*(None if a is None else g for a, g in zip(tensors, grads, strict=True)), None)


lib.impl('selective_scan_fn', _forward, 'CompositeExplicitAutograd')
lib.impl('selective_scan_fn_backward', _backward, 'CompositeExplicitAutograd')
torch.library.register_fake('mmvssm::selective_scan_fn', _fake, lib=lib)
torch.library.register_fake('mmvssm::selective_scan_fn_backward', _fake_backward, lib=lib)
torch.library.register_autograd('mmvssm::selective_scan_fn', _autograd, setup_context=_setup_context, lib=lib)
torch.library.register_autograd('mmvssm::selective_scan_fn_backward', no_second_derivative('selective_scan_fn'),
                                lib=lib)

_call_backward = backward_caller(torch.ops.mmvssm.selective_scan_fn_backward, _backward)
#: What :mod:`interface` calls: the operator, or where nothing watches what it does.
selective_scan_fn = caller(torch.ops.mmvssm.selective_scan_fn, _forward, _setup_context, _autograd)
