"""QuadMamba.

Paper: Xie et al., "QuadMamba: Learning Quadtree-based Selective Scan for Visual State Space Model", NeurIPS 2024,
https://arxiv.org/abs/2410.06806. Parameter names follow the authors' checkpoints, which load as they are, those of
older files included.
"""
import math

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import nn

from mmvssm.kernels import (
    from_quadtree,
    residual_norm,
    select_window,
    selective_scan,
    to_quadtree,
    window_scores,
)
from mmvssm.kernels._core.precision import autocast_on, compute_dtype
from mmvssm.kernels.quadtree.interface import check_token_order

from ..layers.backbone import Stage, VisionSSM
from ..layers.depthwise import DepthwiseConv
from ..layers.drop_path import DropPathScale, add_branch
from ..layers.mlp import MLP
from ..layers.ssm import reset_scan_parameters
from . import quad_mamba_block as fused
from .block_function import untouched

LN_EPS = 1e-5
#: Stages with a quadtree scan; the others have a cross scan.
QUADTREE_STAGES = (0, 1)
#: Signs of the shifts (dy, dx) that blocks take in turn.
SHIFT_SIGNS = ((1, 1), (-1, -1), (1, -1), (-1, 1))


class Norm(nn.LayerNorm):
    """LayerNorm over the last dimension before a linear layer: under autocast, in the precision of that."""

    def forward(self, x):
        return self.after(x, None, None)[1]

    def after(self, x, branch, scale):
        """``x + scale * branch`` and its norm."""
        dtype = torch.get_autocast_dtype(x.device.type) if autocast_on(x) and x.dtype != torch.float64 else None
        return residual_norm(x, self.weight, self.bias, branch, scale, self.eps, dtype)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of maps (B, C, H, W); under autocast in float32, as PyTorch's: residuals begin here.
    """

    def forward(self, x):
        dtype = torch.promote_types(x.dtype, torch.float32) if autocast_on(x) else None
        normed = residual_norm(x.permute(0, 2, 3, 1), self.weight, self.bias, eps=self.eps, dtype=dtype)[1]
        return normed.permute(0, 3, 1, 2)


class Numbered(nn.Sequential):
    """Modules in a row under given numbers: the authors' checkpoints count layers without parameters as well."""

    def __init__(self, modules):
        super().__init__()
        for number, module in modules.items():
            self.add_module(str(number), module)


def stem(in_channels, dim):
    """Image (B, in_channels, H, W) to map (B, dim, H/4, W/4), sides rounded up."""
    return Numbered({
        0: nn.Conv2d(in_channels, dim // 2, 3, stride=2, padding=1),
        2: ChannelNorm(dim // 2, eps=LN_EPS),
        4: nn.GELU(),
        5: nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
        7: ChannelNorm(dim, eps=LN_EPS)})


def downsample(dim):
    """Map (B, dim, H, W) to (B, 2 * dim, H/2, W/2), sides rounded up."""
    return Numbered({
        1: nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1),
        3: ChannelNorm(2 * dim, eps=LN_EPS)})


class ScorePredictor(nn.Module):
    """How much a token, (..., dim), wants its window refined: log-probability, (...), float32 or wider."""

    def __init__(self, dim):
        super().__init__()
        self.in_conv = nn.Sequential(Norm(dim, eps=LN_EPS), nn.Linear(dim, dim), nn.GELU())
        self.out_conv = nn.Sequential(nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(),
                                      nn.Linear(dim // 4, 2))

    def forward(self, x):
        scores = self.out_conv(self.in_conv(x))
        return scores.log_softmax(-1, dtype=compute_dtype(scores))[..., 0]


class MultiDirectionSSM(nn.Module):
    """The mixer: selective scans in K directions, each with parameters of its own, summed. Maps (B, H, W, dim) to
    (B, H, W, dim).

    This one scans rows and columns, both ways; see :class:`QuadtreeSSM` for the other.
    """

    directions = 4

    def __init__(self, dim, d_state=1):
        super().__init__()
        K, inner, rank = self.directions, 2 * dim, math.ceil(dim / 16)
        self.rank, self.d_state = rank, d_state
        self.in_proj = nn.Linear(dim, inner, bias=False)
        self.conv2d = DepthwiseConv(inner, bias=False)
        self.x_proj_weight = nn.Parameter(torch.empty(K, rank + 2 * d_state, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(K, inner, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(K, inner))
        self.A_logs = nn.Parameter(torch.empty(K * inner, d_state))
        self.Ds = nn.Parameter(torch.empty(K * inner))
        self.out_norm = Norm(inner, eps=LN_EPS)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def reset_ssm_parameters(self):
        """Initialise what the generic pass over linear layers does not touch."""
        reset_scan_parameters(self.x_proj_weight, self.dt_projs_weight, self.dt_projs_bias, self.A_logs, self.Ds)

    def forward(self, x):
        x = self.conv2d(self.in_proj(x), activation='silu')
        return self.out_proj(self.out_norm(self.mix(x)))

    def mix(self, x):
        """The tokens of a map (B, H, W, inner) with each other."""
        _, height, width, _ = x.shape
        return self.scan(x.flatten(1, 2), (height, width)).unflatten(1, (height, width))

    def scan(self, x, order):
        """Scan a sequence (B, L, inner) in the K directions of ``order``, see ``selective_scan``, and sum."""
        K = self.directions
        dt, B, C = F.linear(x, self.x_proj_weight.flatten(0, 1)).unflatten(-1, (K, -1)).split(
            (self.rank, self.d_state, self.d_state), -1)
        A = -self.A_logs.to(compute_dtype(self.A_logs)).exp()
        return selective_scan(x, dt, A.unflatten(0, (K, -1)), B, C, dt_weight=self.dt_projs_weight,
                              dt_bias=self.dt_projs_bias, D=self.Ds.unflatten(0, (K, -1)), order=order)


class QuadtreeSSM(MultiDirectionSSM):
    """The mixer of the first stages: one learned sequence, scanned both ways. The quarter of the map that the score
    predictor selects is walked by sub-windows (paper, section 3.2).

    In training the window is sampled, from PyTorch's generator; in evaluation the highest score wins.

    Args:
        shift_sign (tuple[int, int], optional): direction (dy, dx) in which the map is rolled by an eighth of its
            height before it is cut into windows. None does not roll it.
    """

    directions = 2

    def __init__(self, dim, d_state=1, shift_sign=None, token_order='released'):
        super().__init__(dim, d_state)
        self.score_predictor = ScorePredictor(2 * dim)
        self.shift_sign = shift_sign or (0, 0)
        self.token_order = token_order

    def shift(self, height):
        """How far (dy, dx) a map of so many rows is rolled."""
        return tuple(sign * (height // 8) for sign in self.shift_sign)

    def scored_shift(self, shift):
        """How far the map whose windows are scored: the authors' code takes that before it is rolled."""
        return shift if self.token_order == 'quadtree' else (0, 0)

    def mix(self, x):
        _, height, width, _ = x.shape
        if torch.compiler.is_compiling() or height % 4 or width % 4:  # compiled code serves maps of all sizes
            x = F.pad(x, (0, 0, 0, -width % 4, 0, -height % 4))
        _, padded_height, padded_width, _ = x.shape
        shift = self.shift(padded_height)
        logits = window_scores(self.score_predictor(x), self.scored_shift(shift))
        selected = select_window(logits, sample=self.training)
        options = dict(shift=shift, token_order=self.token_order)
        sequence = to_quadtree(x, selected, **options)
        sequence = self.scan(sequence, (padded_height, padded_width))
        return from_quadtree(sequence, selected, padded_height, padded_width, **options)[:, :height, :width]


class Block(nn.Module):
    """Mixer and MLP, both residual, on maps (B, H, W, dim)."""

    def __init__(self, dim, mixer, mlp_ratio, drop_path):
        super().__init__()
        self.norm = Norm(dim, eps=LN_EPS)
        self.op = mixer
        self.norm2 = Norm(dim, eps=LN_EPS)
        self.mlp = MLP(dim, int(mlp_ratio * dim))
        self.drop_path = DropPathScale(drop_path)

    def forward(self, x, branch=None, scale=None):
        """``branch``, times ``scale`` (B,), is what the block before has yet to add to ``x``. Returns the same three
        for the block after."""
        of_mixer, of_mlp = self.drop_path(x, 2)
        parameters = None if torch.compiler.is_compiling() else fused.parameters_of(self, x, branch, scale)
        if parameters:
            return *fused.run(self, x, branch, scale, of_mixer, parameters), of_mlp
        x, normed = self.add_and_norm(self.norm, x, branch, scale)
        x, normed = self.add_and_norm(self.norm2, x, self.op(normed), of_mixer)
        return x, self.mlp(normed), of_mlp

    @staticmethod
    def add_and_norm(norm, x, branch, scale):
        """``x`` with the branch, if any, and the norm of that."""
        if type(norm) is Norm and (torch.compiler.is_compiling() or untouched((norm,))):
            return norm.after(x, branch, scale)
        x = x if branch is None else add_branch(x, branch, scale)
        return x, norm(x)


@MODELS.register_module()
class QuadMamba(VisionSSM):
    """QuadMamba backbone (NeurIPS 2024).

    Takes images (B, in_channels, H, W) of any size; returns a tuple of maps (B, C_i, H_i, W_i) at 1/4, 1/8,
    1/16, 1/32 of the sides, rounded up, with C_i = embed_dims * 2**i. Loads the authors' checkpoints,
    classification and dense, as they are: by ``load_state_dict`` or
    ``init_cfg=dict(type='Pretrained', checkpoint=FILE)``.

    In training the windows to refine are sampled from PyTorch's generator, so a seed repeats them; in evaluation
    the highest score wins and equal inputs give equal outputs.

    Args:
        arch (str | dict): 'lite', 'tiny', 'small', 'base', or a dict with ``embed_dims`` (width of the first stage)
            and ``depths`` (blocks of the four stages). Default 'tiny'.
        token_order (str): how the selected window's tokens join the sequence of a quadtree scan. 'released': as in
            the authors' code, which published checkpoints need. 'quadtree': as in the paper, each position has one
            token; see :func:`mmvssm.kernels.to_quadtree`. Default 'released'.
        in_channels (int): channels of the image. Default 3.
        out_indices (Sequence[int]): stages whose maps are returned; later stages are not built.
            Default (0, 1, 2, 3).
        drop_path_rate (float, optional): stochastic depth of the last block, growing linearly from 0. None takes
            the published one: 0.1, 0.1, 0.2, 0.3 for lite, tiny, small, base; 0 for a dict without it.
            Default None.
        d_state (int): states per channel; the publication has 1. Default 1.
        mlp_ratio (float): hidden over outer width of the MLPs. Default 4.0.
        with_cp (bool | Sequence[int]): gradient checkpointing by block: less memory, one more forward. True for all
            stages, or the numbers of some: the first have the largest maps. Default False.
        frozen_stages (int): -1 none, 0 the stem, i > 0 the stem and the first i stages with their
            downsamplings. Default -1.
        norm_eval (bool): keep BatchNorm in eval mode when training; this backbone has none. Default False.
        compile (bool | dict): run the backbone under ``torch.compile``, alone in whatever model it is part of; a dict
            holds its options. Each size of images is compiled for itself. Default False.
        init_cfg (dict, optional): MMEngine's initialisation. Default None: the publication's.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Example:
        >>> model = QuadMamba('small').eval()
        >>> [tuple(f.shape) for f in model(torch.rand(1, 3, 224, 224))]
        [(1, 96, 56, 56), (1, 192, 28, 28), (1, 384, 14, 14), (1, 768, 7, 7)]
    """

    arch_settings = dict(
        lite=dict(embed_dims=48, depths=(2, 2, 2, 2), drop_path_rate=0.1),
        tiny=dict(embed_dims=64, depths=(2, 2, 2, 2), drop_path_rate=0.1),
        small=dict(embed_dims=96, depths=(2, 2, 5, 2), drop_path_rate=0.2),
        base=dict(embed_dims=96, depths=(2, 2, 15, 2), drop_path_rate=0.3))
    classifier_prefixes = ('classifier.norm.', 'classifier.head.')
    #: PyTorch 2.11 takes more than ten minutes over the sizes of windows as symbols, and with gradients fails.
    compile_options = dict(dynamic=False)

    def __init__(self, arch='tiny', token_order='released', in_channels=3, out_indices=(0, 1, 2, 3),
                 drop_path_rate=None, d_state=1, mlp_ratio=4.0, with_cp=False, frozen_stages=-1, norm_eval=False,
                 compile=False, init_cfg=None):
        super().__init__(arch, in_channels, out_indices, drop_path_rate, d_state, mlp_ratio, with_cp, frozen_stages,
                         norm_eval, compile, init_cfg)
        check_token_order('QuadMamba', token_order)
        self.patch_embed = stem(in_channels, self.embed_dims)
        self.layers = nn.ModuleList()
        for i, rates in enumerate(self.drop_path_rates[:self.num_stages]):
            dim, blocks = self.embed_dims * 2**i, []
            for j, rate in enumerate(rates):
                if i in QUADTREE_STAGES:
                    turn = (sum(self.depths[:i]) + j) // 2 % len(SHIFT_SIGNS)
                    mixer = QuadtreeSSM(dim, d_state, SHIFT_SIGNS[turn] if j % 2 else None, token_order)
                else:
                    mixer = MultiDirectionSSM(dim, d_state)
                blocks.append(Block(dim, mixer, mlp_ratio, rate))
            self.layers.append(Stage(blocks, downsample(dim) if i + 1 < self.num_stages else None))
        self.add_output_norms(LN_EPS)
        self.reset_parameters()
        self.train()

    def run_blocks(self, blocks, x, with_cp):
        if blocks is self.layers[0].blocks and not torch.compiler.is_compiling():
            fused.compile_kernels(self.layers, x)
        return super().run_blocks(blocks, x, with_cp)

    def _to_own_names(self, state_dict, prefix):
        for name in list(state_dict):
            if name.startswith(prefix):
                own = name[len(prefix):].replace('.ln_1.', '.norm.').replace('.self_attention.', '.op.')
                if own.startswith(('norm.', 'head.')):
                    own = f'classifier.{own}'
                state_dict[prefix + own] = state_dict.pop(name)
        super()._to_own_names(state_dict, prefix)
