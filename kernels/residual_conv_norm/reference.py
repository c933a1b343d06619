"""The residual convolution with its norm in plain PyTorch: what every backend is compared with."""
import torch.nn.functional as F


def residual_conv_norm_reference(x, conv_weight, conv_bias, norm_weight, norm_bias, branch=None, scale=None,
                                 eps=1e-5):
    """See :func:`mmvssm.kernels.residual_conv_norm`."""
    if branch is not None:
        x = x + (branch if scale is None else scale[:, None, None, None] * branch)
    conv = F.conv2d(x.permute(0, 3, 1, 2), conv_weight, conv_bias, padding=1, groups=x.shape[-1])
    y = x + conv.permute(0, 2, 3, 1)
    return y, F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, eps)
