"""Gradients of a composition of PyTorch operations, recomputed; and where gradients end."""
import torch


def vjp(fn, args, grad):
    """Gradients of ``fn(*args)`` for the cotangent ``grad``: a tensor for every floating-point tensor of
    ``args``, None for the others."""
    # A dispatch mode (FLOP counter, selective checkpointing) runs operators below autograd: switch it on again.
    recording = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with recording, torch.enable_grad():
        leaves = [a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
                  for a in args]
        wanted = [a for a in leaves if isinstance(a, torch.Tensor) and a.requires_grad]
        grads = iter(torch.autograd.grad(fn(*leaves), wanted, grad, materialize_grads=True))
    return [next(grads) if isinstance(a, torch.Tensor) and a.requires_grad else None for a in leaves]


def no_second_derivative(op, instead=None):
    """The autograd formula of the backward of operator ``op``: PyTorch would take the derivative for zero. ``instead``:
    what has it, the reference function unless said."""

    def raises(ctx, *grads):
        has_them = instead or f'{op}_reference'
        raise NotImplementedError(f'{op}: second derivatives are not implemented; {has_them} has them')

    return raises
