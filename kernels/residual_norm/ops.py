"""The ``torch.library`` operator: schema, fake, autograd."""
import torch

from .._core.backends import choose
from .._core.eager import backward_caller, caller
from .._core.precision import compute_dtype
from .._core.vjp import no_second_derivative
from .dispatch import BACKENDS

_ARGS = 'Tensor x, Tensor? branch, Tensor? scale, Tensor weight, Tensor bias, float eps'

lib = torch.library.Library('mmvssm', 'FRAGMENT')
# The sum is left empty where there is no branch.
lib.define(f'residual_norm({_ARGS}, ScalarType? dtype) -> (Tensor, Tensor)')
# Gradients of x, branch and the two parameters. That of the branch is left empty where it is that of x.
lib.define(f'residual_norm_backward(Tensor grad_y, Tensor grad_n, {_ARGS}) -> (Tensor, Tensor, Tensor, Tensor)')


def _shared(x, branch, scale):
    """Whether ``x`` and ``branch`` have the same gradient, and one tensor does for both."""
    return branch is not None and scale is None and branch.dtype == x.dtype


def _forward(x, branch, *args):
    *args, dtype = args
    backend = choose('residual_norm', BACKENDS, x)
    y, n = backend.run('forward', (x, branch, *args, dtype or x.dtype), compute_dtype(x))
    return x.new_empty(0) if branch is None else y.to(x.dtype).contiguous(), n.to(dtype or x.dtype).contiguous()


def _differentiated(x, branch, scale, weight, bias, eps):
    """The tensors that backward returns gradients for, None where it returns nothing."""
    return x, None if _shared(x, branch, scale) else branch, weight, bias


def _backward(grad_y, grad_n, x, *args):
    backend = choose('residual_norm', BACKENDS, x)
    tensors = _differentiated(x, *args)
    grads = backend.run('backward', (grad_y, grad_n, x, *args), compute_dtype(x), branch_too=tensors[1] is not None)
    return tuple(x.new_empty(0) if t is None else g.to(t.dtype).contiguous()
                 for t, g in zip(tensors, grads, strict=True))


def _fake(x, branch, *args):
    return x.new_empty(0 if branch is None else x.shape), x.new_empty(x.shape, dtype=args[-1] or x.dtype)


def _fake_backward(grad_y, grad_n, x, *args):
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in _differentiated(x, *args))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps, _ = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, grad_y, grad_n):
    x, branch, scale, *norm = ctx.saved_tensors
    grad_x, grad_branch, *grad_norm = _call_backward(grad_y, grad_n, x, branch, scale, *norm, ctx.eps)
    if branch is None:
        grad_branch = None
    elif _shared(x, branch, scale):
        grad_branch = grad_x
    return grad_x, grad_branch, None, *grad_norm, None, None


lib.impl('residual_norm', _forward, 'CompositeExplicitAutograd')
lib.impl('residual_norm_backward', _backward, 'CompositeExplicitAutograd')
torch.library.register_fake('mmvssm::residual_norm', _fake, lib=lib)
torch.library.register_fake('mmvssm::residual_norm_backward', _fake_backward, lib=lib)
torch.library.register_autograd('mmvssm::residual_norm', _autograd, setup_context=_setup_context, lib=lib)
torch.library.register_autograd('mmvssm::residual_norm_backward', no_second_derivative('residual_norm'), lib=lib)

_call_backward = backward_caller(torch.ops.mmvssm.residual_norm_backward, _backward)
#: What :mod:`interface` calls: the operator, or where nothing watches what it does.
residual_norm = caller(torch.ops.mmvssm.residual_norm, _forward, _setup_context, _autograd)
