"""The residual LayerNorm in plain PyTorch: what every backend is compared with."""
import torch.nn.functional as F


def residual_norm_reference(x, weight, bias, branch=None, scale=None, eps=1e-5):
    """See :func:`mmvssm.kernels.residual_norm`."""
    x = residual(x, branch, scale)
    return x, F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def residual(x, branch, scale):
    """``x + scale * branch``."""
    if branch is None:
        return x
    return x + (branch if scale is None else scale.view(-1, *[1] * (x.dim() - 1)) * branch)
