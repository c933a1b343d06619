"""The segmentation configs keep to their published recipe."""
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

CONFIGS = Path(__file__).parents[1] / 'configs'

# Backbone, arch, width of the first stage, drop path rate.
UPERNET = {
    'spatialmamba_t': ('SpatialMamba', 'tiny', 64, 0.2),
    'spatialmamba_s': ('SpatialMamba', 'small', 64, 0.3),
    'spatialmamba_b': ('SpatialMamba', 'base', 96, 0.5),
    'quadmamba_li': ('QuadMamba', 'lite', 48, 0.1),
    'quadmamba_t': ('QuadMamba', 'tiny', 64, 0.1),
    'quadmamba_s': ('QuadMamba', 'small', 96, 0.2),
    'quadmamba_b': ('QuadMamba', 'base', 96, 0.3),
}


def load(name):
    return Config.fromfile(CONFIGS / f'upernet_{name}.py')


def build(cfg):
    init_default_scope(cfg.default_scope)
    return revert_sync_batchnorm(MODELS.build(cfg.model))


@pytest.fixture(params=UPERNET)
def variant(request):
    return request.param


@pytest.fixture
def cfg(variant):
    return load(f'{variant}_160k')


def test_model(variant, cfg):
    backbone, arch, width, drop_path_rate = UPERNET[variant]
    assert (cfg.default_scope, cfg.model.type) == ('mmseg', 'EncoderDecoder')
    assert cfg.model.test_cfg == dict(mode='whole')
    assert cfg.model.backbone == dict(
        type=backbone, arch=arch, drop_path_rate=drop_path_rate, out_indices=(0, 1, 2, 3),
        init_cfg=dict(type='Pretrained', checkpoint=f'pretrained/{variant}.pth'))
    assert cfg.pretrained == cfg.model.backbone.init_cfg.checkpoint
    assert cfg.model.data_preprocessor.size == (512, 512)
    decode, auxiliary = cfg.model.decode_head, cfg.model.auxiliary_head
    assert (decode.type, auxiliary.type) == ('UPerHead', 'FCNHead')
    assert decode.in_channels == [width * 2**i for i in range(4)]
    assert (auxiliary.in_index, auxiliary.in_channels) == (2, 4 * width)
    for head, weight in ((decode, 1.0), (auxiliary, 0.4)):
        assert (head.num_classes, head.norm_cfg.type, head.loss_decode.loss_weight) == (150, 'SyncBN', weight)


def test_schedule(cfg):
    assert cfg.train_cfg == dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=16000)
    assert cfg.param_scheduler == [
        dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
        dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=1500, end=160000)]
    assert cfg.optim_wrapper.optimizer == dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01)
    assert cfg.train_dataloader.batch_size * 4 == 16
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=16)
    assert not cfg.default_hooks.checkpoint.by_epoch


def test_augmentation(cfg):
    pipeline = cfg.train_dataloader.dataset.pipeline
    assert [step.type for step in pipeline] == [
        'LoadImageFromFile', 'LoadAnnotations', 'RandomResize', 'RandomCrop', 'RandomFlip', 'PhotoMetricDistortion',
        'PackSegInputs']
    steps = {step.type: step for step in pipeline}
    assert steps['LoadAnnotations'].reduce_zero_label
    assert steps['RandomResize'] == dict(
        type='RandomResize', scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True)
    assert steps['RandomCrop'] == dict(type='RandomCrop', crop_size=(512, 512), cat_max_ratio=0.75)
    assert steps['RandomFlip'].prob == 0.5


def test_evaluation(cfg):
    assert cfg.val_dataloader == cfg.test_dataloader
    assert cfg.test_dataloader.dataset.data_prefix == dict(
        img_path='images/validation', seg_map_path='annotations/validation')
    assert cfg.test_dataloader.dataset.pipeline[1] == dict(type='Resize', scale=(2048, 512), keep_ratio=True)
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        assert evaluator == dict(type='IoUMetric', iou_metrics=['mIoU'])


def test_no_weight_decay_on_norms():
    cfg = load('quadmamba_li_160k')
    cfg.model.backbone.init_cfg = None
    model = build(cfg)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    decay = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    norms = {id(p) for module in model.modules() if isinstance(module, (nn.LayerNorm, _BatchNorm))
             for p in module.parameters()}
    assert len(norms) > 50
    assert decay == {key: 0.0 if key in norms else 0.01 for key in decay}


def test_environment_sets_the_data_folder(monkeypatch):
    monkeypatch.setenv('ADE20K_ROOT', '/elsewhere')
    assert load('spatialmamba_t_160k').train_dataloader.dataset.data_root == '/elsewhere/'


@pytest.mark.parametrize('name', ['spatialmamba_t_160k', 'quadmamba_li_160k', 'spatialmamba_nano_digits'])
def test_trains_and_predicts(name):
    """One loss and one prediction, with a slim backbone and random weights."""
    torch.manual_seed(0)
    cfg = load(name)
    cfg.model.backbone.update(arch=dict(embed_dims=8, depths=(1, 1, 1, 1)), init_cfg=None)
    cfg.model.decode_head.update(in_channels=[8, 16, 32, 64], channels=16)
    cfg.model.auxiliary_head.update(in_channels=32, channels=16)
    cfg.model.data_preprocessor.size = (64, 96)
    model = build(cfg)
    classes = cfg.model.decode_head.num_classes
    samples = []
    for _ in range(2):
        sample = SegDataSample(metainfo=dict(ori_shape=(60, 96), img_shape=(60, 96), pad_shape=(60, 96)))
        sample.gt_sem_seg = PixelData(data=torch.randint(classes, (1, 60, 96)))
        samples.append(sample)
    images = [torch.randint(256, (3, 60, 96), dtype=torch.uint8) for _ in samples]
    losses = model(**model.data_preprocessor(dict(inputs=images, data_samples=samples), True), mode='loss')
    assert {'decode.loss_ce', 'aux.loss_ce'} <= set(losses)
    loss, _ = model.parse_losses(losses)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.inference_mode():
        predictions = model.test_step(dict(inputs=images, data_samples=samples))
    for prediction in predictions:
        assert prediction.pred_sem_seg.data.shape == (1, 60, 96)
        assert prediction.seg_logits.data.shape == (classes, 60, 96)
