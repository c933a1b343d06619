"""The scan with Mamba's interface in plain PyTorch, step by step: what every backend is compared with. Any dtype, any
device, differentiable, slow."""
import torch
import torch.nn.functional as F


def at_step(t, i, dim):
    """``B`` or ``C`` at step ``i`` for each of ``dim`` channels, (B or 1, D, N)."""
    if t.dim() == 2:
        return t.unsqueeze(0)
    if t.dim() == 3:
        t = t.unsqueeze(1)
    return t[..., i].repeat_interleave(dim // t.shape[1], 1)


def selective_scan_fn_reference(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                                return_last_state=False):
    """See :func:`mmvssm.kernels.selective_scan_fn`."""
    batch, dim, length = u.shape
    if delta_bias is not None:
        delta = delta + delta_bias.unsqueeze(-1)
    if delta_softplus:
        delta = F.softplus(delta)
    h, outputs = u.new_zeros(batch, dim, A.shape[1]), [u * 0]
    for i in range(length):
        step, x = delta[:, :, i, None], u[:, :, i, None]
        h = torch.exp(step * A) * h + step * x * at_step(B, i, dim)
        outputs.append((h * at_step(C, i, dim)).sum(2, keepdim=True))
    y = torch.cat(outputs[1:], 2) if length else outputs[0]
    if D is not None:
        y = y + D.unsqueeze(-1) * u
    if z is not None:
        y = y * F.silu(z)
    return (y, h) if return_last_state else y
