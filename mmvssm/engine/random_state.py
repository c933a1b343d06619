"""Random numbers of a resumed training go on where its checkpoint left them."""
import random

import numpy as np
import torch
from mmengine.hooks import Hook


def get_random_state():
    """The states of Python's, NumPy's and PyTorch's global generators, for :func:`set_random_state`.

    Returns:
        dict: ``python``, ``numpy``, ``torch`` and ``cuda`` (one state for each device, empty without any), made
            of numbers, strings, plain containers and uint8 tensors, which ``torch.load(..., weights_only=True)``
            reads.
    """
    kind, keys, *rest = np.random.get_state()
    return dict(
        python=random.getstate(),
        numpy=(kind, keys.tolist(), *rest),
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state_all())


def set_random_state(state):
    """Set all global generators as :func:`get_random_state` found them, on the CUDA devices that there are.

    Args:
        state (dict): its tensors may lie on any device.
    """
    random.setstate(state['python'])
    np.random.set_state(state['numpy'])
    torch.set_rng_state(state['torch'].cpu())
    for device, cuda_state in zip(range(torch.cuda.device_count()), state['cuda'], strict=False):
        torch.cuda.set_rng_state(cuda_state.cpu(), device)


class RandomStateHook(Hook):
    """Save random states in checkpoints, and let a resumed training go on from them.

    With equal seeds and settings, a training that is resumed from an iteration of an ``IterBasedTrainLoop`` or from
    the end of an epoch of an ``EpochBasedTrainLoop`` draws the random numbers of one that was not interrupted, if
    ``num_workers=0``; on a CPU, with as many threads, it ends in the same bits. The workers of a data loader have
    random states of their own, which no checkpoint holds: they begin with the seed whenever workers start. With
    workers, the order of the images and the model's random numbers still go on exactly, but augmentations do only
    in epochs without ``persistent_workers``, which start new workers each time anyway.

    Validation takes no part: training goes on after it with the random state from before. So it makes no
    difference that a checkpoint is saved before the validation of its iteration, which a resumed run leaves out.

    A checkpoint has one state for each rank under ``random_states``; for now that of rank 0 alone, which saves it.
    A rank without one starts from the seed again.
    """

    priority = 'VERY_HIGH'

    def __init__(self):
        self.resumed = None  # what training has yet to go on from
        self.paused = None  # that of training, while it is validated

    def before_save_checkpoint(self, runner, checkpoint):
        checkpoint['random_states'] = [self.paused or get_random_state()]

    def after_load_checkpoint(self, runner, checkpoint):
        self.resumed = dict(enumerate(checkpoint.get('random_states', []))).get(runner.rank)

    def before_train(self, runner):
        # A loader draws from its generator when its iteration starts, which a resumed run does once more.
        runner.train_dataloader.generator = torch.Generator().manual_seed(runner.seed + runner.rank)
        if runner.iter == 0:  # loaded to start from, not to resume
            self.resumed = None
        elif self.resumed is None:
            runner.logger.info(f'resume: the checkpoint has no random state of rank {runner.rank}; its random '
                               'numbers start from the seed again')

    def before_train_epoch(self, runner):
        if self.resumed is None:
            return
        loop = runner.train_loop
        if hasattr(loop, 'dataloader_iterator'):
            loop.dataloader_iterator = _Rewound(loop.dataloader_iterator, self.resumed)
        else:
            set_random_state(self.resumed)
        self.resumed = None

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        iterator = getattr(runner.train_loop, 'dataloader_iterator', None)
        if isinstance(iterator, _Rewound):
            runner.train_loop.dataloader_iterator = iterator.iterator

    def before_val(self, runner):
        self.paused = get_random_state()

    def after_val(self, runner):
        set_random_state(self.paused)
        self.paused = None


class _Rewound:
    """An iterator over batches that draws each with the same random state.

    A resumed ``IterBasedTrainLoop`` first passes over the batches that were trained on before, after its last call
    of hooks; the original MMEngine draws them for that. Whichever batch turns out to be the first to train on has
    been drawn with the right state.
    """

    def __init__(self, iterator, state):
        self.iterator = iterator
        self.state = state

    def __next__(self):
        set_random_state(self.state)
        return next(self.iterator)

    def __getattr__(self, name):
        return getattr(self.iterator, name)
