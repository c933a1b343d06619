"""Training that is told to stop saves where it is, and the next run goes on from there."""
import signal
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from mmengine.dist import all_gather_object, get_dist_info
from mmengine.hooks import CheckpointHook, Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop
from torch.utils.data import DataLoader

from .checkpointing import SafeCheckpointHook, samples_of
from .config import TrainingError
from .samples import reset_sigterm_in_forks
from .seeding import SeededSampler

#: Exit status of a run that was stopped by SIGTERM and can go on: 128 and the signal's number.
STOPPED_STATUS = 128 + signal.SIGTERM


class TrainingStopped(Exception):
    """Training has been stopped from outside, and saved."""


class StopHook(Hook):
    """On SIGTERM, as Slurm sends it before it takes a machine away, save a checkpoint and stop.

    The iteration that runs is finished, and where gradients are accumulated, those up to the next update; of several
    ranks all stop after the same iteration, one or two later, whichever of them got the signal.

    Raises:
        TrainingStopped: After the checkpoint is saved.
    """

    priority = 'LOWEST'

    def __init__(self):
        self.told = self.stopping = False
        self.before = None
        self.group = self.asked = None

    def before_train(self, runner):
        if threading.current_thread() is threading.main_thread():
            reset_sigterm_in_forks()
            self.before = signal.signal(signal.SIGTERM, self._tell)
        if get_dist_info()[1] > 1:
            limit = runner.cfg.get('env_cfg', {}).get('dist_cfg', {}).get('timeout')
            self.group = dist.new_group(backend='gloo', timeout=limit and timedelta(seconds=limit))

    def _tell(self, number, frame):
        self.told = True

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.stopping = self._all_told() or self.stopping
        optimizer = runner.optim_wrapper
        if runner.iter + 1 == runner.max_iters:
            return  # at the end there is nothing to go on with
        if self.stopping and (not isinstance(optimizer, OptimWrapper) or optimizer.should_update()):
            self._stop(runner, batch_idx)

    def after_train(self, runner):
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)

    def _all_told(self):
        """Whether to stop now. Ranks ask one another in the background, and have the answer one iteration later."""
        if self.group is None:
            return self.told
        answer = False
        if self.asked is not None:
            work, told = self.asked
            work.wait()
            answer = bool(told.item())
        told = torch.tensor([int(self.told)])
        self.asked = dist.all_reduce(told, dist.ReduceOp.MAX, group=self.group, async_op=True), told
        return answer

    def _stop(self, runner, batch_idx):
        saving = next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)
        if not isinstance(saving, SafeCheckpointHook):
            raise TrainingStopped(f'stopped by SIGTERM after iteration {runner.iter + 1}; nothing was saved, as the '
                                  'config has no hook for checkpoints')
        path = saving.save_stop(runner, batches=len(runner.train_dataloader), batches_done=batch_idx + 1)
        if self.group is not None:
            dist.barrier(group=self.group)  # a launcher ends all ranks when one exits, and the first is still writing
        raise TrainingStopped(f'stopped by SIGTERM after iteration {runner.iter + 1}; the same command goes on from '
                              f'{path}')


@LOOPS.register_module()
class ResumableEpochLoop(EpochBasedTrainLoop):
    """MMEngine's ``EpochBasedTrainLoop`` that also goes on within an epoch.

    :class:`ResumeHook` tells how far a checkpoint was. What remains of that epoch is loaded by a loader of its own.
    """

    #: Batches of the epoch that the run it goes on from has trained on.
    batches_done = 0

    def run_epoch(self):
        done, self.batches_done = self.batches_done, 0
        if not done:
            return super().run_epoch()
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        for idx, data_batch in enumerate(_without_first(self.dataloader, done), done):
            self.run_iter(idx, data_batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1


class ResumeHook(Hook):
    """Tell a :class:`ResumableEpochLoop` where in an epoch a checkpoint was saved, and samplers the seed of its run."""

    def __init__(self):
        self.meta = {}

    def after_load_checkpoint(self, runner, checkpoint):
        self.meta = checkpoint.get('meta', {})

    def before_train(self, runner):
        places = all_gather_object((runner.epoch, runner.iter))
        if len(set(places)) > 1:
            raise TrainingError('resume: processes start at different places (epoch, iteration), '
                                f'{sorted(set(places))}; all have to see the same --work-dir')
        before, now = self.meta.get('samples'), samples_of(runner)
        if runner.iter and before and now and tuple(before) != now:
            runner.logger.warning(
                'resume: iterations were of {} x {} samples (processes x batch_size) before, and are of {} x {} now; '
                'the learning rate and its schedule are not adapted'.format(*before, *now))
        loader, loop, done = runner.train_dataloader, runner.train_loop, self.meta.get('batches_done', 0)
        batches = len(loader)
        for sampler in (loader.sampler, getattr(loader.batch_sampler, 'sampler', None)):
            if runner.iter and isinstance(sampler, SeededSampler):
                sampler.set_seed(runner.seed)  # that of the checkpoint, which is read after the sampler is built
        if not runner.iter or not done or not isinstance(loop, ResumableEpochLoop):
            return
        if self.meta['batches'] == batches:
            loop.batches_done = done
        else:
            runner.logger.warning(f'resume: the checkpoint was saved after {done} of {self.meta["batches"]} batches of '
                                  f'an epoch, which has {batches} now; the epoch starts again')


class _Rest:
    """The batches of a batch sampler but for the first."""

    def __init__(self, batch_sampler, first):
        self.batch_sampler, self.first = batch_sampler, first

    def __iter__(self):
        batches = iter(self.batch_sampler)
        for _ in range(self.first):
            next(batches)
        yield from batches

    def __len__(self):
        return len(self.batch_sampler) - self.first


def _without_first(loader, count):
    """A loader of what ``loader`` loads, but for the first ``count`` batches."""
    return DataLoader(
        loader.dataset, batch_sampler=_Rest(loader.batch_sampler, count), num_workers=loader.num_workers,
        collate_fn=loader.collate_fn, pin_memory=loader.pin_memory, timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn, prefetch_factor=loader.prefetch_factor,
        multiprocessing_context=loader.multiprocessing_context)
