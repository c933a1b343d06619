"""Every config parses and keeps to its published recipe; tests/test_model_zoo.py builds them all."""
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import nn

CONFIGS = Path(__file__).parents[1] / 'configs'
NAMES = sorted(path.stem for path in CONFIGS.glob('*.py'))

# Per backbone and variant: class, arch, widths of the stages, drop path rate.
MASK_RCNN = {
    'spatialmamba_t': ('SpatialMamba', 'tiny', [64, 128, 256, 512], 0.2),
    'spatialmamba_s': ('SpatialMamba', 'small', [64, 128, 256, 512], 0.3),
    'spatialmamba_b': ('SpatialMamba', 'base', [96, 192, 384, 768], 0.5),
    'quadmamba_li': ('QuadMamba', 'lite', [48, 96, 192, 384], 0.1),
    'quadmamba_t': ('QuadMamba', 'tiny', [64, 128, 256, 512], 0.1),
    'quadmamba_s': ('QuadMamba', 'small', [96, 192, 384, 768], 0.2),
    'quadmamba_b': ('QuadMamba', 'base', [96, 192, 384, 768], 0.3),
}
# Epochs and the epochs where the learning rate drops.
SCHEDULES = {'1x': (12, [8, 11]), '3x': (36, [27, 33])}
RECIPES = [(variant, schedule) for variant in MASK_RCNN for schedule in SCHEDULES]


def load(name):
    return Config.fromfile(CONFIGS / f'{name}.py')


def build(cfg):
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model)


def mask_rcnn(variant, schedule):
    return load(f'mask_rcnn_{variant}_{schedule}')


@pytest.mark.parametrize('name', NAMES)
class TestEveryConfig:

    def test_name(self, name):
        # METHOD_BACKBONE_VARIANT_SCHEDULE; the method alone may have several words, a classifier names none.
        assert re.fullmatch(r'([a-z][a-z0-9_]*_)?(spatialmamba|quadmamba)_[a-z0-9]+_[a-z0-9]+', name)

    def test_imports_mmvssm(self, name):
        cfg = load(name)
        # The classifiers' module needs MMPretrain, so `mmvssm` alone leaves it out.
        imports = ['mmvssm', 'mmvssm.models.classifiers'] if cfg.default_scope == 'mmpretrain' else ['mmvssm']
        assert cfg.custom_imports == dict(imports=imports, allow_failed_imports=False)

    def test_dumped_config_is_the_same(self, name, tmp_path, monkeypatch):
        # Only the layout, and most of the time.
        monkeypatch.setattr('yapf.yapflib.yapf_api.FormatCode', lambda text, **options: (text, True))
        cfg = load(name)
        cfg.dump(tmp_path / 'dumped.py')
        assert Config.fromfile(tmp_path / 'dumped.py').to_dict() == cfg.to_dict()


@pytest.mark.parametrize('variant, schedule', RECIPES)
class TestMaskRCNN:

    def test_model(self, variant, schedule):
        cfg = mask_rcnn(variant, schedule)
        backbone, arch, widths, drop_path_rate = MASK_RCNN[variant]
        assert cfg.default_scope == 'mmdet'
        assert cfg.model.type == 'MaskRCNN'
        assert cfg.model.backbone == dict(
            type=backbone, arch=arch, drop_path_rate=drop_path_rate, out_indices=(0, 1, 2, 3),
            init_cfg=dict(type='Pretrained', checkpoint=f'pretrained/{variant}.pth'))
        assert cfg.pretrained == cfg.model.backbone.init_cfg.checkpoint
        assert cfg.model.neck == dict(
            type='FPN', in_channels=widths, out_channels=256, num_outs=5)

    def test_bf16_roi_align(self, variant, schedule):
        roi_head = mask_rcnn(variant, schedule).model.roi_head
        for extractor in (roi_head.bbox_roi_extractor, roi_head.mask_roi_extractor):
            assert extractor.roi_layer.use_torchvision

    def test_schedule(self, variant, schedule):
        cfg = mask_rcnn(variant, schedule)
        epochs, milestones = SCHEDULES[schedule]
        assert cfg.train_cfg == dict(
            type='EpochBasedTrainLoop', max_epochs=epochs, val_interval=1)
        warm_up, steps = cfg.param_scheduler
        assert warm_up == dict(
            type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000)
        assert steps == dict(
            type='MultiStepLR', by_epoch=True, begin=0, end=epochs, milestones=milestones,
            gamma=0.1)

    def test_optimizer(self, variant, schedule):
        cfg = mask_rcnn(variant, schedule)
        assert cfg.optim_wrapper.optimizer == dict(
            type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05)
        assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=8 * 2)
        assert cfg.train_dataloader.batch_size == 2

    def test_evaluation(self, variant, schedule):
        cfg = mask_rcnn(variant, schedule)
        for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
            assert (evaluator.type, evaluator.metric) == ('CocoMetric', ['bbox', 'segm'])
        assert cfg.test_dataloader.dataset.pipeline[1] == dict(
            type='Resize', scale=(1333, 800), keep_ratio=True)
        assert cfg.val_dataloader == cfg.test_dataloader

    def test_augmentation(self, variant, schedule):
        pipeline = mask_rcnn(variant, schedule).train_dataloader.dataset.pipeline
        steps = {step.type: step for step in pipeline}
        assert steps['LoadAnnotations'].with_mask
        assert steps['RandomFlip'].prob == 0.5
        if schedule == '1x':
            assert steps['Resize'].scale == (1333, 800)
            return
        scales = [(1333, short) for short in
                  (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)]
        resize_only, crop = steps['RandomChoice'].transforms
        assert [step.scales for step in resize_only] == [scales]
        before, cut, after = crop
        assert before.scales == [(1333, 400), (1333, 500), (1333, 600)]
        assert (cut.crop_type, cut.crop_size) == ('absolute_range', (384, 600))
        assert after.scales == scales


@pytest.mark.parametrize('variant', ['spatialmamba_t', 'quadmamba_t'])
def test_no_weight_decay_on_norms(variant):
    cfg = mask_rcnn(variant, '1x')
    model = build(cfg)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    decay = {id(parameter): group['weight_decay']
             for group in optimizer.param_groups for parameter in group['params']}
    norms = {id(parameter) for module in model.modules()
             if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d))
             for parameter in module.parameters()}
    assert len(norms) > 50
    assert decay == {key: 0.0 if key in norms else 0.05 for key in decay}


def test_environment_sets_the_data_folder(monkeypatch):
    monkeypatch.setenv('COCO_ROOT', '/elsewhere')
    cfg = mask_rcnn('spatialmamba_t', '1x')
    assert cfg.train_dataloader.dataset.data_root == '/elsewhere/'


@pytest.mark.parametrize('variant', ['spatialmamba_t', 'quadmamba_t'])
def test_tiny_mask_rcnn_trains_and_predicts(variant):
    """One step and one prediction of the T model, with random weights."""
    from mmdet.testing import demo_mm_inputs
    torch.manual_seed(0)
    model = build(mask_rcnn(variant, '1x'))
    data = demo_mm_inputs(1, [[3, 96, 128]], num_classes=80, num_items=[2], with_mask=True)
    data = model.data_preprocessor(data, True)
    losses = model(**data, mode='loss')
    assert {'loss_rpn_cls', 'loss_rpn_bbox', 'loss_cls', 'loss_bbox', 'loss_mask'} <= set(losses)
    loss, _ = model.parse_losses(losses)
    assert torch.isfinite(loss)
    model.eval()
    with torch.no_grad():
        prediction, = model(**data, mode='predict')
    assert {'bboxes', 'scores', 'labels', 'masks'} <= set(prediction.pred_instances.keys())
