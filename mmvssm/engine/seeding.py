"""Random numbers that depend on the seed and the place in training alone.

Samples are augmented with the random numbers of their place in the data, and each iteration of a rank has its own for
the model. So it makes no difference whether a run was interrupted, how many workers load its data, or what validation
drew: nothing of it has to be saved.
"""
import random

import numpy as np
import torch
from mmengine.dist import get_dist_info, sync_random_seed
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import Sampler

from .samples import NamedItems

#: What keys begin with, so that samples and iterations never have the same.
_SAMPLE, _ITERATION = 0, 1


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
    sample, nor on what was loaded before.

    Args:
        sampler (dict): Config of the sampler.
        dataset (Dataset): What it samples; loads by :class:`~mmvssm.engine.samples.NamedItems` from now on.
        seed (int, optional): Defaults to a random one that all ranks share.
    """

    def __init__(self, sampler, dataset, seed=None):
        self.seed = sync_random_seed() if seed is None else seed
        self.sampler = DATA_SAMPLERS.build(sampler, default_args=dict(dataset=dataset, seed=self.seed))
        self.dataset = dataset
        self.first = 0
        dataset.__getitems__ = _SeededItems(dataset, 'training data')

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


class _SeededItems(NamedItems):

    def load(self, index):
        if not isinstance(index, _Place):
            return super().load(index)
        seed_generators(_SAMPLE, *index.key)
        return super().load(int(index))
