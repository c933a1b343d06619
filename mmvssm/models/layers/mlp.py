import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


class _GELULinear(torch.autograd.Function):
    """``linear(gelu(x))`` that keeps ``x`` for backward and computes the GELU again: of an MLP's two widest tensors
    one stays in memory."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows, (of_x, of_weight, of_bias) = grad.flatten(0, -2), ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if of_x:
            grad_x = torch.ops.aten.gelu_backward((grad @ weight.to(grad.dtype)).to(x.dtype), x)
        if of_weight:
            grad_weight = (rows.t() @ F.gelu(x).flatten(0, -2).to(grad.dtype)).to(weight.dtype)
        if of_bias:
            grad_bias = rows.sum(0).to(weight.dtype)
        return grad_x, grad_weight, grad_bias


class MLP(nn.Module):
    """Linear, GELU (exact), linear on the last dimension."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        x = self.fc1(x)
        if torch.is_grad_enabled() and self._may_recompute():
            return _GELULinear.apply(x, self.fc2.weight, self.fc2.bias)
        return self.fc2(self.act(x))

    def _may_recompute(self):
        """The compiler recomputes by itself; tracing for FLOPs and export wants plain operations; hooks and modules
        put in place of ours are called."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
            return False
        fc2, act = self.fc2, self.act
        return type(fc2) is nn.Linear and type(act) is nn.GELU and not (
            fc2._forward_hooks or fc2._forward_pre_hooks or fc2._backward_hooks or act._forward_hooks
            or act._forward_pre_hooks or act._backward_hooks)
