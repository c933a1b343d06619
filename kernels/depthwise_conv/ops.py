"""The ``torch.library`` operator: schema, fake, autograd."""
import torch

from .._core.backends import choose
from .._core.precision import compute_dtype, without_autocast
from .._core.vjp import no_second_derivative
from .dispatch import BACKENDS

_ARGS = 'Tensor x, Tensor weight, Tensor? bias, bool residual, bool silu'

lib = torch.library.Library('mmvssm', 'FRAGMENT')
lib.define(f'depthwise_conv({_ARGS}) -> Tensor')
lib.define(f'depthwise_conv_backward(Tensor grad, {_ARGS}) -> (Tensor, Tensor, Tensor)')


def _run(step, x, *args):
    return getattr(choose('depthwise_conv', BACKENDS, x), step)(*args)


def _cast(dtype, *tensors):
    return [None if t is None else t.to(dtype) for t in tensors]


@without_autocast
def _forward(x, weight, bias, residual, silu):
    tensors = _cast(compute_dtype(x), x, weight, bias)
    return _run('forward', x, *tensors, residual, silu).to(x.dtype).contiguous()


@without_autocast
def _backward(grad, x, weight, bias, residual, silu):
    tensors = _cast(compute_dtype(x), grad, x, weight, bias)
    grads = _run('backward', x, *tensors, residual, silu)
    return tuple(x.new_empty(0) if a is None else g.to(a.dtype).contiguous()
                 for a, g in zip((x, weight, bias), grads, strict=True))


def _fake(x, weight, bias, residual, silu):
    return x.new_empty(x.shape)


def _fake_backward(grad, x, weight, bias, residual, silu):
    return tuple(x.new_empty(0) if a is None else a.new_empty(a.shape) for a in (x, weight, bias))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.residual, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, grad):
    x, weight, bias = ctx.saved_tensors
    grads = torch.ops.mmvssm.depthwise_conv_backward(grad, x, weight, bias, ctx.residual, ctx.silu)
    return (*grads[:2], None if bias is None else grads[2], None, None)


lib.impl('depthwise_conv', _forward, 'CompositeExplicitAutograd')
lib.impl('depthwise_conv_backward', _backward, 'CompositeExplicitAutograd')
torch.library.register_fake('mmvssm::depthwise_conv', _fake, lib=lib)
torch.library.register_fake('mmvssm::depthwise_conv_backward', _fake_backward, lib=lib)
torch.library.register_autograd('mmvssm::depthwise_conv', _autograd, setup_context=_setup_context, lib=lib)
torch.library.register_autograd('mmvssm::depthwise_conv_backward', no_second_derivative('depthwise_conv'), lib=lib)
