"""Random numbers that depend on the seed and the place in training alone.

Samples are augmented with the random numbers of their place in the data, and each iteration of a rank has its own for
the model. So it makes no difference whether a run was interrupted, how many workers load its data, or what validation
drew: nothing of it has to be saved.
"""
import functools
import os
import random
import re
import signal
import threading

import numpy as np
import torch
from mmengine.dist import get_dist_info, sync_random_seed
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import Sampler, get_worker_info

from .config import TrainingError, one_line

#: What keys begin with, so that samples and iterations never have the same.
_SAMPLE, _ITERATION = 0, 1
#: Workers of one loader, at most, whose samples are known when they die.
_MOST_WORKERS = 256
#: Seconds after which a worker looks whether its parent is still there.
_LOOK_FOR_PARENT = 5


def seed_generators(*key):
    """Seed Python's, NumPy's and PyTorch's global generators (CPU, and the current CUDA device if it is in use).

    Args:
        key (int): Numbers that are not negative; equal keys give equal random numbers.
    """
    python, numpy, high, low = (int(word) for word in np.random.SeedSequence(key).generate_state(4))
    random.seed(python)
    np.random.seed(numpy)
    seed = high << 32 | low
    # torch.manual_seed would remember each call for devices that are not in use yet.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


class IterationSeedHook(Hook):
    """Seed the generators for each iteration of training, before its batch goes through the model."""

    priority = 'VERY_HIGH'

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        seed_generators(_ITERATION, runner.seed, runner.rank, runner.iter)


class _Place(int):
    """The index of a sample that carries the key of its random numbers."""

    def __new__(cls, index, key):
        place = super().__new__(cls, index)
        place.key = key
        return place

    def __reduce__(self):  # to the workers
        return _Place, (int(self), self.key)


@DATA_SAMPLERS.register_module()
class SeededSampler(Sampler):
    """Another sampler, whose samples are loaded with random numbers of their own.

    Those depend on the seed, the epoch and the place among the samples of all ranks; not on the worker that loads a
    sample, nor on what was loaded before. A sample that cannot be loaded raises a :class:`SampleError` with its file.

    Args:
        sampler (dict): Config of the sampler.
        dataset (Dataset): What it samples; loads by :class:`_SeededItems` from now on.
        seed (int, optional): Defaults to a random one that all ranks share.
    """

    def __init__(self, sampler, dataset, seed=None):
        self.seed = sync_random_seed() if seed is None else seed
        self.sampler = DATA_SAMPLERS.build(sampler, default_args=dict(dataset=dataset, seed=self.seed))
        self.dataset = dataset
        self.first = 0
        dataset.__getitems__ = _SeededItems(dataset)
        _fork_without_sigterm()

    def __iter__(self):
        rank, ranks = get_dist_info()
        epoch = getattr(self.sampler, 'epoch', 0)
        position, self.first = self.first, 0
        for index in self.sampler:
            # What samplers of videos give is no number.
            yield _Place(index, (self.seed, epoch, position * ranks + rank)) \
                if isinstance(index, (int, np.integer)) else index
            position += 1

    def __len__(self):
        return len(self.sampler)

    def __getattr__(self, name):
        if name == 'sampler':  # not there yet
            raise AttributeError(name)
        return getattr(self.sampler, name)

    def set_seed(self, seed):
        """Take another seed, before samples are drawn."""
        self.seed = self.sampler.seed = seed

    @property
    def skip(self):
        """Leaves out the first samples of this rank, by their number, where the sampler can do that."""
        skip_samples = self.sampler.skip

        def skip(count):
            skip_samples(count)
            self.first = count

        return skip


class _SeededItems:
    """A dataset's ``__getitems__``, which loaders call with the indices of a batch.

    In workers it notes what is being loaded, for :func:`explain_dead_worker`.
    """

    def __init__(self, dataset):
        self.dataset = dataset
        #: The process and the sample of each worker.
        self.loading = torch.zeros(_MOST_WORKERS, 2, dtype=torch.int64).share_memory_()
        self.ready = False

    def __call__(self, indices):
        worker = get_worker_info()
        if worker is not None and not self.ready:
            self.ready = True
            _heed_parent_only()
        return [self._load(index, worker) for index in indices]

    def _load(self, index, worker):
        if isinstance(index, _Place):
            if worker is not None and worker.id < _MOST_WORKERS:
                self.loading[worker.id] = torch.tensor([os.getpid(), int(index)])
            seed_generators(_SAMPLE, *index.key)
            index = int(index)
        try:
            return self.dataset[index]
        except Exception as error:
            raise SampleError(f'training data: sample {index}, {file_of(self.dataset, index)}: '
                              f'{one_line(error)}') from error


class SampleError(TrainingError):
    """A sample cannot be loaded; its message is one line.

    From a worker it comes with the worker's traceback, which is kept in ``details``.
    """

    def __init__(self, message):
        self.details = message
        super().__init__(message.strip().splitlines()[-1].removeprefix(f'{__name__}.{type(self).__name__}: '))


def file_of(dataset, index):
    """The image of a sample as far as the dataset tells."""
    try:
        info = dataset.get_data_info(index)
        return os.path.abspath(info.get('img_path') or info['seg_map_path'])
    except Exception:
        return f'of which {type(dataset).__name__} names no file'


def explain_dead_worker(error, dataset):
    """A :class:`~mmvssm.engine.config.TrainingError` that says what a worker was loading when it died, or None.

    Args:
        error (RuntimeError): What a loader raised.
        dataset (Dataset): What it loads from.
    """
    # The cause tells the signal, where that came while the loader waited.
    message = one_line(error.__cause__ if 'DataLoader worker' in str(error.__cause__) else error)
    items = getattr(dataset, '__getitems__', None)
    if 'DataLoader worker' not in message or not isinstance(items, _SeededItems):
        return None
    dead = {int(number) for number in re.findall(r'\d+', message)}
    files = [f'sample {index}, {file_of(dataset, index)}' for process, index in items.loading.tolist()
             if process and process in dead]
    loading = f'training data: {message} It was loading {" and ".join(files)}.' if files else message
    loader = 'train_dataloader' if files else 'train_dataloader, val_dataloader'
    return TrainingError(f'{loading} Often memory is short (fewer workers: num_workers of {loader}) or /dev/shm is')


@functools.cache
def _fork_without_sigterm():
    """Let threads of a forked process that were there before :func:`_heed_parent_only` leave SIGTERM to it.

    PyTorch starts some in the moment of the fork, if this process has set its number of threads. A signal to the
    process goes to any thread that does not block it.
    """
    if not hasattr(signal, 'sigtimedwait'):
        return
    thread = threading.local()

    def block():
        thread.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def restore():
        signal.pthread_sigmask(signal.SIG_SETMASK, thread.mask)

    # In the child after what PyTorch has registered before.
    os.register_at_fork(before=block, after_in_parent=restore, after_in_child=restore)


def _heed_parent_only():
    """Let this process end by SIGTERM only where its parent sent that.

    Slurm sends the signal to all processes of a job, and training needs its workers until it has stopped.
    """
    if not hasattr(signal, 'sigtimedwait'):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = os.getppid()

    def wait():
        told_by = None
        # Where the parent was killed nobody else ends this process, should it hang.
        while told_by not in (parent, os.getpid()) and os.getppid() == parent:
            told = signal.sigtimedwait({signal.SIGTERM}, _LOOK_FOR_PARENT)
            told_by = told and told.si_pid
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def heed_parent_only(loader):
    """Let the workers that ``loader`` will start end by SIGTERM only where this process sent that.

    Those of a :class:`SeededSampler`'s loader do so anyway.
    """
    loader.worker_init_fn = functools.partial(_start_worker, loader.worker_init_fn)
    _fork_without_sigterm()


def _start_worker(init, number):
    _heed_parent_only()
    if init is not None:
        init(number)
