"""Few groups of parameters for the optimizer, and learning rates that decay by layer."""
from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch.distributed.fsdp import FullyShardedDataParallel

# FSDP puts this into the names of what it wraps.
WRAPPER = '_fsdp_wrapped_module.'
# What MMEngine leaves in a group beside the learning rate and decay that it computed from these.
MULTIPLIERS = ('lr_mult', 'decay_mult')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class MergedOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's constructor with one group for all parameters of the same settings, and layer-wise decay of rates.

    MMEngine makes a group of every parameter, and PyTorch updates a group at a time: hundreds of small launches where
    AdamW needs a few. Here groups with equal settings are one, with their parameters in the order of the model; groups
    at the base learning rate come first, as MMEngine logs the rate of the first. The updates are the same.

    All of MMEngine's ``paramwise_cfg`` works; one entry is new:

    - ``layer_decay_rate`` (float): in (0, 1]; the learning rate of a parameter of the backbone is multiplied by
      ``layer_decay_rate ** (num_layers - 1 - depth)``, where its ``get_layer_depth(name)`` gives the two numbers. What
      follows the backbone has the full rate. MMDetection, MMSegmentation and MMPretrain alike.

    Raises:
        ValueError: ``layer_decay_rate`` is out of range, or there is no backbone with ``get_layer_depth`` or no
            learning rate to multiply; a parameter is met twice without ``bypass_duplicate=True``; or
            ``flat_decay_mult`` is used with FSDP, where every parameter is flat.
    """

    def add_params(self, params, module, prefix='', is_dcn_module=None):
        super().add_params(params, module, prefix, is_dcn_module)
        if prefix:
            return  # a part of the model
        if self.paramwise_cfg.get('flat_decay_mult') is not None \
                and any(isinstance(m, FullyShardedDataParallel) for m in module.modules()):
            raise ValueError('paramwise_cfg: flat_decay_mult does not work with FSDP, whose parameters are all flat; '
                             'use norm_decay_mult and bias_decay_mult')
        names = {parameter: name.replace(WRAPPER, '') for name, parameter in module.named_parameters()}
        if 'layer_decay_rate' in self.paramwise_cfg:
            self._decay_by_layer(params, module, names)
        params[:] = self._merged(params, names)

    def _decay_by_layer(self, groups, model, names):
        rate = self.paramwise_cfg['layer_decay_rate']
        if not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise ValueError(f'paramwise_cfg: layer_decay_rate={rate!r}, expected a number in (0, 1]')
        if self.base_lr is None:
            raise ValueError('paramwise_cfg: layer_decay_rate needs a learning rate to multiply; set '
                             'optim_wrapper.optimizer.lr')
        backbone = getattr(model, 'backbone', None)
        if not hasattr(backbone, 'get_layer_depth'):
            raise ValueError(f'paramwise_cfg: layer_decay_rate needs a backbone with get_layer_depth, which '
                             f'{type(model).__name__} with backbone {type(backbone).__name__} has not; backbones of '
                             'mmvssm and many of MMPretrain do')
        for group in groups:
            parameter, = group['params']
            depth, num_layers = backbone.get_layer_depth(names[parameter], 'backbone.')
            group['lr'] = group.get('lr', self.base_lr) * rate ** (num_layers - 1 - depth)

    def _merged(self, groups, names):
        merged = {}
        for group in groups:
            parameters = group['params']
            settings = dict(lr=self.base_lr, weight_decay=self.base_wd)
            settings.update((key, value) for key, value in group.items() if key not in ('params', *MULTIPLIERS))
            settings = {key: value for key, value in settings.items() if value is not None}
            merged.setdefault(repr(sorted(settings.items())), dict(settings, params=[]))['params'] += parameters
        seen = set()
        for parameter in (parameter for group in merged.values() for parameter in group['params']):
            if parameter in seen:
                raise ValueError(f'paramwise_cfg: parameter {names[parameter]} is in the model more than once; set '
                                 'bypass_duplicate=True')
            seen.add(parameter)
        merged = sorted(merged.values(), key=lambda group: group.get('lr') != self.base_lr)
        for i, group in enumerate(merged):
            settings = ', '.join(f'{key} {value:.4g}' if isinstance(value, float) else f'{key} {value}'
                                 for key, value in group.items() if key != 'params')
            print_log(f'optimizer: group {i} has {len(group["params"])} parameters with {settings}', logger='current')
        return merged
