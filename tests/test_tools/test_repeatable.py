"""Training on a CPU: equal seeds give equal bits, and a resumed run ends like one that was never interrupted."""
import multiprocessing
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from tool_testing import ROOT, load_tool, run_log
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mmvssm.engine.checkpointing import newest_checkpoint, stopped_checkpoint
from mmvssm.engine.config import TrainingError
from mmvssm.engine.samples import NamedSamplesHook, SampleError, explain_dead_worker
from mmvssm.engine.seeding import IterationSeedHook, SeededSampler, _Place, seed_generators
from mmvssm.engine.stopping import ResumeHook, StopHook, TrainingStopped
from mmvssm.models.layers.checkpoint import read_checkpoint

train, make_digits = map(load_tool, ('train', 'data/make_digits'))

# The demos' configs with few channels and small pictures, drop path and an averaged model, in two halves of 25
# iterations with a checkpoint and a validation at the end of each.
COMMON = '''
_base_ = '{configs}/{base}'
slim_backbone = dict(
    type='{backbone}', arch=dict(_delete_=True, embed_dims=8, depths=(1, 1, 1, 1)), drop_path_rate=0.2,
    init_cfg=None)
slim_widths = [8, 16, 32, 64]
read_image = dict(type='LoadImageFromFile')
custom_hooks = [dict(type='EMAHook', momentum=0.1)]
'''
BY_ITERATION = '''
train_cfg = dict(max_iters=50, val_interval=25)
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(interval=25))
'''
DETECTION = COMMON + BY_ITERATION + '''
read_annotations = dict(type='LoadAnnotations', with_bbox=True, with_mask=True)
train_pipeline = [
    read_image, read_annotations,
    dict(type='RandomResize', scale=(40, 40), ratio_range=(0.8, 1.2)),
    dict(type='RandomCrop', crop_size=(32, 32), allow_negative_crop=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs')]
val_pipeline = [
    read_image, dict(type='Resize', scale=(32, 32)), read_annotations,
    dict(type='PackDetInputs', meta_keys=('img_id', 'ori_shape', 'img_shape', 'scale_factor'))]
model = dict(
    backbone=slim_backbone,
    neck=dict(in_channels=slim_widths, out_channels=8),
    rpn_head=dict(in_channels=8, feat_channels=8),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=8),
        bbox_head=dict(in_channels=8, fc_out_channels=16),
        mask_roi_extractor=dict(out_channels=8),
        mask_head=dict(in_channels=8, conv_out_channels=8, num_convs=1)),
    train_cfg=dict(rpn_proposal=dict(max_per_img=16), rcnn=dict(sampler=dict(num=8))),
    test_cfg=dict(rpn=dict(max_per_img=16), rcnn=dict(max_per_img=4)))
'''
SEGMENTATION = COMMON + BY_ITERATION + '''
train_pipeline = [
    read_image,
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(32, 32), ratio_range=(1.0, 2.0)),
    dict(type='RandomCrop', crop_size=(32, 32), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs')]
val_pipeline = [read_image, dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
model = dict(
    data_preprocessor=dict(size=(32, 32)),
    backbone=slim_backbone,
    decode_head=dict(in_channels=slim_widths, channels=8),
    auxiliary_head=dict(in_channels=slim_widths[2], channels=8))
'''
CLASSIFICATION = COMMON + '''
train_pipeline = [
    read_image,
    dict(type='RandomResizedCrop', scale=32),
    dict(type='RandAugment', policies='timm_increasing', num_policies=2, total_level=10, magnitude_level=9,
         magnitude_std=0.5),
    dict(type='RandomErasing', erase_prob=0.5, mode='rand'),
    dict(type='PackInputs')]
val_pipeline = [read_image, dict(type='PackInputs')]
train_cfg = dict(max_epochs=10, val_interval=5)
default_hooks = dict(
    logger=dict(interval=5), checkpoint=dict(interval=5), mesa=dict(type='MESAHook', weight=1.0))
model = dict(
    backbone=slim_backbone,
    head=dict(in_channels=64),
    train_cfg=dict(_delete_=True, augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]))
'''
LOADERS = '''
train_dataloader = dict(batch_size=4, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=4, dataset=dict(pipeline=val_pipeline))
'''
#: The base of the config, the rest, and the checkpoints at the end of the halves.
TASKS = dict(
    det=('mask_rcnn_spatialmamba_nano_digits.py', DETECTION, ('iter_25.pth', 'iter_50.pth')),
    seg=('upernet_spatialmamba_nano_digits.py', SEGMENTATION, ('iter_25.pth', 'iter_50.pth')),
    cls=('spatialmamba_nano_digits.py', CLASSIFICATION, ('epoch_5.pth', 'epoch_10.pth')))
CASES = [(task, backbone) for task in TASKS for backbone in ('SpatialMamba', 'QuadMamba')]


@HOOKS.register_module()
class InterruptHook(Hook):
    """Interrupt training as soon as it has saved a checkpoint, as a user would."""

    priority = 'LOWEST'

    def after_train_iter(self, runner, **kwargs):
        self.after_train_epoch(runner)

    def after_train_epoch(self, runner):
        if (Path(runner.work_dir) / 'last_checkpoint').exists():
            raise KeyboardInterrupt


class Case:
    """A task and backbone in a folder: trains with the same seed into a work dir there."""

    def __init__(self, folder, task, backbone):
        base, text, self.checkpoints = TASKS[task]
        self.folder = folder
        self.config = folder / 'config.py'
        self.config.write_text((text + LOADERS).format(configs=ROOT / 'configs', base=base, backbone=backbone))
        assert make_digits.main(
            ['--task', task, '--out', str(folder / 'data'), '--train', '20', '--val', '4', '--size', '32']) == 0

    def train(self, work_dir, *arguments, options=()):
        train.main([
            str(self.config), '--work-dir', str(self.folder / work_dir), '--seed', '3', *arguments, '--cfg-options',
            f'data_root={self.folder / "data"}/', *options])

    def halfway(self, work_dir):
        return self.folder / work_dir / self.checkpoints[0]

    def end(self, work_dir):
        return self.folder / work_dir / self.checkpoints[1]


@pytest.fixture(scope='module', params=CASES, ids='-'.join)
def case(request, tmp_path_factory):
    """A :class:`Case` with one run, in the work dir ``whole``."""
    case = Case(tmp_path_factory.mktemp('repeatable'), *request.param)
    case.train('whole')
    return case


def leaves(value, path=''):
    """All that is in nested containers, by path."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {path: value}
    return {name: leaf for key, item in items for name, leaf in leaves(item, f'{path}/{key}').items()}


def differing(*files):
    """The parts of training's state that differ in two checkpoints by a bit or more."""
    first, second = ({key: value for key, value in read_checkpoint(file).items()
                      if key not in ('meta', 'message_hub')} for file in files)
    assert {'state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers'} <= set(first)
    first, second = leaves(first), leaves(second)
    assert first.keys() == second.keys()
    return [name for name, value in first.items() if not same(value, second[name])]


def same(value, other):
    return torch.equal(value, other) if torch.is_tensor(value) else value == other


def test_interrupted(case):
    with pytest.raises(KeyboardInterrupt):
        case.train('interrupted', options=['default_hooks.interrupt.type=InterruptHook'])
    assert differing(case.halfway('whole'), case.halfway('interrupted')) == []
    assert not case.end('interrupted').exists()
    case.train('interrupted', '--resume')
    assert differing(case.end('whole'), case.end('interrupted')) == []


class Numbers(Dataset):
    """Twelve rows of three numbers, augmented from all three global generators."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return dict(row=torch.full((3,), index / 12) + torch.rand(3) + np.random.rand() + random.random())


class Net(BaseModel):
    """A linear layer and dropout."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, row, mode='loss'):
        return dict(loss=F.dropout(self.linear(row), training=self.training).square().mean())


def run_net(work_dir, by_epoch=False, start=None, num_workers=0, stop_after=None, accumulate=1, seed=0, **loader):
    """Train a :class:`Net` for 12 iterations, 6 an epoch, with a checkpoint after each 6; the weights at the end.

    ``stop_after``: the iteration after which it is told to stop.
    """
    torch.manual_seed(0)
    loop = dict(type='ResumableEpochLoop', max_epochs=2) if by_epoch else dict(type='IterBasedTrainLoop', max_iters=12)
    runner = Runner(
        Net(), str(work_dir), experiment_name=work_dir.name, load_from=start, resume=start is not None,
        randomness=dict(seed=seed),
        train_dataloader=dict(
            dataset=Numbers(), batch_size=2, num_workers=num_workers, collate_fn=dict(type='default_collate'),
            sampler=dict(type='SeededSampler', sampler=dict(type=DefaultSampler if by_epoch else InfiniteSampler)),
            **loader),
        train_cfg=loop,
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01), accumulative_counts=accumulate),
        default_hooks=dict(checkpoint=dict(
            type='SafeCheckpointHook', by_epoch=by_epoch, interval=1 if by_epoch else 6)))
    stop = StopHook()
    stop.after_iter = stop.after_train_iter

    def after_train_iter(runner, batch_idx, data_batch=None, outputs=None):
        stop.told = runner.iter + 1 == stop_after
        stop.after_iter(runner, batch_idx)

    stop.after_train_iter = after_train_iter
    for hook in (IterationSeedHook(), ResumeHook(), stop):
        runner.register_hook(hook)
    try:
        runner.train()
    finally:
        # Workers take 5 seconds each to end when the garbage collector finds them.
        runner.train_dataloader._iterator = runner.train_loop.dataloader_iterator = None
    return runner.model.linear.weight.detach()


class TestResumed:
    """Bit by bit as if it had not been interrupted."""

    WORKERS = dict(num_workers=2, persistent_workers=False)
    KEPT_WORKERS = dict(num_workers=2, persistent_workers=True)

    @pytest.mark.parametrize('options', [
        dict(), KEPT_WORKERS, dict(by_epoch=True), dict(by_epoch=True, **WORKERS), dict(by_epoch=True, **KEPT_WORKERS),
    ], ids=['iterations', 'iterations-kept_workers', 'epochs', 'epochs-workers', 'epochs-kept_workers'])
    def test_from_a_checkpoint(self, tmp_path, options):
        whole = run_net(tmp_path / 'whole', **options)
        halfway = str(tmp_path / 'whole' / ('epoch_1.pth' if 'by_epoch' in options else 'iter_6.pth'))
        assert torch.equal(run_net(tmp_path / 'resumed', start=halfway, **options), whole)

    @pytest.mark.parametrize('workers', [{}, KEPT_WORKERS], ids=['alone', 'kept_workers'])
    @pytest.mark.parametrize('by_epoch', [False, True], ids=['iterations', 'epochs'])
    @pytest.mark.parametrize('iteration', [2, 6, 9])
    def test_from_where_it_was_stopped(self, tmp_path, by_epoch, workers, iteration):
        whole = run_net(tmp_path / 'whole', by_epoch)
        with pytest.raises(TrainingStopped, match=f'after iteration {iteration}; .*/stopped_iter_{iteration}.pth'):
            run_net(tmp_path / 'stopped', by_epoch, stop_after=iteration, **workers)
        path = stopped_checkpoint(tmp_path / 'stopped')
        assert path == newest_checkpoint(tmp_path / 'stopped')
        assert torch.equal(run_net(tmp_path / 'stopped', by_epoch, path, **workers), whole)
        assert stopped_checkpoint(tmp_path / 'stopped') is None
        names = [path.name for path in sorted((tmp_path / 'stopped').glob('*.pth'))]
        assert names == (['epoch_1.pth', 'epoch_2.pth'] if by_epoch else ['iter_12.pth', 'iter_6.pth'])

    def test_stops_behind_an_update(self, tmp_path):
        """Accumulated gradients are in no checkpoint."""
        whole = run_net(tmp_path / 'whole', accumulate=2)
        with pytest.raises(TrainingStopped, match='after iteration 4'):
            run_net(tmp_path / 'stopped', stop_after=3, accumulate=2)
        start = stopped_checkpoint(tmp_path / 'stopped')
        assert torch.equal(run_net(tmp_path / 'stopped', start=start, accumulate=2), whole)

    @pytest.mark.parametrize('by_epoch', [False, True], ids=['iterations', 'epochs'])
    def test_without_a_seed(self, tmp_path, by_epoch):
        """The run draws one, which is that of the run that goes on, too."""
        whole = run_net(tmp_path / 'whole', by_epoch, seed=None)
        halfway = str(tmp_path / 'whole' / ('epoch_1.pth' if by_epoch else 'iter_6.pth'))
        assert torch.equal(run_net(tmp_path / 'resumed', by_epoch, halfway, seed=None), whole)

    def test_forked_processes_heed_their_parent(self, tmp_path, monkeypatch):
        """Those of a pool, which its end tells by SIGTERM, and waits; as it does where another ended one at work."""
        seen = []

        def after_train_iter(hook, runner, batch_idx, **kwargs):
            context = multiprocessing.get_context('fork')
            ready = context.Event()
            process = context.Process(target=wait_to_be_ended, args=(ready,))
            process.start()
            assert ready.wait(60)
            subprocess.run(['kill', '-TERM', str(process.pid)], check=True)
            process.join(1)
            seen.append(process.is_alive())
            process.terminate()
            process.join(60)
            seen.append(process.is_alive())
            process.kill()

        monkeypatch.setattr(IterationSeedHook, 'after_train_iter', after_train_iter)
        with pytest.raises(TrainingStopped):
            run_net(tmp_path / 'run', stop_after=1)
        assert seen == [True, False]

    def test_told_in_the_last_iteration(self, tmp_path):
        """There is nothing left to go on with."""
        run_net(tmp_path / 'run', stop_after=12)
        assert stopped_checkpoint(tmp_path / 'run') is None

    def test_stopped_twice(self, tmp_path):
        """The checkpoint of the first stop goes when that of the second is there."""
        start = None
        for iteration in (2, 4):
            with pytest.raises(TrainingStopped):
                run_net(tmp_path / 'run', start=start, stop_after=iteration)
            start = stopped_checkpoint(tmp_path / 'run')
        assert [path.name for path in (tmp_path / 'run').glob('*.pth')] == ['stopped_iter_4.pth']

    def test_processes_at_different_places(self, tmp_path, monkeypatch):
        monkeypatch.setattr('mmvssm.engine.stopping.all_gather_object', lambda place: [place, (1, 6)])
        with pytest.raises(TrainingError, match=r'\(epoch, iteration\), \[\(0, 0\), \(1, 6\)\]; .* --work-dir'):
            run_net(tmp_path / 'run')

    def test_another_length_starts_the_epoch_again(self, tmp_path):
        with pytest.raises(TrainingStopped):
            run_net(tmp_path / 'run', by_epoch=True, stop_after=8)
        path = stopped_checkpoint(tmp_path / 'run')
        checkpoint = torch.load(path, weights_only=False)
        checkpoint['meta']['batches'] = 5
        torch.save(checkpoint, path)
        run_net(tmp_path / 'run', by_epoch=True, start=path)
        assert 'saved after 2 of 5 batches of an epoch, which has 6 now' in run_log(tmp_path / 'run')

    @pytest.mark.parametrize('before, said', [((1, 2), ''), ((2, 2), 'of 2 x 2 samples .* of 1 x 2 now')],
                             ids=['same', 'other'])
    def test_other_number_of_processes(self, tmp_path, before, said):
        run_net(tmp_path / 'whole')
        path = tmp_path / 'whole' / 'iter_6.pth'
        checkpoint = torch.load(path, weights_only=False)
        assert checkpoint['meta']['samples'] == (1, 2)
        checkpoint['meta']['samples'] = before
        torch.save(checkpoint, path)
        run_net(tmp_path / 'run', start=str(path))
        found = re.search('resume: iterations were .*', run_log(tmp_path / 'run'))
        assert re.search(said, found[0]) if said else not found

    def test_loop_that_draws_what_it_passes_over(self, tmp_path, monkeypatch):
        """As the original MMEngine resumes."""
        whole = run_net(tmp_path / 'whole')
        monkeypatch.setattr('mmengine.runner.loops._InfiniteDataloaderIterator.skip_iter',
                            lambda iterator, count: [next(iterator) for _ in range(count)])
        assert torch.equal(run_net(tmp_path / 'resumed', start=str(tmp_path / 'whole' / 'iter_6.pth')), whole)

    def test_workers_make_no_difference(self, tmp_path):
        assert torch.equal(run_net(tmp_path / 'alone'), run_net(tmp_path / 'workers', **self.KEPT_WORKERS))


class TestSeeds:

    @staticmethod
    def draws():
        return [random.gauss(), np.random.standard_normal(), *torch.rand(3).tolist()]

    def test_keys(self):
        """Equal ones give equal numbers, also behind half a pair of normal numbers; others give others."""
        seen = []
        for key in ((1, 2), (1, 2), (1, 3), (2, 1)):
            self.draws()
            seed_generators(*key)
            seen.append(self.draws())
        assert seen[0] == seen[1]
        assert len({tuple(draws) for draws in seen}) == 3

    @pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no CUDA device')
    def test_cuda(self):
        torch.rand(1, device='cuda')
        numbers = []
        for _ in range(2):
            seed_generators(5)
            numbers.append(torch.rand(3, device='cuda'))
        assert torch.equal(*numbers)

    def test_ranks_share_the_places(self, monkeypatch):
        """Two ranks load what one does, with the same random numbers."""
        def places(rank, ranks):
            for module in ('mmengine.dataset.sampler', 'mmvssm.engine.seeding'):
                monkeypatch.setattr(f'{module}.get_dist_info', lambda: (rank, ranks))
            sampler = SeededSampler(dict(type='DefaultSampler'), Numbers(), seed=0)
            return [(int(place), place.key) for place in sampler]

        one, two = places(0, 1), zip(places(0, 2), places(1, 2), strict=True)
        assert one == [place for pair in two for place in pair]
        assert len({key for _, key in one}) == 12

    def test_numbers_of_numpy(self, monkeypatch):
        sampler = SeededSampler(dict(type='DefaultSampler'), Numbers(), seed=0)
        sampler.sampler = np.arange(3)
        assert [place.key for place in sampler] == [(0, 0, i) for i in range(3)]

    def test_place_through_a_pipe(self):
        place = pickle.loads(pickle.dumps(_Place(3, (1, 2))))
        assert (place, place.key) == (3, (1, 2))


class Broken(Numbers):
    """Sample 5 cannot be loaded: it raises, or ends the process."""

    def __init__(self, end):
        self.end = end

    def __getitem__(self, index):
        if index == 5:
            self.end()
        return super().__getitem__(index)

    def get_data_info(self, index):
        return dict(img_path=f'images/{index}.jpg')


def fail():
    raise OSError('broken\nfile')


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def wait_to_be_ended(ready):
    ready.set()
    time.sleep(300)


def end_by_another():
    """As if Slurm sent the signal to all processes of a job. Often, for any thread might receive it."""
    for _ in range(10):
        subprocess.run(['kill', '-TERM', str(os.getpid())], check=True)
        time.sleep(0.05)


def load(end, workers):
    dataset = Broken(end)
    loader = DataLoader(dataset, 2, sampler=SeededSampler(dict(type='DefaultSampler'), dataset, seed=0),
                        num_workers=workers)
    try:
        return len(list(loader))
    except RuntimeError as error:
        raise explain_dead_worker(error, dataset) from None


@pytest.mark.parametrize('workers', [0, 1])
def test_broken_sample_is_named(workers):
    with pytest.raises(SampleError) as caught:
        load(fail, workers)
    path = os.path.abspath('images/5.jpg')
    assert str(caught.value) == f'training data: sample 5, {path}: OSError: broken file'
    assert workers == 0 or 'Traceback' in caught.value.details


def test_sample_of_a_dead_worker_is_named():
    """In a process of its own: PyTorch raises the error wherever that is when the worker ends, even in callbacks of the
    garbage collector, where it is lost, and other tests have left much to collect."""
    done = subprocess.run([sys.executable, '-c', 'from test_repeatable import *; load(die, 1)'],
                          cwd=os.path.dirname(__file__), capture_output=True, text=True)
    said = done.stderr.splitlines()[-1]
    assert re.search('TrainingError: .*(exited|killed)', said), done.stderr
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'images/5.jpg')
    assert f'It was loading training data: sample 5, {path}. Often memory' in said


@pytest.mark.skipif(not hasattr(signal, 'sigtimedwait'), reason='the system does not tell who sent a signal')
def test_workers_heed_their_parent_only():
    """In a process of its own, whose first number of threads makes PyTorch start one in each fork."""
    code = 'import torch; torch.set_num_threads(2); from test_repeatable import *; assert load(end_by_another, 1) == 6'
    done = subprocess.run([sys.executable, '-c', code], cwd=os.path.dirname(__file__), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('pid, said', [
    (5, '. It was loading validation data: sample 3, {}/images/3.jpg. Often'),
    (6, '. Often')], ids=['known', 'unknown'])
def test_which_loader_a_dead_worker_is_of(pid, said):
    training, validation = Broken(die), Broken(die)
    SeededSampler(dict(type='DefaultSampler'), training, seed=0)
    NamedSamplesHook().before_train(SimpleNamespace(val_loop=SimpleNamespace(dataloader=DataLoader(validation))))
    validation.__getitems__.loading[0] = torch.tensor([5, 3])
    explained = explain_dead_worker(RuntimeError(f'DataLoader worker (pid {pid}) exited'), training, validation)
    assert str(explained).startswith(f'RuntimeError: DataLoader worker (pid {pid}) exited' + said.format(os.getcwd()))


def test_other_errors_are_not_explained():
    assert explain_dead_worker(RuntimeError('out of memory'), Numbers()) is None
