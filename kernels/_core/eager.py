"""Calling an operator from Python at little cost.

PyTorch's dispatcher takes much longer over an operator written in Python than a GPU kernel takes to start, the more so
with gradients. Where nothing watches (no compiler, tracer or dispatch mode, no tensor subclass), the implementation
is called directly, under an ``autograd.Function``.
"""
import torch

_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, torch.dtype)


def is_plain(args):
    """Whether nothing watches a call with these arguments, the first of which is a tensor, and they have memory: on
    the device ``meta`` operators tell shapes."""
    if torch.compiler.is_compiling():
        return False
    return (not args[0].is_meta and torch._C._len_torch_dispatch_stack() == 0 and not torch.jit.is_tracing()
            and not torch._C._are_functorch_transforms_active()
            and all(type(a) in _PLAIN for a in args))


def backward_caller(op, implementation):
    """What calls the backward of an operator: ``implementation`` or, where gradients are recorded or something
    watches, ``op``."""

    def call(*args):
        if not torch.is_grad_enabled() and is_plain(args):
            return implementation(*args)
        return op(*args)

    return call


def caller(op, implementation, setup_context, backward):
    """What calls an operator: ``implementation`` directly, or ``op`` where something watches. ``setup_context`` and
    ``backward`` are those registered with it."""

    class Function(torch.autograd.Function):

        @staticmethod
        def forward(ctx, *args):
            output = implementation(*args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return backward(ctx, *grads)

    def call(*args):
        if not is_plain(args):
            return op(*args)
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            return Function.apply(*args)
        return implementation(*args)

    return call
