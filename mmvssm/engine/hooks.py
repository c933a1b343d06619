"""Hooks of the command-line tools: they refuse a checkpoint which would leave the model with random weights, and keep
boxes exact under mixed precision."""
import re
from collections import OrderedDict

from mmengine.hooks import Hook
from mmengine.runner import load_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

from mmvssm.models.layers.backbone import VisionSSM

from .config import UsageError, keep_boxes_fp32, one_line


class FloatBoxesHook(Hook):
    """Apply :func:`~mmvssm.engine.config.keep_boxes_fp32` to the model, which some runners build late."""

    def before_run(self, runner):
        keep_boxes_fp32(runner.model)


class StrictLoadingHook(Hook):
    """Refuse a checkpoint that does not fit, which the Runner would fill up with random weights."""

    def after_load_checkpoint(self, runner, checkpoint):
        model, weights = runner.model, _weights(checkpoint)
        try:
            if isinstance(model, FullyShardedDataParallel):  # MMEngine's function would take the wrappers off
                model.load_state_dict(weights)
            else:
                load_state_dict(model, weights, strict=True)
        except RuntimeError as error:
            raise UsageError(f'checkpoint is not one of this model: {one_line(error)}') from None


class PartialLoadingHook(Hook):
    """Refuse a checkpoint to start from that has less than half of the backbone's weights.

    Heads may differ, for other classes. What does not fit is logged.
    """

    def after_load_checkpoint(self, runner, checkpoint):
        model = runner.model
        while hasattr(model, 'module'):
            model = model.module
        given = _weights(checkpoint)
        if isinstance(getattr(model, 'backbone', None), VisionSSM):
            model.backbone._to_own_names(given, 'backbone.')
        state = _whole_state(runner.model)
        own = {name: value.shape for name, value in state.items()
               if not name.endswith('num_batches_tracked')}
        fitting = {name for name, shape in own.items() if getattr(given.get(name), 'shape', None) == shape}
        part, hint = 'model', ''
        if hasattr(model, 'backbone'):
            part, hint = 'backbone', '; to start from the weights of a backbone alone, use pretrained=FILE'
        needed = [name for name in own if part == 'model' or name.startswith('backbone.')]
        found = fitting.intersection(needed)
        if 2 * len(found) < len(needed):
            raise UsageError(f'load_from: {len(found)} of the {len(needed)} weights of the {part} are in the '
                             'checkpoint by name and shape, so it is not one of this model; it has '
                             f'{", ".join(list(given)[:3]) or "none"}{hint}')
        runner.logger.info(f'load_from: {len(fitting)} of the {len(own)} weights of the model are in the '
                           'checkpoint')
        if len(fitting) < len(own):
            fresh = ', '.join(name for name in own if name not in fitting)
            runner.logger.warning(f'load_from: not in the checkpoint or of another shape: {fresh}')
        unused = ', '.join(name for name in given if name not in state)
        if unused:
            runner.logger.warning(f'load_from: not in the model: {unused}')


def _whole_state(model):
    """The weights of a model by name; those of FSDP as a whole."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
            return model.state_dict()
    while hasattr(model, 'module'):
        model = model.module
    return model.state_dict()


def _weights(checkpoint):
    """The weights in a checkpoint, named as the Runner reads them."""
    weights = checkpoint.get('state_dict', checkpoint)
    renamed = OrderedDict((re.sub(r'^module\.', '', str(name)), value) for name, value in weights.items())
    renamed._metadata = getattr(weights, '_metadata', OrderedDict())
    return renamed
