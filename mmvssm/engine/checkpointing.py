"""Checkpoints that are whole or not there, and the newest of them found again."""
import contextlib
import os
from pathlib import Path

from mmengine.dist import get_world_size, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import find_latest_checkpoint

from .config import TrainingError, UsageError, one_line

#: In the work dir: the checkpoint at which a run was stopped, and from which the next goes on.
STOPPED = 'stopped'
#: What that checkpoint's name begins with.
_STOP = 'stopped_iter'
#: The ending of a file that is being written.
_UNFINISHED = '.unfinished'


class WholeFileBackend(LocalBackend):
    """Local files that are the new ones or those from before, whenever the process or the machine stops."""

    def put(self, obj, filepath):
        write_whole(filepath, obj)


def write_files_whole():
    """Let MMEngine write local files, checkpoints among them, by :class:`WholeFileBackend`."""
    register_backend('local', WholeFileBackend, force=True, prefixes='')


def write_whole(path, data):
    """Write ``data`` (bytes) to the file ``path``, as :class:`WholeFileBackend` says.

    Raises:
        OSError: It cannot be written; what was there before still is.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + _UNFINISHED)
    try:
        with open(unfinished, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def check_work_dir(folder):
    """Raise a :class:`~mmvssm.engine.config.UsageError` unless files can be written to ``folder``; it is made."""
    probe = Path(folder, f'probe-{os.getpid()}')
    try:
        write_whole(probe, b'0')
        probe.unlink()
    except OSError as error:
        raise UsageError(f'--work-dir: cannot write to {os.path.abspath(folder)}: {one_line(error)}') from None


def newest_checkpoint(folder):
    """The checkpoint to go on from in a work dir, or None.

    It is the one that MMEngine's ``last_checkpoint`` names, or where that is not there any more, or a crash left it
    empty, the newest by date.
    """
    named = find_latest_checkpoint(folder)
    found = named and (named if '://' in named else _in(folder, named))
    if found:
        return found
    files = checkpoints_by_date(folder)
    return files[-1] if files else named or None


def checkpoints_by_date(folder):
    """The checkpoints in a work dir that training can go on from, the newest last."""
    files = [file for kind in ('epoch', 'iter', _STOP) for file in Path(folder).glob(f'{kind}_*.pth')]
    return [str(file) for file in sorted(files, key=os.path.getmtime)]


def stopped_checkpoint(folder):
    """The checkpoint at which the last run in a work dir was stopped, unless it has been passed since, or None."""
    marker = Path(folder, STOPPED)
    return _in(folder, marker.read_text().strip()) if marker.is_file() else None


def _in(folder, path):
    """A file that a work dir's marker names, also where the folder was copied or moved; None if it is gone."""
    own = os.path.join(folder, os.path.basename(path))
    return own if os.path.isfile(own) else path if os.path.isfile(path) else None


def where_to_go_on(folder):
    """A sentence for who reads that training has ended early."""
    newest = newest_checkpoint(folder)
    return f'--resume goes on from {newest}' if newest else 'There is no checkpoint yet'


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """MMEngine's ``CheckpointHook``, with the same arguments, that never leaves less than it found.

    An older checkpoint is deleted after the one in its place is written, and weights that are not finite are not
    saved, so that the newest checkpoint is always one to go on from. Together with :func:`write_files_whole` that
    holds for a run that is killed while it saves.

    Raises:
        TrainingError: A checkpoint cannot be written, or has a weight that is not finite.
    """

    #: The epoch and iteration of the checkpoint that is being saved, which MMEngine's runner for FSDP counts again.
    counts = {}

    def before_train(self, runner):
        super().before_train(runner)
        if is_main_process() and os.path.isdir(self.out_dir):
            for unfinished in Path(self.out_dir).glob(f'*.pth{_UNFINISHED}'):  # of a run that was killed
                unfinished.unlink(missing_ok=True)

    def before_save_checkpoint(self, runner, checkpoint):
        checkpoint['meta'].update(self.counts, samples=samples_of(runner))
        buffers = {plain_name(name) for name, _ in runner.model.named_buffers()}
        for name, value in checkpoint['state_dict'].items():
            if name not in buffers and value.is_floating_point() and not value.isfinite().all():
                raise TrainingError(f'weights are not finite any more, the first of them {name}; not saved. '
                                    f'{where_to_go_on(runner.work_dir)}')

    def save_stop(self, runner, **meta):
        """Save within an epoch, for the next run to go on from here; returns the file. ``meta``: more of its meta."""
        name = f'{_STOP}_{runner.iter + 1}.pth'
        path = os.path.join(self.out_dir, name)
        with self._removing_later(runner):
            runner.save_checkpoint(self.out_dir, name, meta=meta, by_epoch=False, backend_args=self.backend_args)
            if is_main_process():
                before = stopped_checkpoint(runner.work_dir)
                for marker in ('last_checkpoint', STOPPED):
                    write_whole(os.path.join(runner.work_dir, marker), path.encode())
                if before and not os.path.samefile(before, path):
                    self.file_backend.remove(before)
        return path

    def _save_checkpoint_with_step(self, runner, step, meta):
        self.counts = {key: meta[key] for key in ('epoch', 'iter')}
        with self._removing_later(runner):
            super()._save_checkpoint_with_step(runner, step, meta)
            stopped = stopped_checkpoint(runner.work_dir)
            if is_main_process() and stopped:  # passed by now
                self.file_backend.remove(stopped)
        self.counts = {}
        if is_main_process():
            Path(runner.work_dir, STOPPED).unlink(missing_ok=True)

    def _save_best_checkpoint(self, runner, metrics):
        self.counts = dict(epoch=runner.epoch, iter=runner.iter)
        with self._removing_later(runner):
            super()._save_best_checkpoint(runner, metrics)
        self.counts = {}

    @contextlib.contextmanager
    def _removing_later(self, runner):
        """Within, files are not removed before everything is saved; those of another run, from which this one went on,
        never."""
        backend = self.file_backend
        if isinstance(backend, _RemovingLater):
            yield
            return
        self.file_backend = _RemovingLater(backend)
        try:
            yield
            kept = {self.last_ckpt, getattr(self, 'best_ckpt_path', None)}
            kept.update(getattr(self, 'best_ckpt_path_dict', {}).values())
        except OSError as error:
            raise TrainingError(f'checkpoint cannot be written: {one_line(error)}. '
                                f'{where_to_go_on(runner.work_dir)}') from error
        finally:
            removals, self.file_backend = self.file_backend.removals, backend
        for remove, path in removals:
            if path in kept or not _same_folder(os.path.dirname(path), self.out_dir):
                continue
            try:
                remove(path)
            except OSError as error:
                runner.logger.warning(f'checkpoint {path} cannot be removed: {one_line(error)}')


def samples_of(runner):
    """What an iteration trains on: processes, and samples of each; None where the loader does not say."""
    loader = runner.train_dataloader
    size = loader.batch_size or getattr(loader.batch_sampler, 'batch_size', None)
    return size and (get_world_size(), size)


def plain_name(name):
    """The name of a parameter or buffer without what DDP and FSDP put into it."""
    return name.removeprefix('module.').replace('_fsdp_wrapped_module.', '')


def _same_folder(first, second):
    return '://' in second or os.path.realpath(first) == os.path.realpath(second)


class _RemovingLater:
    """A file backend that collects what is to be removed."""

    def __init__(self, backend):
        self._backend = backend
        self.removals = []

    def remove(self, path):
        self.removals.append((self._backend.remove, path))

    def rmtree(self, path):
        self.removals.append((self._backend.rmtree, path))

    def __getattr__(self, name):
        return getattr(self._backend, name)
