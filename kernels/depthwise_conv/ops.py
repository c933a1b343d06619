"""The ``torch.library`` operator: schema, fake, autograd."""
import torch

from .._core.backends import choose
from .._core.eager import backward_caller, caller
from .._core.precision import compute_dtype
from .._core.vjp import no_second_derivative
from .dispatch import BACKENDS

_ARGS = 'Tensor x, Tensor weight, Tensor? bias, bool residual, bool silu'

lib = torch.library.Library('mmvssm', 'FRAGMENT')
lib.define(f'depthwise_conv({_ARGS}) -> Tensor')
lib.define(f'depthwise_conv_backward(Tensor grad, {_ARGS}) -> (Tensor, Tensor, Tensor)')


def _forward(x, weight, bias, residual, silu):
    backend = choose('depthwise_conv', BACKENDS, x)
    y = backend.run('forward', (x, weight, bias, residual, silu), compute_dtype(x))
    return y.to(x.dtype).contiguous()


def _backward(grad, x, weight, bias, residual, silu):
    backend = choose('depthwise_conv', BACKENDS, x)
    grads = backend.run('backward', (grad, x, weight, bias, residual, silu), compute_dtype(x))
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
    grads = _call_backward(grad, x, weight, bias, ctx.residual, ctx.silu)
    return (*grads[:2], None if bias is None else grads[2], None, None)


lib.impl('depthwise_conv', _forward, 'CompositeExplicitAutograd')
lib.impl('depthwise_conv_backward', _backward, 'CompositeExplicitAutograd')
torch.library.register_fake('mmvssm::depthwise_conv', _fake, lib=lib)
torch.library.register_fake('mmvssm::depthwise_conv_backward', _fake_backward, lib=lib)
torch.library.register_autograd('mmvssm::depthwise_conv', _autograd, setup_context=_setup_context, lib=lib)
torch.library.register_autograd('mmvssm::depthwise_conv_backward', no_second_derivative('depthwise_conv'), lib=lib)

_call_backward = backward_caller(torch.ops.mmvssm.depthwise_conv_backward, _backward)
#: What :mod:`interface` calls: the operator, or where nothing watches what it does.
depthwise_conv = caller(torch.ops.mmvssm.depthwise_conv, _forward, _setup_context, _autograd)
