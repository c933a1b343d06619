"""The ``torch.library`` operator: schema, fake, autograd."""
import torch

from .._core.backends import choose
from .._core.precision import compute_dtype
from .._core.vjp import no_second_derivative
from .dispatch import BACKENDS

_ARGS = ('Tensor x, Tensor selected, SymInt height, SymInt width, SymInt[2] shift, str token_order, '
         'bool inverse')

lib = torch.library.Library('mmvssm', 'FRAGMENT')
lib.define(f'quadtree({_ARGS}) -> Tensor')
lib.define(f'quadtree_backward(Tensor grad, {_ARGS}) -> (Tensor, Tensor)')


def _forward(x, *args):
    y = choose('quadtree', BACKENDS, x).run('forward', (x, *args), compute_dtype(x))
    return y.to(x.dtype).contiguous()


def _backward(grad, *args):
    grads = choose('quadtree', BACKENDS, args[0]).run('backward', (grad, *args), compute_dtype(args[0]))
    return tuple(g.to(t.dtype).contiguous() for t, g in zip(args[:2], grads, strict=True))


def _fake(x, selected, *args):
    return x.new_empty(x.shape)


def _fake_backward(grad, x, selected, *args):
    return x.new_empty(x.shape), selected.new_empty(selected.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.height, ctx.width, ctx.shift, ctx.token_order, ctx.inverse = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, grad):
    grads = torch.ops.mmvssm.quadtree_backward(
        grad, *ctx.saved_tensors, ctx.height, ctx.width, ctx.shift, ctx.token_order, ctx.inverse)
    return (*grads, None, None, None, None, None)


lib.impl('quadtree', _forward, 'CompositeExplicitAutograd')
lib.impl('quadtree_backward', _backward, 'CompositeExplicitAutograd')
torch.library.register_fake('mmvssm::quadtree', _fake, lib=lib)
torch.library.register_fake('mmvssm::quadtree_backward', _fake_backward, lib=lib)
torch.library.register_autograd('mmvssm::quadtree', _autograd, setup_context=_setup_context, lib=lib)
torch.library.register_autograd('mmvssm::quadtree_backward', no_second_derivative('quadtree'), lib=lib)
