import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from mmvssm.kernels.gelu_backward import column_sums, gelu_backward


class _GELULinear(torch.autograd.Function):
    """``linear(gelu(x))`` that keeps ``x`` for backward and computes the GELU again: of an MLP's two widest tensors
    one stays in memory. ``x_bias``, if not None, is the bias that was added last to make ``x``, without its gradient:
    that is computed here, where the gradient of ``x`` is made."""

    @staticmethod
    def forward(ctx, x, x_bias, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows, (of_x, of_x_bias, of_weight, of_bias) = grad.flatten(0, -2), ctx.needs_input_grad
        grad_x = y = grad_x_bias = grad_weight = grad_bias = None
        if of_x or of_x_bias:
            grad_x, y, grad_x_bias = gelu_backward((grad @ weight.to(grad.dtype)).to(x.dtype), x)
        elif of_weight:
            y = F.gelu(x)
        if of_weight:
            grad_weight = (rows.t() @ y.flatten(0, -2).to(grad.dtype)).to(weight.dtype)
        if of_bias:
            grad_bias = column_sums(rows).to(weight.dtype)
        return grad_x, grad_x_bias.to(weight.dtype) if of_x_bias else None, grad_weight, grad_bias


class MLP(nn.Module):
    """Linear, GELU (exact), linear on the last dimension."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        fc1, fc2 = self.fc1, self.fc2
        if not torch.is_grad_enabled() or not self._may_recompute():
            return fc2(self.act(fc1(x)))
        bias = fc1.bias if _is_plain(fc1, nn.Linear) else None
        x = fc1(x) if bias is None else F.linear(x, fc1.weight, bias.detach())
        return _GELULinear.apply(x, bias, fc2.weight, fc2.bias)

    def _may_recompute(self):
        """The compiler recomputes by itself; tracing for FLOPs and export wants plain operations; hooks and modules
        put in place of ours are called."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
            return False
        return _is_plain(self.fc2, nn.Linear) and _is_plain(self.act, nn.GELU) and self.act.approximate == 'none'


def _is_plain(module, kind):
    return type(module) is kind and 'forward' not in module.__dict__ and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
