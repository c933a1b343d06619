"""State fusion in plain PyTorch: what every backend is compared with. Any dtype, any device."""
import torch.nn.functional as F


def state_fusion_reference(h, C, x, D, kernel1, kernel3, kernel5, alpha):
    """See :func:`mmvssm.kernels.state_fusion`."""
    batch, height, width, d_state, dim = h.shape
    maps = h.permute(0, 3, 4, 1, 2).reshape(batch * d_state, dim, height, width)
    fused = 0
    for i, (kernel, dilation) in enumerate(((kernel1, 1), (kernel3, 3), (kernel5, 5))):
        padded = F.pad(maps, (dilation,) * 4, mode='replicate')
        fused = fused + alpha[i] * F.conv2d(padded, kernel, dilation=dilation, groups=dim)
    fused = fused.reshape(batch, d_state, dim, height, width).permute(0, 3, 4, 1, 2)
    return (fused * C.unsqueeze(-1)).sum(3) + x * D
