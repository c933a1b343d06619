"""What every backbone of the package guarantees, whatever its kind."""
import copy
import warnings

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from mmvssm.models import backbones
from mmvssm.models.layers.backbone import VisionSSM
from mmvssm.models.layers.mlp import MLP

MICRO = dict(embed_dims=8, depths=(1, 2, 1, 1))
NAMES = backbones.__all__


def build(name, **kwargs):
    torch.manual_seed(0)
    return MODELS.build(dict(type=name, arch=MICRO, **kwargs))


def image(height=64, width=64, channels=3, batch=2):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.mark.parametrize('scope', ['mmengine', 'mmdet', 'mmseg', 'mmpretrain'])
def test_builds_by_plain_name_in_every_library(name, scope):
    if scope == 'mmengine':
        registry = MODELS
    else:
        registry = pytest.importorskip(f'{scope}.registry').MODELS
    assert isinstance(registry.build(dict(type=name, arch=MICRO)), VisionSSM)


@pytest.mark.parametrize('height, width', [(64, 64), (65, 97), (33, 31), (7, 200), (1, 1), (224, 32)])
def test_any_size(name, height, width):
    model = build(name).eval()
    with torch.inference_mode():
        features = model(image(height, width))
    sides = (height, width)
    for _ in range(2):
        sides = tuple(-(-s // 2) for s in sides)
    for feature, channels in zip(features, model.out_channels, strict=True):
        assert tuple(feature.shape) == (2, channels, *sides)
        assert feature.isfinite().all()
        sides = tuple(-(-s // 2) for s in sides)


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'training'])
def test_device_meta_tells_shapes(name, training):
    model = build(name).train(training)
    expected = [f.shape for f in model(image(40, 65))]
    model.to('meta')
    features = model(image(40, 65).to('meta'))
    assert [f.shape for f in features] == expected
    sum(f.sum() for f in features).backward()
    assert all(p.grad.is_meta and p.grad.shape == p.shape for p in model.parameters())


def test_every_parameter_gets_a_gradient(name):
    model = build(name)
    sum(f.square().sum() for f in model(image())).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize('out_indices', [(0,), (1, 2), (3,), (-1,), 2])
def test_out_indices(name, out_indices):
    whole, part = build(name).eval(), build(name, out_indices=out_indices)
    part.load_state_dict(whole.state_dict())
    with torch.inference_mode():
        expected, features = whole(image()), part.eval()(image())
    assert len(features) == len(part.out_indices)
    for feature, i in zip(features, part.out_indices, strict=True):
        assert torch.equal(feature, expected[i])
    sum(f.square().sum() for f in part(image())).backward()
    assert [n for n, p in part.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 4])
def test_with_cp_changes_nothing(name, frozen_stages):
    grads = []
    for with_cp in (False, True):
        model = build(name, with_cp=with_cp, drop_path_rate=0.5, frozen_stages=frozen_stages)
        x = image().requires_grad_()
        torch.manual_seed(3)
        features = model.train()(x)
        sum(f.square().sum() for f in features).backward()
        grads.append([*features, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize('frozen_stages', [0, 2])
def test_frozen_stages(name, frozen_stages):
    model = build(name, frozen_stages=frozen_stages).train()
    frozen = [model.patch_embed, *model.layers[:frozen_stages]]
    assert not any(p.requires_grad for m in frozen for p in m.parameters())
    assert not any(m.training for part in frozen for m in part.modules())
    free = {id(p) for p in model.parameters()} - {id(p) for m in frozen for p in m.parameters()}
    assert all(p.requires_grad for p in model.parameters() if id(p) in free)
    before = copy.deepcopy(model.state_dict())
    model(image())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items()
               if n.startswith(('patch_embed.', *(f'layers.{i}.' for i in range(frozen_stages)))))


def test_norm_eval_keeps_batch_norm_in_eval_mode(name):
    norms = [m for m in build(name, norm_eval=True).train().modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(m.training for m in norms)


def test_train_and_eval_return_self(name):
    model = build(name)
    assert model.train() is model
    assert model.eval() is model


def test_evaluation_follows_the_weights(name):
    model = build(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for _ in range(3):
        with torch.inference_mode():
            seen.append(model.eval()(image())[-1])
        fresh = build(name).eval()
        fresh.load_state_dict(model.state_dict())
        with torch.inference_mode():
            assert torch.equal(seen[-1], fresh(image())[-1])
        optimizer.zero_grad()
        sum(f.square().mean() for f in model.train()(image())).backward()
        optimizer.step()
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_runs_repeat_bit_for_bit(name):
    runs = []
    for _ in range(2):
        model = build(name, drop_path_rate=0.3).train()
        sum(f.square().sum() for f in model(image())).backward()
        runs.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_image_layout_does_not_matter(name):
    model, x = build(name).eval(), image(40, 56)
    wide = torch.randn(2, 3, 80, 112)
    wide[..., ::2, ::2] = x
    with torch.inference_mode():
        expected = model(x)
        for other in (x.contiguous(memory_format=torch.channels_last), wide[..., ::2, ::2]):
            assert all(torch.equal(a, b) for a, b in zip(expected, model(other), strict=True))


@pytest.mark.parametrize('d_state, mlp_ratio, in_channels', [(3, 2.0, 3), (1, 4.0, 1)])
def test_options(name, d_state, mlp_ratio, in_channels):
    model = build(name, d_state=d_state, mlp_ratio=mlp_ratio, in_channels=in_channels)
    sum(f.square().sum() for f in model(image(channels=in_channels))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.layers[0].blocks[0].mlp.fc1.out_features == int(8 * mlp_ratio)


def test_drop_path_grows_linearly(name):
    model = build(name, drop_path_rate=0.4)
    rates = [block.drop_path.drop_prob for layer in model.layers for block in layer.blocks]
    assert rates == pytest.approx([0.1 * i for i in range(5)])


def test_init_weights_follows_the_seed(name):
    weights = []
    for seed in (0, 0, 1):
        model = build(name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(7)
        torch.manual_seed(seed)
        model.init_weights()
        assert not any((p == 7).all() for p in model.parameters())
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_is_finite_and_close(name, dtype):
    model = build(name)
    expected = model.eval()(image())[-1]
    with torch.autocast('cpu', dtype):
        features = model(image())
        loss = sum(f.float().square().mean() for f in features)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    difference = (features[-1].float() - expected).detach()
    assert difference.norm() < 0.05 * expected.detach().norm()


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_finite_and_close(name, dtype):
    model = build(name).eval()
    with torch.inference_mode():
        expected = model(image())[-1]
        features = model.to(dtype)(image().to(dtype))
    assert {f.dtype for f in features} == {dtype}
    assert (features[-1].float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize('kwargs, words', [
    (dict(arch='huge'), ["arch='huge'", 'tiny']),
    (dict(arch=dict(embed_dims=8)), ['arch=', 'depths']),
    (dict(arch=dict(embed_dims=8, depths=(1, 1, 1))), ["arch['depths']=(1, 1, 1)", '4 positive']),
    (dict(arch=dict(embed_dims=8, depths=(1, 0, 1, 1))), ["arch['depths']=(1, 0, 1, 1)"]),
    (dict(arch=dict(embed_dims=7, depths=(1, 1, 1, 1))), ["arch['embed_dims']=7", 'even']),
    (dict(arch=dict(embed_dims=8, depths=(1, 1, 1, 1), widths=3)), ['widths']),
    (dict(out_indices=(0, 4)), ['out_indices=(0, 4)', '0..3']),
    (dict(arch=dict(embed_dims=8, depths=3)), ["arch['depths']=3", '4 positive']),
    (dict(arch=dict(embed_dims=8, depths=(1, 1, 1, 1), drop_path_rate=2)), ['drop_path_rate=2']),
    (dict(out_indices=()), ['out_indices=()']),
    (dict(out_indices=None), ['out_indices=None']),
    (dict(out_indices=(-5,)), ['out_indices=(-5,)']),
    (dict(out_indices=(1, 0)), ['out_indices=(1, 0)', 'increasing']),
    (dict(in_channels=0), ['in_channels=0', 'positive']),
    (dict(drop_path_rate=1.5), ['drop_path_rate=1.5', '[0, 1)']),
    (dict(drop_path_rate='0.1'), ["drop_path_rate='0.1'"]),
    (dict(frozen_stages=5), ['frozen_stages=5']),
    (dict(d_state=0), ['d_state=0', '1..256']),
    (dict(mlp_ratio=-1), ['mlp_ratio=-1']),
    (dict(mlp_ratio=0.01), ['mlp_ratio=0.01', '1 / embed_dims']),
    (dict(mlp_ratio=None), ['mlp_ratio=None']),
    (dict(mlp_ratio=float('nan')), ['mlp_ratio=nan', 'finite']),
    (dict(mlp_ratio=float('inf')), ['mlp_ratio=inf', 'finite']),
    (dict(frozen_stages=True), ['frozen_stages=True', '-1 (none)']),  # a flag is no number of stages
    (dict(out_indices=True), ['out_indices=True', '0..3']),
    (dict(d_state=True), ['d_state=True', '1..256']),
    (dict(compile=dict(modes='default')), ["compile={'modes': 'default'}", 'torch.compile', "'modes'"]),
], ids=lambda v: next(iter(v)) if isinstance(v, dict) else '')
def test_bad_argument_is_named(name, kwargs, words):
    with pytest.raises(ValueError) as raised:
        MODELS.get(name)(**{'arch': MICRO, **kwargs})
    assert all(word in str(raised.value) for word in [name, *words])


@pytest.mark.parametrize('x, error, words', [
    (torch.zeros(1, 4, 32, 32), ValueError, ['(1, 4, 32, 32)', 'in_channels=3']),
    ([torch.zeros(3, 32, 32)], TypeError, ['list', 'tensor']),
    (torch.zeros(3, 32, 32), ValueError, ['(3, 32, 32)', '(B, 3, H, W)']),
    (torch.zeros(1, 3, 0, 32), ValueError, ['(1, 3, 0, 32)']),
    (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, ['uint8', 'normalise']),
    (torch.zeros(1, 3, 32, 32, dtype=torch.float64), TypeError, ['float64', 'float32', 'autocast']),
    (torch.zeros(1, 3, 32, 32, device='meta'), ValueError, ['meta', 'cpu']),
], ids=['channels', 'list', 'rank', 'empty', 'integers', 'dtype', 'device'])
def test_bad_input_is_named(name, x, error, words):
    with pytest.raises(error) as raised:
        build(name)(x)
    assert all(word in str(raised.value) for word in words)


def test_arguments_from_a_config_file(name, tmp_path):
    from mmengine.config import Config
    path = tmp_path / 'config.py'
    path.write_text(f"backbone = dict(type='{name}', arch=dict(embed_dims=8, depths=[1, 1, 1, 1]), "
                    'out_indices=[1, 3])')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model = MODELS.build(Config.fromfile(path).backbone)
    assert model.out_indices == (1, 3)


@pytest.mark.parametrize('family, graphs', [(backbones.SpatialMamba, 2), (backbones.QuadMamba, 3)],
                         ids=['SpatialMamba', 'QuadMamba'])
def test_compile_option_compiles_the_backbone_alone(family, graphs):
    """Spatial-Mamba once more for sizes that change, QuadMamba for each."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    arch = dict(embed_dims=16, depths=(1, 1, 1, 1))
    torch.manual_seed(0)
    model = family(arch, compile=dict(backend='aot_eager', fullgraph=True)).eval()
    plain = family(arch).eval()
    plain.load_state_dict(model.state_dict())
    for n, size in enumerate([(192, 256), (256, 192), (288, 320)]):
        image = torch.randn(2, 3, *size)
        with torch.no_grad():
            for got, expected in zip(model(image), plain(image)):
                torch.testing.assert_close(got, expected)
        assert torch._dynamo.utils.counters['stats']['unique_graphs'] == min(n + 1, graphs), size
    torch._dynamo.reset()


def test_compile_option_of_another_type_raises():
    with pytest.raises(ValueError, match="SpatialMamba: compile='yes', expected True, False or a dict"):
        backbones.SpatialMamba(compile='yes')


def test_mlp_calls_hooks_and_leaves_frozen_parameters_alone():
    mlp, called = MLP(8, 32), []
    mlp.fc2.weight.requires_grad_(False)
    x = torch.randn(3, 8, requires_grad=True)
    fast = torch.autograd.grad(mlp(x).sum(), [x, mlp.fc1.weight, mlp.fc2.bias])
    handle = mlp.fc2.register_forward_hook(lambda *args: called.append(1))
    plain = torch.autograd.grad(mlp(x).sum(), [x, mlp.fc1.weight, mlp.fc2.bias])
    handle.remove()
    assert called
    for got, expected in zip(fast, plain):
        torch.testing.assert_close(got, expected)
