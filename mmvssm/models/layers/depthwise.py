import math

import torch
from torch import nn

from mmvssm.kernels import depthwise_conv


class DepthwiseConv(nn.Module):
    """Depthwise 3x3 convolution on channels-last maps (B, H, W, dim); parameters and their
    initialisation are those of ``nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=bias)``."""

    def __init__(self, dim, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 1, 3, 3))
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / 3, 1 / 3)  # fan-in is 9

    def forward(self, x, residual=False, activation=None):
        return depthwise_conv(x, self.weight, self.bias, residual=residual, activation=activation)
