"""The classification configs keep to their published recipe."""
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.optim.scheduler import CosineAnnealingLR, LinearLR
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample

CONFIGS = Path(__file__).parents[1] / 'configs'

# Backbone, arch, its last width, drop path rate and weight of MESA.
IN1K = {
    'spatialmamba_t': ('SpatialMamba', 'tiny', 512, 0.2, 1.0),
    'spatialmamba_s': ('SpatialMamba', 'small', 512, 0.3, 1.5),
    'spatialmamba_b': ('SpatialMamba', 'base', 768, 0.5, 2.0),
    'quadmamba_li': ('QuadMamba', 'lite', 384, 0.1, None),
    'quadmamba_t': ('QuadMamba', 'tiny', 512, 0.1, None),
    'quadmamba_s': ('QuadMamba', 'small', 768, 0.2, None),
    'quadmamba_b': ('QuadMamba', 'base', 768, 0.3, None),
}
SMALL = dict(embed_dims=8, depths=(1, 1, 1, 1))


def load(name):
    return Config.fromfile(CONFIGS / f'{name}.py')


def build(cfg):
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model)


def small(name):
    """The config of ``name`` with a backbone of a few channels."""
    cfg = load(f'{name}_in1k')
    cfg.model.backbone.arch = SMALL
    cfg.model.head.in_channels = 64
    return cfg


@pytest.fixture(params=IN1K)
def name(request):
    return request.param


def test_model(name):
    cfg = load(f'{name}_in1k')
    backbone, arch, width, drop_path_rate, _ = IN1K[name]
    assert cfg.default_scope == 'mmpretrain'
    assert cfg.custom_imports.imports == ['mmvssm', 'mmvssm.models.classifiers']
    assert cfg.model.backbone == dict(type=backbone, arch=arch, out_indices=(3,))
    assert MODELS.get(backbone).arch_settings[arch]['drop_path_rate'] == drop_path_rate
    head = cfg.model.head
    assert (head.type, head.num_classes, head.in_channels) == ('LinearClsHead', 1000, width)
    assert head.loss == dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')


def test_mesa(name):
    assert load(f'{name}_in1k').default_hooks.get('mesa', {}).get('weight') == IN1K[name][-1]


def test_schedule(name):
    cfg = load(f'{name}_in1k')
    assert cfg.train_cfg.max_epochs == 300
    assert cfg.optim_wrapper.optimizer == dict(
        type='AdamW', lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05)
    assert cfg.optim_wrapper.clip_grad == dict(max_norm=5.0)
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=8 * cfg.train_dataloader.batch_size)
    assert cfg.custom_hooks == [dict(type='EMAHook', momentum=1e-4, update_buffers=True, priority='ABOVE_NORMAL')]


@pytest.mark.parametrize('scale', [1.0, 0.5])
def test_learning_rate(scale):
    """Warm-up and cosine by iterations; scaled with the batch, all of it is."""
    cfg = load('spatialmamba_t_in1k')
    per_epoch = 3
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=scale * 1e-3)
    kinds = dict(LinearLR=LinearLR, CosineAnnealingLR=CosineAnnealingLR)
    schedulers = []
    for scheduler in cfg.param_scheduler:
        arguments = {key: value for key, value in scheduler.items() if key not in ('type', 'convert_to_iter_based')}
        schedulers.append(kinds[scheduler.type].build_iter_from_epoch(
            optimizer, epoch_length=per_epoch, **arguments))
    rates = []
    for _ in range(300 * per_epoch):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert rates[0] == pytest.approx(scale * 1e-6)
    assert rates[20 * per_epoch] == pytest.approx(scale * 1e-3, rel=0.05)
    assert rates[160 * per_epoch] == pytest.approx(scale * (1e-3 + 1e-5) / 2, rel=0.02)
    assert rates[-1] == pytest.approx(scale * 1e-5, rel=0.01)


@pytest.mark.parametrize('name', ['spatialmamba_t', 'quadmamba_li'])
def test_no_decay_on_vectors_and_biases(name):
    cfg = small(name)
    model = build(cfg)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    decay = {id(parameter): group['weight_decay']
             for group in optimizer.param_groups for parameter in group['params']}
    expected = {key: 0.0 if parameter.ndim == 1 or key.endswith('bias') else 0.05
                for key, parameter in model.named_parameters()}
    assert {key: decay[id(parameter)] for key, parameter in model.named_parameters()} == expected


def test_augmentation():
    cfg = load('spatialmamba_t_in1k')
    steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert (steps['RandomResizedCrop'].scale, steps['RandomResizedCrop'].interpolation) == (224, 'bicubic')
    assert steps['RandomFlip'].prob == 0.5
    randaugment = steps['RandAugment']
    assert (randaugment.policies, randaugment.num_policies) == ('timm_increasing', 2)
    assert (randaugment.magnitude_level, randaugment.magnitude_std, randaugment.total_level) == (9, 0.5, 10)
    jitter = steps['ColorJitter']
    assert {jitter.brightness, jitter.contrast, jitter.saturation} == {0.4}
    assert (steps['RandomErasing'].erase_prob, steps['RandomErasing'].mode) == (0.25, 'rand')
    assert cfg.model.train_cfg.augments == [dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]
    assert 'probs' not in cfg.model.train_cfg  # evenly: switch 0.5


def test_evaluation():
    cfg = load('spatialmamba_t_in1k')
    resize, crop = cfg.test_dataloader.dataset.pipeline[1:3]
    assert (resize.type, resize.scale, resize.edge, resize.interpolation) == ('ResizeEdge', 256, 'short', 'bicubic')
    assert crop == dict(type='CenterCrop', crop_size=224)
    assert cfg.val_dataloader == cfg.test_dataloader
    assert cfg.test_evaluator == dict(type='Accuracy', topk=(1, 5))


def test_environment_sets_the_data_folder(monkeypatch):
    monkeypatch.setenv('IMAGENET_ROOT', '/elsewhere')
    cfg = load('spatialmamba_t_in1k')
    assert {cfg[f'{split}_dataloader'].dataset.data_root for split in ('train', 'val', 'test')} == {'/elsewhere/'}


@pytest.mark.parametrize('name', ['spatialmamba_t', 'quadmamba_li'])
def test_trains_and_predicts(name):
    """One step with batch augmentation and one prediction of a small model."""
    torch.manual_seed(0)
    model = build(small(name))
    data = dict(inputs=[torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(2)],
                data_samples=[DataSample().set_gt_label(label) for label in (3, 999)])
    batch = model.data_preprocessor(data, training=True)
    assert batch['data_samples'][0].gt_score.shape == (1000,)
    loss, _ = model.parse_losses(model(**batch, mode='loss'))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    prediction, _ = model.predict(batch['inputs'])
    assert prediction.pred_score.sum().item() == pytest.approx(1, abs=1e-4)
