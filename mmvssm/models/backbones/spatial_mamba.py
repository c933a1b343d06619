"""Spatial-Mamba.

Paper: Xiao et al., "Spatial-Mamba: Effective Visual State Space Models via Structure-Aware State Fusion",
ICLR 2025, https://arxiv.org/abs/2410.15091. Parameter names follow the authors' checkpoints, which load as
they are.
"""
import math

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import nn

from mmvssm.kernels import downsample_conv, norm_gate, residual_conv_norm, selective_scan, state_fusion
from mmvssm.kernels._core.precision import compute_dtype

from ..layers.backbone import Stage, VisionSSM
from ..layers.depthwise import DepthwiseConv
from ..layers.drop_path import DropPathScale, add_branch
from ..layers.mlp import MLP
from ..layers.ssm import reset_scan_parameters
from . import spatial_mamba_block as fused

LN_EPS = 1e-5


class ConvBN(nn.Sequential):
    """Convolution, then optionally BatchNorm, then optionally ReLU; channels first."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, groups=1, bias=False, norm=True,
                 relu=True):
        super().__init__()
        self.add_module('conv', nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2,
                                          groups=groups, bias=bias))
        if norm:
            self.add_module('norm', nn.BatchNorm2d(out_channels))
        if relu:
            self.add_module('act', nn.ReLU(inplace=True))


class Stem(nn.Module):
    """Image (B, in_channels, H, W) to map (B, dim, H/4, W/4), sides rounded up."""

    def __init__(self, in_channels, dim):
        super().__init__()
        self.conv1 = ConvBN(in_channels, dim // 2, 3, stride=2)
        self.conv2 = nn.Sequential(ConvBN(dim // 2, dim // 2, 3), ConvBN(dim // 2, dim // 2, 3, relu=False))
        self.conv3 = nn.Sequential(ConvBN(dim // 2, 4 * dim, 3, stride=2), ConvBN(4 * dim, dim, 1, relu=False))

    def forward(self, x):
        x = self.conv1(x)
        return self.conv3(x + self.conv2(x))


class Downsample(nn.Module):
    """Map (B, dim, H, W) to (B, 2 * dim, H/2, W/2), sides rounded up."""

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Sequential(
            ConvBN(dim, 8 * dim, 1, bias=True, norm=False),
            ConvBN(8 * dim, 8 * dim, 3, stride=2, groups=8 * dim, bias=True, norm=False),
            ConvBN(8 * dim, 2 * dim, 1, bias=True, relu=False))

    def own_convs(self):
        """The three convolutions, if nobody could tell whether the modules are called: they are the ones made here,
        without hooks. None otherwise."""
        inner = (m for layer in self.conv for name, m in layer.named_children() if name != 'norm')
        modules = [self.conv, *self.conv, *inner]
        if tuple(map(type, modules)) != _OWN or not fused.untouched(modules):
            return None
        convs = modules[4], modules[6], modules[8]
        wide = convs[1].in_channels
        settings = [(c.kernel_size, c.stride, c.padding, c.dilation, c.groups, c.bias is None) for c in convs]
        pointwise = (1, 1), (1, 1), (0, 0), (1, 1), 1, False
        return convs if settings == [pointwise, ((3, 3), (2, 2), (1, 1), (1, 1), wide, False), pointwise] else None

    def forward(self, x):
        convs = self.own_convs()
        if convs is None:
            return self.conv(x)
        widen, shrink, project = convs
        x = F.linear(x.permute(0, 2, 3, 1), widen.weight.flatten(1), widen.bias)
        x = downsample_conv(x, shrink.weight, shrink.bias)
        x = F.linear(x, project.weight.flatten(1), project.bias)
        return self.conv[2].norm(x.permute(0, 3, 1, 2))


#: Types of the modules in a :class:`Downsample`, but for the norm.
_OWN = nn.Sequential, ConvBN, ConvBN, ConvBN, nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.Conv2d


class StateFusion(nn.Module):
    """Weights of the structure-aware state fusion: one depthwise 3x3 kernel per dilation 1, 3, 5."""

    def __init__(self, dim):
        super().__init__()
        self.kernel_3 = nn.Parameter(torch.ones(dim, 1, 3, 3))
        self.kernel_3_1 = nn.Parameter(torch.ones(dim, 1, 3, 3))
        self.kernel_3_2 = nn.Parameter(torch.ones(dim, 1, 3, 3))
        self.alpha = nn.Parameter(torch.ones(3))

    @torch.no_grad()
    def reset_parameters(self):
        for parameter in self.parameters():
            parameter.fill_(1)

    def forward(self, h, C, x, D):
        return state_fusion(h, C, x, D, (self.kernel_3, self.kernel_3_1, self.kernel_3_2), self.alpha)


class StructureAwareSSM(nn.Module):
    """The mixer: a unidirectional selective scan whose states are fused over their 2-D neighbourhood
    (paper, section 3.2). Maps (B, H, W, dim) to (B, H, W, dim)."""

    def __init__(self, dim, d_state=1):
        super().__init__()
        inner, rank = 2 * dim, math.ceil(dim / 16)
        self.rank, self.d_state = rank, d_state
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv2d = DepthwiseConv(inner)
        self.x_proj_weight = nn.Parameter(torch.empty(rank + 2 * d_state, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(inner))
        self.A_logs = nn.Parameter(torch.empty(inner, d_state))
        self.Ds = nn.Parameter(torch.ones(inner))
        self.state_fusion = StateFusion(inner)
        self.out_norm = nn.LayerNorm(inner, eps=LN_EPS)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.reset_ssm_parameters()

    def reset_ssm_parameters(self):
        """Initialise what the generic pass over linear layers does not touch."""
        reset_scan_parameters(self.x_proj_weight, self.dt_projs_weight, self.dt_projs_bias, self.A_logs, self.Ds)

    def forward(self, x):
        batch, height, width, _ = x.shape
        x, z = self.in_proj(x).chunk(2, -1)
        x = self.conv2d(x, activation='silu')
        dt, B, C = F.linear(x, self.x_proj_weight).split((self.rank, self.d_state, self.d_state), -1)
        A = -self.A_logs.to(compute_dtype(self.A_logs)).exp()
        h = selective_scan(x.flatten(1, 2), dt.flatten(1, 2), A, B.flatten(1, 2),
                           dt_weight=self.dt_projs_weight, dt_bias=self.dt_projs_bias)
        y = self.state_fusion(h.unflatten(1, (height, width)), C, x, self.Ds)
        norm = self.out_norm
        return self.out_proj(norm_gate(y, z, norm.weight, norm.bias, norm.eps))


class Block(nn.Module):
    """Positional convolution, mixer, positional convolution, MLP; all residual, on maps (B, H, W, dim)."""

    def __init__(self, dim, d_state, mlp_ratio, drop_path):
        super().__init__()
        self.cpe1 = DepthwiseConv(dim)
        self.ln_1 = nn.LayerNorm(dim, eps=LN_EPS)
        self.self_attention = StructureAwareSSM(dim, d_state)
        self.cpe2 = DepthwiseConv(dim)
        self.ln_2 = nn.LayerNorm(dim, eps=LN_EPS)
        self.mlp = MLP(dim, int(mlp_ratio * dim))
        self.drop_path = DropPathScale(drop_path)

    def forward(self, x, branch=None, scale=None):
        """``branch``, times ``scale`` (B,), is what the block before has yet to add to ``x``. Returns the same three
        for the block after."""
        of_mixer, of_mlp = self.drop_path(x, 2)
        parameters = None if torch.compiler.is_compiling() else fused.parameters_of(self, x, branch, scale)
        if parameters:
            return *fused.run(self, x, branch, scale, of_mixer, parameters), of_mlp
        x, normed = self.convolve(self.cpe1, self.ln_1, x, branch, scale)
        branch = self.self_attention(normed)
        x, normed = self.convolve(self.cpe2, self.ln_2, x, branch, of_mixer)
        return x, self.mlp(normed), of_mlp

    @staticmethod
    def convolve(conv, norm, x, branch, scale):
        """Add the branch, then the convolution; the result and its norm."""
        own = (type(conv), type(norm)) == (DepthwiseConv, nn.LayerNorm)
        if not own or not torch.compiler.is_compiling() and not fused.untouched((conv, norm)):
            x = conv(x if branch is None else add_branch(x, branch, scale), residual=True)
            return x, norm(x)
        return residual_conv_norm(x, conv.weight, conv.bias, norm.weight, norm.bias, branch, scale, norm.eps)


@MODELS.register_module()
class SpatialMamba(VisionSSM):
    """Spatial-Mamba backbone (ICLR 2025).

    Takes images (B, in_channels, H, W) of any size; returns a tuple of maps (B, C_i, H_i, W_i) at 1/4, 1/8,
    1/16, 1/32 of the sides, rounded up, with C_i = embed_dims * 2**i. Loads the authors' checkpoints,
    classification and dense, as they are: by ``load_state_dict`` or
    ``init_cfg=dict(type='Pretrained', checkpoint=FILE)``.

    Args:
        arch (str | dict): 'tiny', 'small', 'base', or a dict with ``embed_dims`` (width of the first stage)
            and ``depths`` (blocks of the four stages). Default 'tiny'.
        in_channels (int): channels of the image. Default 3.
        out_indices (Sequence[int]): stages whose maps are returned; later stages are not built.
            Default (0, 1, 2, 3).
        drop_path_rate (float, optional): stochastic depth of the last block, growing linearly from 0. None takes
            the published one: 0.2, 0.3, 0.5 for tiny, small, base; 0 for a dict without it. Default None.
        d_state (int): states per channel; the publication has 1. Default 1.
        mlp_ratio (float): hidden over outer width of the MLPs. Default 4.0.
        with_cp (bool | Sequence[int]): gradient checkpointing by block: less memory, one more forward. True for all
            stages, or the numbers of some: the first have the largest maps. Default False.
        frozen_stages (int): -1 none, 0 the stem, i > 0 the stem and the first i stages with their
            downsamplings. Default -1.
        norm_eval (bool): keep BatchNorm in eval mode when training. Default False.
        compile (bool | dict): run the backbone under ``torch.compile``, alone in whatever model it is part of; a dict
            holds its options, e.g. ``dict(dynamic=True)``. Default False.
        init_cfg (dict, optional): MMEngine's initialisation. Default None: the publication's.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> model = SpatialMamba('tiny').eval()
        >>> [tuple(f.shape) for f in model(torch.rand(1, 3, 224, 224))]
        [(1, 64, 56, 56), (1, 128, 28, 28), (1, 256, 14, 14), (1, 512, 7, 7)]
    """

    arch_settings = dict(
        tiny=dict(embed_dims=64, depths=(2, 4, 8, 4), drop_path_rate=0.2),
        small=dict(embed_dims=64, depths=(2, 4, 21, 5), drop_path_rate=0.3),
        base=dict(embed_dims=96, depths=(2, 4, 21, 5), drop_path_rate=0.5))

    def __init__(self, arch='tiny', in_channels=3, out_indices=(0, 1, 2, 3), drop_path_rate=None, d_state=1,
                 mlp_ratio=4.0, with_cp=False, frozen_stages=-1, norm_eval=False, compile=False,
                 init_cfg=None):
        super().__init__(arch, in_channels, out_indices, drop_path_rate, d_state, mlp_ratio, with_cp, frozen_stages,
                         norm_eval, compile, init_cfg)
        self.patch_embed = Stem(in_channels, self.embed_dims)
        self.layers = nn.ModuleList()
        for i, rates in enumerate(self.drop_path_rates[:self.num_stages]):
            dim = self.embed_dims * 2**i
            self.layers.append(Stage([Block(dim, d_state, mlp_ratio, rate) for rate in rates],
                                     Downsample(dim) if i + 1 < self.num_stages else None))
        self.add_output_norms(LN_EPS)
        self.reset_parameters()
        self.train()

    def run_blocks(self, blocks, x, with_cp):
        if blocks is self.layers[0].blocks and not torch.compiler.is_compiling():
            fused.compile_kernels(self.layers, x)
        return super().run_blocks(blocks, x, with_cp)
