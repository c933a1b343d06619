"""The ``torch.library`` operator: schema, fake, autograd."""
import torch

from .._core.backends import choose
from .._core.eager import backward_caller, caller
from .._core.precision import compute_dtype
from .._core.vjp import no_second_derivative
from .dispatch import BACKENDS

_ARGS = 'Tensor x, Tensor z, Tensor weight, Tensor bias, float eps'

lib = torch.library.Library('mmvssm', 'FRAGMENT')
lib.define(f'norm_gate({_ARGS}) -> Tensor')
lib.define(f'norm_gate_backward(Tensor grad, {_ARGS}) -> (Tensor, Tensor, Tensor, Tensor)')


def _forward(x, *args):
    backend = choose('norm_gate', BACKENDS, x)
    y = backend.run('forward', (x, *args), compute_dtype(x))
    return y.to(x.dtype).contiguous()


def _backward(grad, *args):
    backend = choose('norm_gate', BACKENDS, args[0])
    grads = backend.run('backward', (grad, *args), compute_dtype(args[0]))
    return tuple(g.to(t.dtype).contiguous() for t, g in zip(args[:4], grads, strict=True))


def _fake(x, z, weight, bias, eps):
    return x.new_empty(x.shape)


def _fake_backward(grad, *args):
    return tuple(t.new_empty(t.shape) for t in args[:4])


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, grad):
    return (*_call_backward(grad, *ctx.saved_tensors, ctx.eps), None)


lib.impl('norm_gate', _forward, 'CompositeExplicitAutograd')
lib.impl('norm_gate_backward', _backward, 'CompositeExplicitAutograd')
torch.library.register_fake('mmvssm::norm_gate', _fake, lib=lib)
torch.library.register_fake('mmvssm::norm_gate_backward', _fake_backward, lib=lib)
torch.library.register_autograd('mmvssm::norm_gate', _autograd, setup_context=_setup_context, lib=lib)
torch.library.register_autograd('mmvssm::norm_gate_backward', no_second_derivative('norm_gate'), lib=lib)

_call_backward = backward_caller(torch.ops.mmvssm.norm_gate_backward, _backward)
#: What :mod:`interface` calls: the operator, or where nothing watches what it does.
norm_gate = caller(torch.ops.mmvssm.norm_gate, _forward, _setup_context, _autograd)
