"""Hooks that refuse a checkpoint which would leave the model with random weights."""
import re
from collections import OrderedDict

from mmengine.hooks import Hook
from mmengine.runner import load_state_dict

from mmvssm.models.layers.backbone import VisionSSM

from .config import UsageError, one_line


class StrictLoadingHook(Hook):
    """Refuse a checkpoint that does not fit, which the Runner would fill up with random weights."""

    def after_load_checkpoint(self, runner, checkpoint):
        try:
            load_state_dict(runner.model, _weights(checkpoint), strict=True)
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
        state = model.state_dict()
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


def _weights(checkpoint):
    """The weights in a checkpoint, named as the Runner reads them."""
    weights = checkpoint.get('state_dict', checkpoint)
    renamed = OrderedDict((re.sub(r'^module\.', '', str(name)), value) for name, value in weights.items())
    renamed._metadata = getattr(weights, '_metadata', OrderedDict())
    return renamed
