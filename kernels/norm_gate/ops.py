"""The ``torch.library`` operator: schema, fake, autograd."""
import torch

from .._core.backends import choose
from .._core.precision import compute_dtype, without_autocast
from .._core.vjp import no_second_derivative
from .dispatch import BACKENDS

_ARGS = 'Tensor x, Tensor z, Tensor weight, Tensor bias, float eps'

lib = torch.library.Library('mmvssm', 'FRAGMENT')
lib.define(f'norm_gate({_ARGS}) -> Tensor')
lib.define(f'norm_gate_backward(Tensor grad, {_ARGS}) -> (Tensor, Tensor, Tensor, Tensor)')


@without_autocast
def _forward(x, *args):
    *tensors, eps = (x, *args)
    dtype = compute_dtype(x)
    y = choose('norm_gate', BACKENDS, x).forward(*(t.to(dtype) for t in tensors), eps)
    return y.to(x.dtype).contiguous()


@without_autocast
def _backward(grad, *args):
    *tensors, eps = args
    dtype = compute_dtype(tensors[0])
    grads = choose('norm_gate', BACKENDS, grad).backward(*(t.to(dtype) for t in (grad, *tensors)), eps)
    return tuple(g.to(t.dtype).contiguous() for t, g in zip(tensors, grads, strict=True))


def _fake(x, z, weight, bias, eps):
    return x.new_empty(x.shape)


def _fake_backward(grad, *args):
    return tuple(t.new_empty(t.shape) for t in args[:4])


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, grad):
    return (*torch.ops.mmvssm.norm_gate_backward(grad, *ctx.saved_tensors, ctx.eps), None)


lib.impl('norm_gate', _forward, 'CompositeExplicitAutograd')
lib.impl('norm_gate_backward', _backward, 'CompositeExplicitAutograd')
torch.library.register_fake('mmvssm::norm_gate', _fake, lib=lib)
torch.library.register_fake('mmvssm::norm_gate_backward', _fake_backward, lib=lib)
torch.library.register_autograd('mmvssm::norm_gate', _autograd, setup_context=_setup_context, lib=lib)
torch.library.register_autograd('mmvssm::norm_gate_backward', no_second_derivative('norm_gate'), lib=lib)
