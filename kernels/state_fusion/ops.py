"""The ``torch.library`` operator: schema, fake, autograd."""
import torch

from .._core.backends import choose
from .._core.precision import compute_dtype, without_autocast
from .._core.vjp import no_second_derivative
from .dispatch import BACKENDS

_ARGS = ', '.join(f'Tensor {name}' for name in 'h C x D kernel1 kernel3 kernel5 alpha'.split())

lib = torch.library.Library('mmvssm', 'FRAGMENT')
lib.define(f'state_fusion({_ARGS}) -> Tensor')
lib.define(f"state_fusion_backward(Tensor grad, {_ARGS}) -> ({', '.join(['Tensor'] * 8)})")


@without_autocast
def _forward(*args):
    h, x = args[0], args[2]
    dtype = compute_dtype(h)
    y = choose('state_fusion', BACKENDS, h).forward(*(a.to(dtype) for a in args))
    return y.to(x.dtype).contiguous()


@without_autocast
def _backward(grad, *args):
    dtype = compute_dtype(args[0])
    grads = choose('state_fusion', BACKENDS, args[0]).backward(grad.to(dtype), *(a.to(dtype) for a in args))
    return tuple(g.to(a.dtype).contiguous() for a, g in zip(args, grads, strict=True))


def _fake(h, C, x, D, kernel1, kernel3, kernel5, alpha):
    return x.new_empty(x.shape)


def _fake_backward(grad, *args):
    return tuple(a.new_empty(a.shape) for a in args)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd(ctx, grad):
    return torch.ops.mmvssm.state_fusion_backward(grad, *ctx.saved_tensors)


lib.impl('state_fusion', _forward, 'CompositeExplicitAutograd')
lib.impl('state_fusion_backward', _backward, 'CompositeExplicitAutograd')
torch.library.register_fake('mmvssm::state_fusion', _fake, lib=lib)
torch.library.register_fake('mmvssm::state_fusion_backward', _fake_backward, lib=lib)
torch.library.register_autograd('mmvssm::state_fusion', _autograd, setup_context=_setup_context, lib=lib)
torch.library.register_autograd('mmvssm::state_fusion_backward', no_second_derivative('state_fusion'), lib=lib)
