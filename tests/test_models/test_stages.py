"""What is asked of the stages of a backbone one by one: checkpointing, depths for learning rates, layout in memory."""
import pytest
import torch
from mmengine.registry import MODELS
from test_backbones import image

from mmvssm.models import backbones
from mmvssm.models.layers import backbone as backbone_module

DEPTHS = (1, 2, 1, 1)


@pytest.fixture(params=backbones.__all__)
def name(request):
    return request.param


def build(name, **kwargs):
    torch.manual_seed(0)
    return MODELS.build(dict(type=name, arch=dict(embed_dims=8, depths=DEPTHS), **kwargs))


def step(model):
    """Features and all gradients."""
    x = image().requires_grad_()
    torch.manual_seed(3)
    features = model(x)
    sum(f.square().sum() for f in features).backward()
    return [*features, x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize('with_cp, stages', [
    (False, ()), ((), ()), ((1,), (1,)), ([0, 1], (0, 1)), (True, (0, 1, 2, 3))], ids=str)
def test_checkpointed_stages_give_the_same_gradients(name, with_cp, stages, monkeypatch):
    expected = step(build(name, drop_path_rate=0.5))
    recomputed = []

    def recompute(block, *args, recompute=backbone_module.recompute, **kwargs):
        recomputed.append(block)
        return recompute(block, *args, **kwargs)

    monkeypatch.setattr(backbone_module, 'recompute', recompute)
    model = build(name, with_cp=with_cp, drop_path_rate=0.5)
    assert all(torch.equal(a, b) for a, b in zip(step(model), expected, strict=True))
    assert recomputed == [block for i in stages for block in model.layers[i].blocks]


@pytest.mark.parametrize('with_cp', [4, (4,), (-1,), (0, 1.0), (True,), '01', None], ids=repr)
def test_bad_with_cp_is_named(name, with_cp):
    with pytest.raises(ValueError) as raised:
        build(name, with_cp=with_cp)
    assert str(raised.value) == (f'{name}: with_cp={with_cp!r}, expected True, False or a sequence of stage numbers '
                                 'in 0..3')


def test_with_cp_names_stages_that_are_built(name):
    with pytest.raises(ValueError, match=r'with_cp=\(2,\), .* in 0\.\.1$'):
        build(name, with_cp=(2,), out_indices=(1,))


def test_layer_depths(name):
    model = build(name)
    depths = {'patch_embed': 0, 'layers.0.blocks.0': 1,
              'layers.0.downsample': 2, 'layers.1.blocks.0': 2, 'layers.1.blocks.1': 3,
              'layers.1.downsample': 4, 'layers.2.blocks.0': 4,
              'layers.2.downsample': 5, 'layers.3.blocks.0': 5, 'outnorm': 6}
    found = set()
    for parameter, _ in model.named_parameters():
        part = next(part for part in depths if parameter.startswith(part))
        assert model.get_layer_depth(parameter) == (depths[part], 7)
        found.add(part)
    assert found == set(depths)


@pytest.mark.parametrize('parameter, depth', [
    ('backbone.patch_embed.weight', 0), ('backbone.layers.1.blocks.1.norm.weight', 3), ('backbone.outnorm0.bias', 4),
    ('neck.layers.0.blocks.0.weight', 4), ('layers.0.blocks.0.weight', 4)], ids=str)
def test_layer_depth_with_a_prefix(name, parameter, depth):
    model = build(name, out_indices=(0, 1))
    assert model.get_layer_depth(parameter, 'backbone.') == (depth, 5)


@pytest.mark.parametrize('training', [True, False], ids=['training', 'evaluation'])
@pytest.mark.parametrize('height, width', [(64, 64), (65, 97)])
def test_outputs_are_channels_last_in_memory(name, height, width, training):
    features = build(name).train(training)(image(height, width))
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in features)
