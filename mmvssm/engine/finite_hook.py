"""A hook that stops training at the first loss that is not a number."""
import math

from mmengine.hooks import Hook

from .checkpointing import newest_checkpoint, plain_name
from .config import TrainingError


class FiniteHook(Hook):
    """Stop after the first iteration whose loss is infinite or not a number, and name the losses and weights that are.

    The norm of the gradients, where the config clips them, is judged as well; not under a loss scale, which leaves out
    steps with infinite gradients itself. Looks at what MMEngine has read for the log, so that nothing waits for a GPU.

    Raises:
        TrainingError: A loss is not finite. Checkpoints are left as they are.
    """

    priority = 'LOW'  # after MMEngine's hook for the log, before a checkpoint is saved

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        names = [name for name in outputs or () if 'loss' in name]
        scaler = getattr(runner.optim_wrapper, 'loss_scaler', None)
        if 'train/grad_norm' in runner.message_hub.log_scalars and not (scaler and scaler.is_enabled()):
            names.append('grad_norm')
        values = {name: runner.message_hub.get_scalar(f'train/{name}').current() for name in names}
        wrong = [f'{name}={value}' for name, value in values.items() if not math.isfinite(value)]
        if not wrong:
            return
        weights = [plain_name(name) for name, value in runner.model.named_parameters()
                   if not value.isfinite().all()]
        where = f'; {len(weights)} weights are not finite either, the first of them {weights[0]}' if weights else ''
        newest = newest_checkpoint(runner.work_dir)
        raise TrainingError(
            f'iteration {runner.iter + 1}: {", ".join(wrong)}{where}. Lower optim_wrapper.optimizer.lr, clip gradients '
            'with optim_wrapper.clip_grad.max_norm=1, or with --amp fp16 take bf16'
            + (f'; --resume goes on from {newest}' if newest else ''))
