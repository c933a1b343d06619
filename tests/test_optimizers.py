"""Groups of parameters for the optimizer, and learning rates that decay by layer."""
import copy
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper, build_optim_wrapper
from mmengine.optim.scheduler import LinearLR, MultiStepLR
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torch import nn

from mmvssm.engine.optimizers import MergedOptimWrapperConstructor
from mmvssm.models import backbones

CONFIGS = Path(__file__).parents[1] / 'configs'
LR, DECAY = 1e-3, 0.05
DEPTHS = (1, 2, 1, 1)
LAYERS = sum(DEPTHS) + 2


class Model(nn.Module):
    """A backbone and what follows it."""

    def __init__(self, name='SpatialMamba'):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = MODELS.build(dict(type=name, arch=dict(embed_dims=8, depths=DEPTHS)))
        self.neck = nn.Conv2d(64, 8, 1)
        self.head = nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))

    def forward(self, x):
        return self.head(self.neck(self.backbone(x)[-1]))


def wrap(model, constructor=MergedOptimWrapperConstructor, **paramwise):
    return constructor(dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=LR, weight_decay=DECAY)),
                       paramwise)(model)


def settings(wrapper, model):
    """Learning rate and decay by name of parameter."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: (group['lr'], group['weight_decay'])
            for group in wrapper.optimizer.param_groups for parameter in group['params']}


def train(model, wrapper, steps=2):
    for seed in range(steps):
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        wrapper.update_params(model(x).square().mean())


PARAMWISE = {
    'norms': dict(norm_decay_mult=0.),
    'flat': dict(flat_decay_mult=0., custom_keys=dict(dt_projs_bias=dict(decay_mult=0.))),
    'biases': dict(bias_lr_mult=2., bias_decay_mult=0., norm_decay_mult=0.5, dwconv_decay_mult=0.1),
    'keys': dict(custom_keys={'head': dict(lr_mult=10., decay_mult=0.), 'neck': dict(betas=[0.5, 0.9])}),
}


class TestGroups:

    @pytest.mark.parametrize('paramwise', PARAMWISE.values(), ids=PARAMWISE)
    def test_settings_are_those_of_mmengine(self, paramwise):
        model = Model()
        ours, theirs = wrap(model, **paramwise), wrap(model, DefaultOptimWrapperConstructor, **paramwise)
        assert settings(ours, model) == settings(theirs, model)
        assert len(theirs.optimizer.param_groups) > 100
        assert len(ours.optimizer.param_groups) == len(
            {repr((group['lr'], group['weight_decay'], group['betas'])) for group in theirs.optimizer.param_groups})

    @pytest.mark.parametrize('name', backbones.__all__)
    def test_updates_are_those_of_mmengine(self, name):
        states = []
        for constructor in (MergedOptimWrapperConstructor, DefaultOptimWrapperConstructor):
            model = Model(name)
            torch.manual_seed(0)
            train(model, wrap(model, constructor, **PARAMWISE['biases']))
            states.append(model.state_dict())
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())

    def test_parameters_keep_the_order_of_the_model(self):
        model = Model()
        order = list(model.parameters())
        for group in wrap(model, norm_decay_mult=0.).optimizer.param_groups:
            places = [next(i for i, p in enumerate(order) if p is parameter) for parameter in group['params']]
            assert places == sorted(places)

    @pytest.mark.parametrize('paramwise', [
        dict(norm_decay_mult=0.), dict(custom_keys=dict(backbone=dict(lr_mult=0.1))),
        dict(layer_decay_rate=0.5)], ids=str)
    def test_the_first_has_the_base_rate(self, paramwise):
        wrapper = wrap(Model(), **paramwise)
        rates = wrapper.get_lr()
        assert (rates['lr'][0], rates['base_lr']) == (LR, [LR])

    def test_schedulers_change_all(self):
        model = Model()
        wrapper = wrap(model, norm_decay_mult=0., layer_decay_rate=0.5)
        before = settings(wrapper, model)
        schedulers = [LinearLR(wrapper, start_factor=0.1, by_epoch=False, end=5),
                      MultiStepLR(wrapper, milestones=[8], gamma=0.1)]
        for _ in range(9):
            train(model, wrapper, steps=1)
            for scheduler in schedulers:
                scheduler.step()
        after = settings(wrapper, model)
        assert {key: rate for key, (rate, _) in after.items()} == pytest.approx(
            {key: 0.1 * rate for key, (rate, _) in before.items()})
        assert wrapper.get_lr()['base_lr'] == pytest.approx([0.1 * LR])

    def test_scaled_rates(self):
        model = Model()
        wrapper = wrap(model, norm_decay_mult=0., layer_decay_rate=0.5)
        before = settings(wrapper, model)
        runner = SimpleNamespace(_train_dataloader=dict(batch_size=4), world_size=2, param_schedulers=[],
                                 logger=logging.getLogger())
        Runner.scale_lr(runner, wrapper, dict(enable=True, base_batch_size=4))
        assert settings(wrapper, model) == {key: (2 * rate, decay) for key, (rate, decay) in before.items()}

    def test_resumes(self):
        model = Model()
        wrapper = wrap(model, norm_decay_mult=0., layer_decay_rate=0.5)
        train(model, wrapper)
        twin = copy.deepcopy(model)
        resumed = wrap(twin, norm_decay_mult=0., layer_decay_rate=0.5)
        resumed.load_state_dict(copy.deepcopy(wrapper.state_dict()))
        train(model, wrapper)
        train(twin, resumed)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))

    def test_frozen_parameters_are_left_out(self):
        model = Model()
        model.backbone.requires_grad_(False)
        assert set(settings(wrap(model, norm_decay_mult=0.), model)) == {
            name for name, _ in model.named_parameters() if not name.startswith('backbone.')}

    def test_parameters_met_twice(self):
        model = Model()
        model.tied = nn.Sequential(model.neck)
        with pytest.raises(ValueError, match=r'neck\.weight is in the model more than once; set bypass_duplicate=True'):
            wrap(model, norm_decay_mult=0.)
        wrapper = wrap(model, norm_decay_mult=0., bypass_duplicate=True)
        assert sum(len(group['params']) for group in wrapper.optimizer.param_groups) == len(list(model.parameters()))


class TestLayerDecay:

    @pytest.mark.parametrize('name', backbones.__all__)
    def test_rates(self, name):
        model = Model(name)
        found = settings(wrap(model, layer_decay_rate=0.5, norm_decay_mult=0.), model)
        plain = settings(wrap(model, norm_decay_mult=0.), model)
        for parameter, (rate, decay) in found.items():
            depth, _ = model.backbone.get_layer_depth(parameter, 'backbone.')
            assert (rate, decay) == (LR * 0.5**(LAYERS - 1 - depth), plain[parameter][1])
        assert found['backbone.patch_embed.' + ('conv1.conv' if name == 'SpatialMamba' else '0') + '.weight'][0] \
            == LR * 0.5**(LAYERS - 1)
        assert {rate for key, (rate, _) in found.items() if not key.startswith('backbone.')} == {LR}

    def test_custom_keys_multiply(self):
        model = Model()
        found = settings(wrap(model, layer_decay_rate=0.5, custom_keys={'blocks.1': dict(lr_mult=3.)}), model)
        assert found['backbone.layers.1.blocks.1.ln_1.weight'][0] == pytest.approx(3 * LR * 0.5**(LAYERS - 4))

    @pytest.mark.parametrize('rate', [0, 1.1, -0.5, '0.9', None], ids=repr)
    def test_bad_rate(self, rate):
        with pytest.raises(ValueError) as raised:
            wrap(Model(), layer_decay_rate=rate)
        assert str(raised.value) == f'paramwise_cfg: layer_decay_rate={rate!r}, expected a number in (0, 1]'

    def test_other_backbone(self):
        model = Model()
        model.backbone = nn.Conv2d(3, 3, 1)
        with pytest.raises(ValueError, match='needs a backbone with get_layer_depth, which Model with backbone Conv2d'):
            wrap(model, layer_decay_rate=0.9)

    def test_no_rate_to_multiply(self):
        with pytest.raises(ValueError, match='set optim_wrapper.optimizer.lr'):
            MergedOptimWrapperConstructor(dict(optimizer=dict(type='AdamW')), dict(layer_decay_rate=0.9))(Model())

    @pytest.mark.parametrize('name', ['spatialmamba_t', 'quadmamba_t'])
    def test_as_by_mmpretrain(self, name):
        """MMPretrain's constructor for its classifiers gives ours the same rates."""
        cfg = Config.fromfile(CONFIGS / f'{name}_in1k.py')
        init_default_scope('mmpretrain')
        cfg.model.backbone.arch = dict(embed_dims=8, depths=DEPTHS)
        cfg.model.head.in_channels = 64
        model = MODELS.build(cfg.model)
        rates = []
        for constructor in ('MergedOptimWrapperConstructor', 'LearningRateDecayOptimWrapperConstructor'):
            wrapper = build_optim_wrapper(model, dict(
                type='OptimWrapper', constructor=constructor, optimizer=dict(type='AdamW', lr=LR, weight_decay=DECAY),
                paramwise_cfg=dict(layer_decay_rate=0.5, norm_decay_mult=0.)))
            rates.append(settings(wrapper, model))
        assert rates[0] == rates[1]


@pytest.mark.parametrize('name, groups', [
    ('mask_rcnn_spatialmamba_t_1x', 2), ('mask_rcnn_quadmamba_t_3x', 2), ('upernet_spatialmamba_t_160k', 2),
    ('spatialmamba_t_in1k', 2)], ids=str)
def test_shipped_schedules_have_few_groups(name, groups):
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.init_cfg = None
    wrapper = build_optim_wrapper(MODELS.build(cfg.model), cfg.optim_wrapper)
    assert isinstance(wrapper, OptimWrapper)
    assert len(wrapper.optimizer.param_groups) == groups
