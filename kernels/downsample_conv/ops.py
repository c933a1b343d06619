"""The ``torch.library`` operator: schema, fake, autograd."""
import torch

from .._core.backends import choose
from .._core.eager import backward_caller, caller
from .._core.precision import compute_dtype
from .._core.vjp import no_second_derivative
from .dispatch import BACKENDS

_ARGS = 'Tensor x, Tensor weight, Tensor bias'

lib = torch.library.Library('mmvssm', 'FRAGMENT')
lib.define(f'downsample_conv({_ARGS}) -> Tensor')
lib.define(f'downsample_conv_backward(Tensor grad, Tensor y, {_ARGS}) -> (Tensor, Tensor, Tensor)')


def _forward(x, weight, bias):
    backend = choose('downsample_conv', BACKENDS, x)
    y = backend.run('forward', (x, weight, bias), compute_dtype(x))
    return y.to(x.dtype).contiguous()


def _backward(grad, y, x, weight, bias):
    backend = choose('downsample_conv', BACKENDS, x)
    grads = backend.run('backward', (grad, y, x, weight, bias), compute_dtype(x))
    return tuple(g.to(a.dtype).contiguous() for a, g in zip((x, weight, bias), grads, strict=True))


def _fake(x, weight, bias):
    batch, height, width, dim = x.shape
    return x.new_empty((batch, (height + 1) // 2, (width + 1) // 2, dim))


def _fake_backward(grad, y, x, weight, bias):
    return tuple(a.new_empty(a.shape) for a in (x, weight, bias))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(output, *inputs)


def _autograd(ctx, grad):
    return _call_backward(grad, *ctx.saved_tensors)


lib.impl('downsample_conv', _forward, 'CompositeExplicitAutograd')
lib.impl('downsample_conv_backward', _backward, 'CompositeExplicitAutograd')
torch.library.register_fake('mmvssm::downsample_conv', _fake, lib=lib)
torch.library.register_fake('mmvssm::downsample_conv_backward', _fake_backward, lib=lib)
torch.library.register_autograd('mmvssm::downsample_conv', _autograd, setup_context=_setup_context, lib=lib)
torch.library.register_autograd('mmvssm::downsample_conv_backward', no_second_derivative('downsample_conv'), lib=lib)

_call_backward = backward_caller(torch.ops.mmvssm.downsample_conv_backward, _backward)
#: What :mod:`interface` calls: the operator, or where nothing watches what it does.
downsample_conv = caller(torch.ops.mmvssm.downsample_conv, _forward, _setup_context, _autograd)
