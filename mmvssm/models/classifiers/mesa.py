"""MESA: the memory-efficient sharpness-aware loss.

Source: Du et al., "Sharpness-Aware Training for Free", NeurIPS 2022, https://arxiv.org/abs/2205.14083.
"""
import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS

from mmvssm.engine.config import UsageError

from .image_classifier import VisionSSMClassifier


@HOOKS.register_module()
class MESAHook(Hook):
    """Add ``weight * cross_entropy(model(x), softmax(teacher(x)))`` to the loss, late in training.

    The teacher is the averaged model of the run's ``EMAHook``: no copy is made, and what a checkpoint needs for
    resuming is what ``EMAHook`` saves. It sees the same augmented batch in eval mode and gets no gradient. The
    classifier has it during training steps only, so never while ``EMAHook`` has the weights exchanged for an
    evaluation.

    Args:
        weight (float): of the loss.
        begin (float): share of all iterations after which it starts, in [0, 1). Default 0.25.

    Raises:
        ValueError: an argument is out of range.
        UsageError: when training starts, if there is no ``EMAHook`` or the model is no
            :class:`VisionSSMClassifier`.
    """

    def __init__(self, weight, begin=0.25):
        if not isinstance(weight, (int, float)) or not weight > 0:
            raise ValueError(f'MESAHook: weight={weight!r}, expected a positive number')
        if not isinstance(begin, (int, float)) or not 0 <= begin < 1:
            raise ValueError(f'MESAHook: begin={begin!r}, expected a number in [0, 1)')
        self.weight = weight
        self.begin = begin

    def before_train(self, runner):
        self.model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if not isinstance(self.model, VisionSSMClassifier):
            raise UsageError(f'MESAHook: the model is a {type(self.model).__name__}, expected model.type='
                             'VisionSSMClassifier')
        ema_hook = next((hook for hook in runner.hooks if isinstance(hook, EMAHook)), None)
        if ema_hook is None:
            raise UsageError('MESAHook: the config has no EMAHook, whose averaged model is the teacher; add '
                             "dict(type='EMAHook', momentum=0.0001) to custom_hooks, or train without MESA by "
                             '--cfg-options default_hooks.mesa=None')
        self.ema_model = ema_hook.ema_model.eval()

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter >= self.begin * runner.max_iters:
            self.model.teacher, self.model.mesa_weight = self.probabilities, self.weight

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.model.teacher = None

    @torch.no_grad()
    def probabilities(self, inputs):
        """The teacher's class probabilities (B, num_classes) for images (B, C, H, W)."""
        return self.ema_model(inputs).softmax(1)
