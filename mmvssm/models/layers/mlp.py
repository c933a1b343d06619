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
        rows = grad.flatten(0, -2)
        grad_weight = rows.t() @ F.gelu(x).flatten(0, -2).to(grad.dtype)
        grad_x = torch.ops.aten.gelu_backward((grad @ weight.to(grad.dtype)).to(x.dtype), x)
        return grad_x, grad_weight.to(weight.dtype), rows.sum(0).to(weight.dtype)


class MLP(nn.Module):
    """Linear, GELU (exact), linear on the last dimension."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        x = self.fc1(x)
        # The compiler recomputes by itself; tracing for FLOPs and export wants plain operations.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
            return _GELULinear.apply(x, self.fc2.weight, self.fc2.bias)
        return self.fc2(self.act(x))
