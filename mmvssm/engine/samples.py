"""Loading samples: errors name the file, and workers end by SIGTERM only where their parent sent that."""
import contextlib
import functools
import multiprocessing
import os
import re
import signal
import threading
from multiprocessing.util import register_after_fork

import numpy as np
import torch
from mmengine.hooks import Hook
from torch.utils.data import get_worker_info

from .config import TrainingError, one_line

#: Workers of one loader, at most, whose samples are known when they die.
_MOST_WORKERS = 256
#: Seconds after which a worker looks whether its parent is still there.
_LOOK_FOR_PARENT = 5


class NamedItems:
    """A dataset's ``__getitems__``, which loaders call with the indices of a batch.

    A sample that cannot be loaded raises a :class:`SampleError` with its file. In workers it notes what is being
    loaded, for :func:`explain_dead_worker`.

    Args:
        dataset (Dataset): What it loads from.
        name (str): What to call that in messages.
    """

    def __init__(self, dataset, name):
        self.dataset, self.name = dataset, name
        #: The process and the sample of each worker.
        self.loading = torch.zeros(_MOST_WORKERS, 2, dtype=torch.int64).share_memory_()
        reset_sigterm_in_forks()
        heed_parent_in_workers()

    def __call__(self, indices):
        worker = get_worker_info()
        if worker is not None:  # where it was not forked, nothing has said so yet
            heed_parent_only(os.getppid())
        return [self._named(index, worker) for index in indices]

    def _named(self, index, worker):
        noted = worker is not None and worker.id < _MOST_WORKERS and isinstance(index, (int, np.integer))
        if noted:
            self.loading[worker.id] = torch.tensor([os.getpid(), int(index)])
        try:
            return self.load(index)
        except Exception as error:
            file = file_of(self.dataset, index)
            raise SampleError(f'{self.name}: sample {index}, {file}: {one_line(error)}') from error
        finally:
            if noted:
                self.loading[worker.id] = 0

    def load(self, index):
        return self.dataset[index]


class NamedSamplesHook(Hook):
    """Let validation and test load by :class:`NamedItems`; training does by its
    :class:`~mmvssm.engine.seeding.SeededSampler`."""

    def before_train(self, runner):
        self._name(runner.val_loop, 'validation data')

    def before_test(self, runner):
        self._name(runner.test_loop, 'test data')

    @staticmethod
    def _name(loop, name):
        dataset = getattr(getattr(loop, 'dataloader', None), 'dataset', None)
        if dataset is not None and not isinstance(getattr(dataset, '__getitems__', None), NamedItems):
            dataset.__getitems__ = NamedItems(dataset, name)


class SampleError(TrainingError):
    """A sample cannot be loaded; its message is one line.

    From a worker it comes with the worker's traceback, which is kept in ``details``.
    """

    def __init__(self, message):
        self.details = message
        super().__init__(message.strip().splitlines()[-1].removeprefix(f'{__name__}.{type(self).__name__}: '))


def file_of(dataset, index):
    """The image of a sample, and its label map, as far as the dataset tells."""
    try:
        info = dataset.get_data_info(index)
        paths = [path if '://' in path else os.path.abspath(path)
                 for path in (info.get('img_path'), info.get('seg_map_path')) if path]
        return paths[0] + ''.join(f' (label map {path})' for path in paths[1:])
    except Exception:  # of anybody's dataset; that there is no name must not hide the error it is for
        return f'of which {type(dataset).__name__} names no file'


@contextlib.contextmanager
def sample_errors(runner):
    """Within, an error of a worker is logged with its traceback, and the death of one raises what
    :func:`explain_dead_worker` says."""
    try:
        yield
    except SampleError as error:
        runner.logger.error(error.details, exc_info=True)
        raise
    except RuntimeError as error:
        loaders = [getattr(getattr(runner, f'_{split}_loop'), 'dataloader', None) for split in ('train', 'val', 'test')]
        explained = explain_dead_worker(error, *(loader.dataset for loader in loaders if loader is not None))
        if explained is None:
            raise
        raise explained from error


def explain_dead_worker(error, *datasets):
    """A :class:`~mmvssm.engine.config.TrainingError` that says what a worker was loading when it died, or None.

    Args:
        error (RuntimeError): What a loader raised.
        datasets (Dataset): What loaders load from.
    """
    # The cause tells the signal, where that came while the loader waited.
    message = one_line(error.__cause__ if 'DataLoader worker' in str(error.__cause__) else error)
    if 'DataLoader worker' not in message:
        return None
    dead = {int(number) for number in re.findall(r'\d+', message)}
    named = [items for items in (getattr(dataset, '__getitems__', None) for dataset in datasets)
             if isinstance(items, NamedItems)]
    files = [f'{items.name}: sample {index}, {file_of(items.dataset, index)}' for items in named
             for process, index in items.loading.tolist() if process and process in dead]
    loading = f'. It was loading {" and ".join(files)}.' if files else '.'
    return TrainingError(f'{message}{loading} Often memory is short (fewer workers: num_workers of train_dataloader, '
                         'val_dataloader, test_dataloader) or /dev/shm is')


@functools.cache
def reset_sigterm_in_forks():
    """Let forked processes end by SIGTERM as they would without a hook's handler, and threads of theirs that were there
    before :func:`heed_parent_only` leave it to that.

    A handler in Python runs when the interpreter next looks for signals, and a process that has just gone to wait never
    does: the end of a pool, which tells its processes by SIGTERM, would wait for ever. PyTorch starts threads in the
    moment of the fork, if this process has set its number of threads; a signal to the process goes to any that does not
    block it.
    """
    if not hasattr(os, 'register_at_fork'):
        return
    thread = threading.local()

    def block():
        thread.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def restore():
        signal.pthread_sigmask(signal.SIG_SETMASK, thread.mask)

    def restore_in_child():
        if isinstance(getattr(signal.getsignal(signal.SIGTERM), '__self__', None), Hook):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        restore()

    # In the child after what PyTorch has registered before.
    os.register_at_fork(before=block, after_in_parent=restore, after_in_child=restore_in_child)


@functools.cache
def heed_parent_in_workers():
    """Let processes that Python's multiprocessing forks from now on, workers of loaders and pools, call
    :func:`heed_parent_only` before all else.

    PyTorch's own look for the parent begins later, and with whom it finds there: where the parent was killed in
    between, a worker would stay for ever. A pool would wait for ever for what a worker had that another signal ended.
    """
    register_after_fork(heed_parent_only, lambda heed: heed(multiprocessing.parent_process().pid))


@functools.cache
def heed_parent_only(above):
    """Let this worker end by SIGTERM only where the process that uses it sent that, or when the process ``above`` it is
    gone.

    Slurm sends the signal to all processes of a job, and training needs its workers until it has stopped, after the
    iteration or the validation at hand.
    """
    if not hasattr(signal, 'sigtimedwait'):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = multiprocessing.parent_process().pid

    def wait():
        told_by = None
        # Where the parent was killed nobody else ends this process, should it hang.
        while told_by not in (parent, os.getpid()) and os.getppid() == above:
            told = signal.sigtimedwait({signal.SIGTERM}, _LOOK_FOR_PARENT)
            told_by = told and told.si_pid
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
