"""The depthwise convolution in plain PyTorch: what every backend is compared with."""
import torch.nn.functional as F


def depthwise_conv_reference(x, weight, bias=None, residual=False, silu=False):
    """See :func:`mmvssm.kernels.depthwise_conv`."""
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=x.shape[-1]).permute(0, 2, 3, 1)
    y = F.silu(y) if silu else y
    return x + y if residual else y
