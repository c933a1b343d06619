"""MESA: its loss, its teacher, and when it is on."""
import os
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from mmengine.config import ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import MODELS
from mmengine.runner import Runner
from mmpretrain.structures import DataSample
from torch.utils.data import DataLoader

from mmvssm.engine.config import UsageError
from mmvssm.models.classifiers import MESAHook

CLASSES, EPOCHS, BATCHES = 3, 4, 2
EMA = dict(type='EMAHook', momentum=0.25, update_buffers=True, priority='ABOVE_NORMAL')
MESA = dict(type='MESAHook', weight=1.5)


def model_cfg(backbone='SpatialMamba', drop_path_rate=0.5):
    return ConfigDict(
        type='VisionSSMClassifier', data_preprocessor=dict(num_classes=CLASSES),
        backbone=dict(type=backbone, arch=dict(embed_dims=8, depths=(1, 1, 1, 1), drop_path_rate=drop_path_rate),
                      out_indices=(3,)),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=CLASSES, in_channels=64))


class Recorder(Hook):
    """Notes the losses of every iteration, and interrupts before one."""

    priority = 'LOWEST'

    def __init__(self, stop=None):
        self.losses, self.stop = [], stop

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.stop:
            raise KeyboardInterrupt

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append({name: value.item() for name, value in outputs.items()})


def loader(seed):
    generator = torch.Generator().manual_seed(seed)
    data = [dict(inputs=torch.randn(3, 32, 32, generator=generator),
                 data_samples=DataSample().set_gt_label(i % CLASSES)) for i in range(4 * BATCHES)]
    return DataLoader(data, batch_size=4, collate_fn=pseudo_collate)


def build_runner(work_dir, *hooks, model=None, data_seed=0, **kwargs):
    """A Runner of ``EPOCHS`` epochs with some hooks, validating after each."""
    count = build_runner.count = getattr(build_runner, 'count', 0) + 1
    return Runner(
        model=model or model_cfg(), work_dir=str(work_dir), experiment_name=f'{work_dir}{count}',
        train_dataloader=loader(data_seed), train_cfg=dict(by_epoch=True, max_epochs=EPOCHS),
        val_dataloader=loader(data_seed), val_cfg=dict(), val_evaluator=dict(type='Accuracy'),
        custom_hooks=deepcopy(list(hooks)), optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01)),
        default_scope='mmpretrain', randomness=dict(seed=0), **kwargs)


@pytest.fixture
def make_runner(tmp_path):
    return partial(build_runner, tmp_path)


def record(runner, stop=None):
    """Train and return the losses of every iteration."""
    recorder = Recorder(stop)
    runner.register_hook(recorder)
    runner.train()
    return recorder.losses


def hook_of(runner, kind):
    return next(hook for hook in runner.hooks if isinstance(hook, kind))


def test_loss_by_hand():
    torch.manual_seed(0)
    model = MODELS.build(model_cfg()).eval()
    images, samples = torch.randn(2, 3, 32, 32), [DataSample().set_gt_label(i) for i in range(2)]
    teacher = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.4, 0.0]])
    seen = []
    model.teacher, model.mesa_weight = lambda inputs: seen.append(inputs) or teacher, 1.5
    losses = model(images, samples, mode='loss')
    with torch.no_grad():
        by_hand = -(teacher * model(images).log_softmax(1)).sum(1).mean()
    assert losses['loss_mesa'].item() == pytest.approx(1.5 * by_hand.item(), rel=1e-6)
    assert losses['loss'].item() == pytest.approx(F.cross_entropy(model(images), torch.tensor([0, 1])).item())
    total, _ = model.parse_losses(losses)
    assert total.item() == pytest.approx((losses['loss'] + losses['loss_mesa']).item())
    assert seen[0] is images
    assert losses['loss_mesa'].requires_grad


@pytest.mark.parametrize('backbone', ['SpatialMamba', 'QuadMamba'])
def test_teacher(make_runner, backbone):
    """It is the model of EMAHook, gives its probabilities, takes no gradient and draws no random numbers."""
    runner = make_runner(EMA, MESA, model=model_cfg(backbone))
    runner.train()
    mesa, ema_model = hook_of(runner, MESAHook), hook_of(runner, EMAHook).ema_model
    assert mesa.ema_model is ema_model
    assert runner.model.teacher is None  # only during a training step
    runner.model.teacher = mesa.probabilities
    assert not any('teacher' in name or 'ema' in name for name in runner.model.state_dict())
    assert not set(map(id, runner.model.modules())) & set(map(id, ema_model.modules()))

    images, state = torch.randn(2, 3, 32, 32), torch.get_rng_state()
    probabilities = mesa.probabilities(images)
    assert torch.equal(torch.get_rng_state(), state)
    assert not probabilities.requires_grad
    assert not any(parameter.requires_grad for parameter in ema_model.parameters())
    expected = ema_model.module.eval()(images).softmax(1)
    assert torch.equal(probabilities, expected)
    assert not torch.equal(expected, runner.model.eval()(images).softmax(1))


@pytest.mark.parametrize('begin, first', [(0.25, BATCHES), (0.0, 0), (0.5, 2 * BATCHES)])
def test_on_from_its_epoch(make_runner, begin, first):
    losses = record(make_runner(EMA, dict(MESA, begin=begin)))
    assert ['loss_mesa' in values for values in losses] == [i >= first for i in range(EPOCHS * BATCHES)]


def test_student_is_undisturbed_before(make_runner):
    """With the same random numbers, runs with and without MESA part where it begins."""
    with_mesa, without = record(make_runner(EMA, MESA)), record(make_runner(EMA))
    # The first loss with MESA comes before its first gradient.
    own, plain = ([values['loss'] for values in losses] for losses in (with_mesa, without))
    assert own[:BATCHES + 1] == plain[:BATCHES + 1]
    assert own[-1] != plain[-1]


def test_evaluation_in_between_changes_nothing(make_runner):
    """EMAHook exchanges the weights for an evaluation."""
    runner = make_runner(EMA, MESA)
    runner.train_loop.val_interval = 2 * EPOCHS
    assert record(runner) == record(make_runner(EMA, MESA))


def test_resume(make_runner):
    """Past the beginning, with the teacher that EMAHook restores."""
    model = model_cfg(drop_path_rate=0.)
    whole = record(make_runner(EMA, MESA, model=model))
    with pytest.raises(KeyboardInterrupt):
        record(make_runner(EMA, MESA, model=model), stop=2 * BATCHES)
    rest = record(make_runner(EMA, MESA, model=model, resume=True))
    assert 'loss_mesa' in rest[0]
    assert rest == whole[2 * BATCHES:]


@pytest.mark.parametrize('hooks, message', [
    ([MESA], 'no EMAHook.*custom_hooks'),
    ([EMA, MESA], 'ImageClassifier, expected model.type=VisionSSMClassifier'),
], ids=['no EMA', 'model'])
def test_needs(make_runner, hooks, message):
    model = dict(model_cfg(), type='ImageClassifier') if EMA in hooks else None
    with pytest.raises(UsageError, match=message) as raised:
        make_runner(*hooks, model=model).train()
    assert '\n' not in str(raised.value)


@pytest.mark.parametrize('arguments, message', [
    (dict(weight=0), 'weight=0'), (dict(weight='1'), "weight='1'"), (dict(weight=1, begin=1), 'begin=1,'),
])
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MESAHook(**arguments)


def train_as_rank(rank, folder):
    dist.init_process_group('gloo', f'file://{folder}/rendezvous', rank=rank, world_size=2)
    torch.set_num_threads(1)
    os.environ['LOCAL_RANK'] = str(rank)  # MMEngine takes it for a CUDA device unless told otherwise
    wrapper = dict(model_wrapper_cfg=dict(
        type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False))
    runner = build_runner(folder, EMA, MESA, launcher='pytorch', cfg=wrapper, data_seed=rank)
    losses = record(runner)
    weights = runner.model.module.state_dict()
    torch.save((losses, weights), f'{folder}/rank_{rank}.pth')


def test_distributed(tmp_path):
    """Two processes train in step, with MESA, though the teacher is no part of the wrapped model."""
    mp.spawn(train_as_rank, (str(tmp_path),), nprocs=2)
    (losses, weights), (_, other) = (torch.load(tmp_path / f'rank_{rank}.pth') for rank in range(2))
    assert 'loss_mesa' in losses[-1]
    assert all(torch.equal(value, other[name]) for name, value in weights.items() if 'running' not in name)
