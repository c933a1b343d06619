"""A hook that names the file whose labels training has no class for."""
import os

from mmengine.hooks import Hook

from .config import TrainingError
from .dataset_config import few
from .segmentation_check import IGNORED


class LabelRangeHook(Hook):
    """Refuse a training batch of MMSegmentation with label maps that have labels without a class.

    The loss would stop at them with an index error that names no file, on a GPU with an assertion of the device.
    Other tasks' batches are not looked at, nor batches of datasets that do not name their classes. Takes about a
    thousandth of a second for each label map of 512x512.
    """

    def before_train(self, runner):
        metainfo = getattr(runner.train_dataloader.dataset, 'metainfo', {})
        self.names = metainfo.get('classes')
        self.shifted = metainfo.get('reduce_zero_label')
        model = runner.model
        while hasattr(model, 'module'):
            model = model.module
        self.ignored = getattr(getattr(model, 'decode_head', None), 'ignore_index', IGNORED)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        samples = data_batch.get('data_samples') if isinstance(data_batch, dict) else None
        if self.names is None or not isinstance(samples, list):
            return
        for sample in samples:
            if 'gt_sem_seg' in sample:
                self._check(sample)

    def _check(self, sample):
        labels = sample.gt_sem_seg.data
        # One class may be all that is not label 0.
        count = max(len(self.names), 2)
        wrong = (labels >= count) & (labels != IGNORED) & (labels != self.ignored)
        if not wrong.any():
            return
        path = os.path.abspath(sample.get('seg_map_path') or sample.get('img_path') or 'unknown')
        shift = '; reduce_zero_label=True: in the file they are greater by 1' if self.shifted else ''
        raise TrainingError(
            f'label map {path} has labels {few(labels[wrong].unique().tolist())}, expected 0 to {count - 1} for '
            f'{few(self.names, most=3)}, or {IGNORED}, which is ignored{shift}')
