"""MMPretrain's image classifier with what the backbones of this package need."""
import torch.nn.functional as F
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS
from mmpretrain.models import ImageClassifier

from ..layers.checkpoint import unwrap, weights_of

#: What the authors' classifiers have behind the backbone, and what it is called here.
RENAMED = {
    'norm.': 'backbone.outnorm3.', 'classifier.norm.': 'backbone.outnorm3.',
    'head.': 'head.fc.', 'classifier.head.': 'head.fc.'}


@MODELS.register_module()
class VisionSSMClassifier(ImageClassifier):
    """MMPretrain's ``ImageClassifier`` that loads the authors' classification checkpoints as they are and can be
    trained with MESA.

    The arguments are those of ``ImageClassifier``. For the authors' checkpoints the backbone returns its last stage
    alone (``out_indices=(3,)``), whose output norm is the authors' final norm; ``neck`` is a
    ``GlobalAveragePooling`` and ``head`` a ``LinearClsHead``. They load by ``load_state_dict``, MMEngine's
    ``load_checkpoint`` and, with :class:`AuthorsCheckpointHook`, the Runner's ``load_from``; names that do not fit
    are reported as for any other model.
    """

    #: Gives class probabilities (B, num_classes) for the inputs (B, C, H, W) of a training step, or None without
    #: MESA; :class:`MESAHook` sets it, and the weight of the loss.
    teacher, mesa_weight = None, 0.

    def loss(self, inputs, data_samples):
        """The losses of the head and, where there is a teacher, ``loss_mesa``: the mean cross entropy to it."""
        features = self.extract_feat(inputs)
        losses = self.head.loss(features, data_samples)
        if self.teacher is not None:
            losses['loss_mesa'] = self.mesa_weight * F.cross_entropy(self.head(features), self.teacher(inputs))
        return losses

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        if not prefix:
            weights = own_names(state_dict)
            state_dict.clear()
            state_dict.update(weights)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@HOOKS.register_module()
class AuthorsCheckpointHook(Hook):
    """Give the authors' classification checkpoints the shape and names of ours before other hooks see them.

    ``EMAHook`` for one reads ``checkpoint['state_dict']``, which they lack. A checkpoint that has it is left alone.
    """

    priority = 'VERY_HIGH'

    def after_load_checkpoint(self, runner, checkpoint):
        if 'state_dict' not in checkpoint:
            checkpoint['state_dict'] = own_names(checkpoint)


def own_names(checkpoint):
    """The weights in a checkpoint, named as in :class:`VisionSSMClassifier` if the authors' classifiers wrote it.

    What the backbone calls differently is left to the backbone.
    """
    weights = weights_of(checkpoint)
    if any('backbone.' in name for name in weights) or not any('patch_embed.' in name for name in weights):
        return dict(weights)
    named = {}
    for name, value in unwrap(weights).items():
        old = next((old for old in RENAMED if name.startswith(old)), '')
        named[RENAMED.get(old, 'backbone.') + name[len(old):]] = value
    return named
