"""The ``torch.library`` operator: schema, fake, autograd."""
import torch

from .._core.backends import choose
from .._core.eager import backward_caller, caller
from .._core.precision import compute_dtype
from .._core.vjp import no_second_derivative
from .dispatch import BACKENDS

_ARGS = ', '.join(f'Tensor {name}' for name in 'h C x D kernel1 kernel3 kernel5 alpha'.split())

lib = torch.library.Library('mmvssm', 'FRAGMENT')
lib.define(f'state_fusion({_ARGS}) -> Tensor')
lib.define(f"state_fusion_backward(Tensor grad, {_ARGS}) -> ({', '.join(['Tensor'] * 8)})")


def _forward(*args):
    h, x = args[0], args[2]
    backend = choose('state_fusion', BACKENDS, h)
    y = backend.run('forward', args, compute_dtype(h))
    return y.to(x.dtype).contiguous()


def _backward(grad, *args):
    backend = choose('state_fusion', BACKENDS, args[0])
    grads = backend.run('backward', (grad, *args), compute_dtype(args[0]))
    return tuple(g.to(a.dtype).contiguous() for a, g in zip(args, grads, strict=True))


def _fake(h, C, x, D, kernel1, kernel3, kernel5, alpha):
    return x.new_empty(x.shape)


def _fake_backward(grad, *args):
    return tuple(a.new_empty(a.shape) for a in args)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd(ctx, grad):
    return _call_backward(grad, *ctx.saved_tensors)


lib.impl('state_fusion', _forward, 'CompositeExplicitAutograd')
lib.impl('state_fusion_backward', _backward, 'CompositeExplicitAutograd')
torch.library.register_fake('mmvssm::state_fusion', _fake, lib=lib)
torch.library.register_fake('mmvssm::state_fusion_backward', _fake_backward, lib=lib)
torch.library.register_autograd('mmvssm::state_fusion', _autograd, setup_context=_setup_context, lib=lib)
torch.library.register_autograd('mmvssm::state_fusion_backward', no_second_derivative('state_fusion'), lib=lib)

_call_backward = backward_caller(torch.ops.mmvssm.state_fusion_backward, _backward)
#: What :mod:`interface` calls: the operator, or where nothing watches what it does.
state_fusion = caller(torch.ops.mmvssm.state_fusion, _forward, _setup_context, _autograd)
