"""What all backbones of this package share: options, freezing, output norms, loading."""
import math
from collections.abc import Mapping, Sequence

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule, PretrainedInit
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint as recompute

from mmvssm.kernels._core.precision import autocast_on

from .checkpoint import read_checkpoint, unwrap, weights_of
from .drop_path import add_branch


class Stage(nn.Module):
    """Blocks at one width, on maps (B, H, W, C), and the downsampling after them, on (B, C, H, W), if any."""

    def __init__(self, blocks, downsample=None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample or nn.Identity()


class VisionSSM(BaseModule):
    """Base of four-stage backbones that work on channels-last maps.

    A subclass gives ``arch_settings`` and ``classifier_prefixes``; its constructor passes on the common arguments,
    builds ``patch_embed`` and ``layers`` (of :class:`Stage`) and calls :meth:`add_output_norms`.
    """

    #: Name to dict(embed_dims, depths, drop_path_rate).
    arch_settings = {}
    #: Names that only the authors' classifiers have: their final norm, then their head.
    classifier_prefixes = ('norm.', 'head.')
    #: Options of torch.compile where ``compile`` says nothing else.
    compile_options = {}

    def __init__(self, arch, in_channels, out_indices, drop_path_rate, d_state, mlp_ratio, with_cp, frozen_stages,
                 norm_eval, compile, init_cfg):
        super().__init__(init_cfg)
        name = type(self).__name__
        if not isinstance(compile, (bool, Mapping)):
            raise ValueError(f'{name}: compile={compile!r}, expected True, False or a dict of options of torch.compile')
        if compile:
            try:
                self.compile(**{**self.compile_options, **({} if compile is True else compile)})
            except TypeError as error:
                raise ValueError(f'{name}: compile={compile!r}, expected options of torch.compile: {error}') from None
        settings = self.parse_arch(arch)
        self.embed_dims, self.depths = settings['embed_dims'], tuple(settings['depths'])
        stages = len(self.depths)
        given, out_indices = out_indices, (out_indices,) if type(out_indices) is int else out_indices
        if isinstance(out_indices, Sequence) and all(type(i) is int for i in out_indices):
            out_indices = tuple(i + stages if i < 0 else i for i in out_indices)
        else:
            out_indices = ()
        if not out_indices or not all(0 <= i < stages for i in out_indices) \
                or list(out_indices) != sorted(set(out_indices)):
            raise ValueError(f'{name}: out_indices={given}, expected increasing stage numbers in '
                             f'0..{stages - 1}')
        self.out_indices = out_indices
        if type(in_channels) is not int or in_channels < 1:
            raise ValueError(f'{name}: in_channels={in_channels!r}, expected a positive integer')
        self.in_channels = in_channels
        rate = settings.get('drop_path_rate', 0.) if drop_path_rate is None else drop_path_rate
        if not isinstance(rate, (int, float)) or not 0 <= rate < 1:
            raise ValueError(f'{name}: drop_path_rate={rate!r}, expected a number in [0, 1)')
        if type(d_state) is not int or not 1 <= d_state <= 256:
            raise ValueError(f'{name}: d_state={d_state!r}, expected an integer in 1..256')
        if not isinstance(mlp_ratio, (int, float)) or not 1 <= mlp_ratio * self.embed_dims < math.inf:
            raise ValueError(f'{name}: mlp_ratio={mlp_ratio!r}, expected a finite number of at least 1 / '
                             'embed_dims')
        # Stages past the last output are not built, so that every parameter takes part in training.
        self.num_stages = out_indices[-1] + 1
        rates = iter(torch.linspace(0, rate, sum(self.depths)).tolist())
        self.drop_path_rates = [[next(rates) for _ in range(depth)] for depth in self.depths]
        if type(frozen_stages) is not int or not -1 <= frozen_stages <= self.num_stages:
            raise ValueError(f'{name}: frozen_stages={frozen_stages!r}, expected -1 (none), 0 (stem) to '
                             f'{self.num_stages} (stem and all stages)')
        self.frozen_stages = frozen_stages
        self.checkpointed_stages = self._stages_with_cp(with_cp)
        self.norm_eval = norm_eval
        #: Channels of each returned map.
        self.out_channels = tuple(self.embed_dims * 2**i for i in out_indices)

    def _stages_with_cp(self, with_cp):
        if isinstance(with_cp, bool):
            return frozenset(range(self.num_stages) if with_cp else ())
        if not isinstance(with_cp, Sequence) or not all(type(i) is int and 0 <= i < self.num_stages for i in with_cp):
            raise ValueError(f'{type(self).__name__}: with_cp={with_cp!r}, expected True, False or a sequence of stage '
                             f'numbers in 0..{self.num_stages - 1}')
        return frozenset(with_cp)

    def parse_arch(self, arch):
        """``arch`` as dict(embed_dims, depths, ...); raises ValueError for what is not one."""
        name = type(self).__name__
        if isinstance(arch, str):
            if arch not in self.arch_settings:
                raise ValueError(f"{name}: arch='{arch}', expected one of "
                                 f'{list(self.arch_settings)} or a dict with embed_dims and depths')
            return self.arch_settings[arch]
        if not isinstance(arch, Mapping) or not {'embed_dims', 'depths'} <= set(arch):
            raise ValueError(f'{name}: arch={arch!r}, expected one of {list(self.arch_settings)} or a dict '
                             'with embed_dims and depths')
        unknown = set(arch) - {'embed_dims', 'depths', 'drop_path_rate'}
        if unknown:
            raise ValueError(f'{name}: arch has unknown keys {sorted(unknown)}, expected embed_dims, depths '
                             'and optionally drop_path_rate')
        dims, depths = arch['embed_dims'], arch['depths']
        if type(dims) is not int or dims < 2 or dims % 2:
            raise ValueError(f"{name}: arch['embed_dims']={dims!r}, expected an even integer: the width of "
                             'the first stage')
        if not isinstance(depths, Sequence) or len(depths) != 4 \
                or not all(type(d) is int and d > 0 for d in depths):
            raise ValueError(f"{name}: arch['depths']={depths!r}, expected 4 positive integers: blocks of each "
                             'stage')
        return arch

    def add_output_norms(self, eps):
        """One fresh LayerNorm per returned stage, named as in the authors' dense models."""
        for i, channels in zip(self.out_indices, self.out_channels, strict=True):
            self.add_module(f'outnorm{i}', nn.LayerNorm(channels, eps=eps))

    def init_weights(self):
        """Fresh weights, or those of ``init_cfg=dict(type='Pretrained', checkpoint=FILE)``.

        Raises:
            FileNotFoundError, ValueError: the file is missing or unreadable.
            RuntimeError: its names or shapes do not fit; every one of them is listed.
        """
        init_cfg = self.init_cfg
        if isinstance(init_cfg, Sequence) and len(init_cfg) == 1:
            init_cfg = init_cfg[0]
        if isinstance(init_cfg, Mapping) and init_cfg.get('type') in ('Pretrained', PretrainedInit):
            self._load_pretrained(**{k: v for k, v in init_cfg.items() if k != 'type'})
        elif init_cfg:
            super().init_weights()
        else:
            self.reset_parameters()
        self._is_init = True

    def _load_pretrained(self, checkpoint=None, prefix='', map_location=None):
        name = type(self).__name__  # map_location is MMEngine's; weights go where the parameters are
        if not checkpoint:
            raise ValueError(f'{name}: init_cfg has checkpoint={checkpoint!r}, expected a file; init_cfg=None '
                             'trains from scratch')
        try:
            weights = read_checkpoint(checkpoint)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; set init_cfg to dict(type='Pretrained', checkpoint=FILE), or to "
                                    'None to train from scratch') from None
        if prefix:
            inner = weights_of(weights)
            weights = {n[len(prefix):].lstrip('.'): t for n, t in inner.items() if n.startswith(prefix)}
            if not weights:
                raise ValueError(f"{name}: init_cfg has prefix='{prefix}', but no name in '{checkpoint}' starts "
                                 f'so; the first are {list(inner)[:3]}')
        print_log(f'{name}: weights from {checkpoint}', logger='current')
        try:
            self.load_state_dict(weights)
        except RuntimeError as error:
            raise RuntimeError(f"checkpoint '{checkpoint}' does not fit: {error}") from None

    def get_layer_depth(self, param_name, prefix=''):
        """How deep a parameter is, for learning rates that decay by layer; MMPretrain's convention.

        The stem has depth 0, blocks count from 1 through all stages, and a downsampling has the depth of the block that
        it feeds. Output norms start fresh where a dense model takes ImageNet weights, so they count as the heads do:
        with the greatest depth, ``num_layers - 1``.

        Args:
            param_name (str): as in ``named_parameters`` of the backbone or of the model around it.
            prefix (str): what the backbone's names start with, e.g. 'backbone.'; other names are of what follows it.
                Default ''.

        Returns:
            tuple[int, int]: the depth and ``num_layers``, the number of different depths.
        """
        depths = self.depths[:self.num_stages]
        num_layers = sum(depths) + 2
        part, *path = param_name.removeprefix(prefix).split('.')
        if not param_name.startswith(prefix) or part not in ('patch_embed', 'layers'):
            return num_layers - 1, num_layers
        if part == 'patch_embed':
            return 0, num_layers
        stage, kind, block = path[:3]
        blocks_before = sum(depths[:int(stage)])
        return blocks_before + 1 + (int(block) if kind == 'blocks' else depths[int(stage)]), num_layers

    def reset_parameters(self):
        """Draw all weights afresh, from PyTorch's generator: linear layers from a truncated normal distribution,
        the rest as each module says."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif hasattr(module, 'reset_ssm_parameters'):
                module.reset_ssm_parameters()
            elif module is not self and hasattr(module, 'reset_parameters'):
                module.reset_parameters()

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        if not prefix:
            weights = dict(unwrap(state_dict))
            state_dict.clear()
            state_dict.update(weights)
        self._to_own_names(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _to_own_names(self, state_dict, prefix):
        """Fit what the authors' classifiers and dense models name differently or have besides. Anything else
        is left alone, for the caller to report."""
        final_norm, head = (prefix + p for p in self.classifier_prefixes)
        last = f'{prefix}outnorm{len(self.depths) - 1}.'
        norms = [name for name in state_dict if name.startswith(f'{prefix}outnorm')]
        if self.out_indices != (len(self.depths) - 1,) and norms and all(name.startswith(last) for name in norms):
            for name in norms:  # of a classifier trained here
                state_dict[final_norm + name[len(last):]] = state_dict.pop(name)
        is_classifier = any(name.startswith((final_norm, head)) for name in state_dict)
        if is_classifier and self.out_indices == (len(self.depths) - 1,):  # its norm is our only output's
            for name in [n for n in state_dict if n.startswith(final_norm)]:
                state_dict[f'{prefix}outnorm{self.out_indices[0]}.{name[len(final_norm):]}'] = \
                    state_dict.pop(name)
        not_built = [f'{prefix}outnorm{i}.' for i in range(len(self.depths)) if i not in self.out_indices]
        not_built += [f'{prefix}layers.{i}.' for i in range(self.num_stages, len(self.depths))]
        not_built += [f'{prefix}layers.{self.num_stages - 1}.downsample.']
        not_built += [final_norm, head]
        dropped = [name for name in state_dict if name.startswith(tuple(not_built))]
        for name in dropped:
            del state_dict[name]
        fresh = []
        if is_classifier:
            # Not this module's state_dict(), which FSDP allows for the whole model only.
            own = {f'{prefix}outnorm{i}.{name}': value for i in self.out_indices
                   for name, value in getattr(self, f'outnorm{i}').named_parameters()}
            fresh = [name for name in own if name not in state_dict]
            for name in fresh:
                state_dict[name] = own[name].detach()
        for what, names in (('not used', dropped), ('kept as initialised', fresh)):
            if names:
                print_log(f"{type(self).__name__}: {what}: {', '.join(names)}", logger='current')

    def train(self, mode=True):
        """As ``nn.Module.train``, keeping frozen stages (and with ``norm_eval`` all BatchNorms) in eval mode.
        Returns self."""
        super().train(mode)
        frozen = [self.patch_embed] if self.frozen_stages >= 0 else []
        frozen += self.layers[:max(self.frozen_stages, 0)]
        for module in frozen:
            module.eval()
            module.requires_grad_(False)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, x):
        """Image (B, in_channels, H, W) to a tuple of maps (B, C_i, H_i, W_i), one for each of ``out_indices``,
        at 1/4, 1/8, 1/16, 1/32 of the sides, rounded up. The maps are channels-last in memory."""
        self._check_input(x)
        x = self.patch_embed(x.contiguous(memory_format=torch.channels_last))
        outputs = []
        for i, layer in enumerate(self.layers):
            x = x.permute(0, 2, 3, 1)
            x = self.run_blocks(layer.blocks, x, i in self.checkpointed_stages)
            if i in self.out_indices:
                outputs.append(getattr(self, f'outnorm{i}')(x).permute(0, 3, 1, 2))
            x = layer.downsample(x.permute(0, 3, 1, 2))
        return tuple(outputs)

    def run_blocks(self, blocks, x, with_cp):
        """The blocks of one stage, on maps (B, H, W, C). A block leaves it to the next to add its last branch."""
        branch = scale = None
        for block in blocks:
            if with_cp and x.requires_grad:
                x, branch, scale = recompute(block, x, branch, scale, use_reentrant=False)
            else:
                x, branch, scale = block(x, branch, scale)
        return x if branch is None else add_branch(x, branch, scale)

    def _check_input(self, x):
        name, weight = type(self).__name__, next(self.parameters())
        if not isinstance(x, torch.Tensor):
            raise TypeError(f'{name}: input is a {type(x).__name__}, expected a tensor')
        if x.dim() != 4 or x.shape[1] != self.in_channels or 0 in x.shape[2:]:
            raise ValueError(f'{name}: input has shape {tuple(x.shape)}, expected (B, {self.in_channels}, H, W) '
                             f'with H and W at least 1; in_channels={self.in_channels}')
        if not x.is_floating_point():
            raise TypeError(f'{name}: input has dtype {x.dtype}, expected floating point (normalise images '
                            'first)')
        if x.device != weight.device:
            raise ValueError(f'{name}: input is on {x.device}, the weights are on {weight.device}; move one of '
                             'them')
        if x.dtype != weight.dtype and not autocast_on(x):
            raise TypeError(f'{name}: input has dtype {x.dtype}, the weights {weight.dtype}; convert one of '
                            'them or use torch.autocast')
