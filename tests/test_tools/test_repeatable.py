"""Training on a CPU: equal seeds give equal bits, and a resumed run ends like one that was never interrupted."""
import random
from pathlib import Path

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
from torch.utils.data import Dataset

from mmvssm.engine.random_state import RandomStateHook, get_random_state, set_random_state
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


@pytest.mark.parametrize('case', CASES[:1], ids='-'.join, indirect=True)
def test_checkpoint_without_random_states(case):
    """An older one: training goes on and says so, with other random numbers than the uninterrupted run."""
    checkpoint = torch.load(case.halfway('whole'), weights_only=False)
    del checkpoint['random_states']
    torch.save(checkpoint, case.folder / 'old.pth')
    case.train('old', '--resume', str(case.folder / 'old.pth'))
    assert 'resume: the checkpoint has no random state of rank 0; its random numbers start' in run_log(
        case.folder / 'old')
    different = differing(case.end('whole'), case.end('old'))
    assert any(name.startswith('/state_dict/backbone.') for name in different)


class Numbers(Dataset):
    """Twelve rows of three numbers; augmented, they come from all three global generators."""

    def __init__(self, augment):
        self.augment = augment

    def __len__(self):
        return 12

    def __getitem__(self, index):
        row = torch.full((3,), index / 12)
        if self.augment:
            row += torch.rand(3) + np.random.rand() + random.random()
        return dict(row=row)


class Net(BaseModel):
    """A linear layer and dropout."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, row, mode='loss'):
        return dict(loss=F.dropout(self.linear(row), training=self.training).square().mean())


def run_net(work_dir, by_epoch=False, augment=True, start=None, resume=True, num_workers=0, **loader):
    """Train a :class:`Net` for 12 iterations, with a checkpoint after each 6; the weights at the end."""
    sampler = DefaultSampler if by_epoch else InfiniteSampler
    runner = Runner(
        Net(), str(work_dir), experiment_name=work_dir.name, load_from=start, resume=bool(start and resume),
        randomness=dict(seed=0),
        train_dataloader=dict(
            dataset=Numbers(augment), batch_size=2, sampler=dict(type=sampler), num_workers=num_workers,
            collate_fn=dict(type='default_collate'), **loader),
        train_cfg=dict(by_epoch=True, max_epochs=2) if by_epoch else dict(by_epoch=False, max_iters=12),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', by_epoch=by_epoch, interval=1 if by_epoch else 6)))
    runner.register_hook(RandomStateHook())
    runner.train()
    # Workers take 5 seconds each to end when the garbage collector finds them.
    runner.train_dataloader._iterator = runner.train_loop.dataloader_iterator = None
    return runner.model.linear.weight.detach()


#: Every generator of PyTorch belongs to one.
DEVICES = ['cpu', *(f'cuda:{index}' for index in range(torch.cuda.device_count()))]


def draws():
    """What the global generators give next."""
    return [random.gauss(), np.random.standard_normal(), *(torch.rand(3, device=name).tolist() for name in DEVICES)]


class TestRandomStateHook:

    WORKERS = dict(num_workers=2, persistent_workers=False)
    KEPT_WORKERS = dict(num_workers=2, persistent_workers=True)

    @pytest.mark.parametrize('options', [
        dict(),
        dict(by_epoch=True),
        dict(by_epoch=True, **WORKERS),
        dict(by_epoch=True, augment=False, **KEPT_WORKERS),
        dict(augment=False, **KEPT_WORKERS),
    ], ids=['iterations', 'epochs', 'epochs-workers', 'epochs-kept_workers', 'iterations-workers'])
    def test_resumed(self, tmp_path, options):
        whole = run_net(tmp_path / 'whole', **options)
        halfway = str(tmp_path / 'whole' / ('epoch_1.pth' if 'by_epoch' in options else 'iter_6.pth'))
        assert torch.equal(run_net(tmp_path / 'resumed', start=halfway, **options), whole)

    def test_loop_that_draws_what_it_passes_over(self, tmp_path, monkeypatch):
        """As the original MMEngine resumes."""
        whole = run_net(tmp_path / 'whole')
        monkeypatch.setattr('mmengine.runner.loops._InfiniteDataloaderIterator.skip_iter',
                            lambda iterator, count: [next(iterator) for _ in range(count)])
        assert torch.equal(run_net(tmp_path / 'resumed', start=str(tmp_path / 'whole' / 'iter_6.pth')), whole)

    def test_starting_from_weights_is_no_resuming(self, tmp_path):
        run_net(tmp_path / 'whole')
        checkpoint = torch.load(tmp_path / 'whole' / 'iter_6.pth', weights_only=False)
        torch.save(dict(state_dict=checkpoint['state_dict']), tmp_path / 'weights.pth')
        ends = [run_net(tmp_path / start.stem, start=str(start), resume=False)
                for start in (tmp_path / 'weights.pth', tmp_path / 'whole' / 'iter_6.pth')]
        assert torch.equal(*ends)

    def test_state_in_a_file(self, tmp_path):
        draws()  # leaves half of a pair of normal numbers to Python's and NumPy's next
        torch.save(get_random_state(), tmp_path / 'state.pth')
        expected = draws()
        # A resuming Runner loads checkpoints onto its device.
        set_random_state(torch.load(tmp_path / 'state.pth', weights_only=True, map_location=DEVICES[-1]))
        assert draws() == expected

    def test_validation_takes_no_part(self):
        """Not even in a checkpoint that is saved because of its result."""
        hook, checkpoint = RandomStateHook(), {}
        state = get_random_state()
        hook.before_val(None)
        draws()
        hook.before_save_checkpoint(None, checkpoint)
        hook.after_val(None)
        expected = draws()
        for saved in (state, *checkpoint['random_states']):
            set_random_state(saved)
            assert draws() == expected
