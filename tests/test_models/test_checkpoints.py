"""Loading: the authors' files as they are, ours, and files that do not fit."""
import logging

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub, MMLogger
from mmengine.runner import load_checkpoint
from torch import nn

from mmvssm.models.backbones import QuadMamba, SpatialMamba

MICRO = dict(embed_dims=8, depths=(1, 1, 1, 1))


def build(family=SpatialMamba, **kwargs):
    torch.manual_seed(0)
    return family(MICRO, **kwargs)


def dense_weights(family=SpatialMamba):
    """The names of the authors' dense models, with values unlike any fresh backbone's."""
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randint(-9, 9, t.shape, generator=generator).to(t.dtype)
            for name, t in build(family).state_dict().items()}


def classifier_weights(family=SpatialMamba, classes=5):
    weights = {n: t for n, t in dense_weights(family).items() if not n.startswith('outnorm')}
    norm, head = family.classifier_prefixes
    return weights | {f'{norm}weight': torch.full((64,), 3.), f'{norm}bias': torch.full((64,), 4.),
                      f'{head}weight': torch.zeros(classes, 64), f'{head}bias': torch.zeros(classes)}


def prefixed(weights, prefix):
    return {prefix + name: t for name, t in weights.items()}


WRAPPED = {
    'bare': lambda w: w,
    'model': lambda w: {'model': w, 'model_ema': {n: t + 1 for n, t in w.items()}, 'epoch': 3},
    'model_ema': lambda w: {'model_ema': w},
    'state_dict': lambda w: {'state_dict': w, 'meta': {'epoch': 3}},
    'module': lambda w: prefixed(w, 'module.'),
    'runner': lambda w: {'state_dict': prefixed(w, 'backbone.') | {'neck.conv.weight': torch.zeros(1)}},
    'distributed runner': lambda w: {'state_dict': prefixed(w, 'module.backbone.')},
}


@pytest.fixture(params=WRAPPED)
def wrap(request):
    return WRAPPED[request.param]


@pytest.fixture(params=[SpatialMamba, QuadMamba], ids=lambda family: family.__name__)
def family(request):
    return request.param


def assert_loaded(model, weights):
    assert all(torch.equal(t, weights[n]) for n, t in model.state_dict().items())


def test_dense_checkpoint(family, wrap):
    model, weights = build(family), dense_weights(family)
    model.load_state_dict(wrap(weights))
    assert_loaded(model, weights)


def test_classifier_for_dense_tasks_keeps_fresh_output_norms(family, wrap):
    model, weights = build(family), classifier_weights(family)
    fresh = {n: t.clone() for n, t in model.state_dict().items() if n.startswith('outnorm')}
    model.load_state_dict(wrap(weights))
    assert_loaded(model, weights | fresh)


def test_classifier_for_classification_keeps_its_norm(family, wrap):
    model, weights = build(family, out_indices=(3,)), classifier_weights(family)
    model.load_state_dict(wrap(weights))
    norm = family.classifier_prefixes[0]
    assert_loaded(model, weights | {f'outnorm3.{k}': weights[norm + k] for k in ('weight', 'bias')})


def test_own_classifier_for_dense_tasks_keeps_fresh_output_norms(family, wrap):
    """Its backbone has the last stage's output norm alone, the classifier's final norm."""
    weights = dense_weights(family)
    own = {n: t for n, t in weights.items() if not n.startswith(('outnorm0', 'outnorm1', 'outnorm2'))}
    model = build(family)
    fresh = {n: t.clone() for n, t in model.state_dict().items() if n.startswith('outnorm')}
    model.load_state_dict(wrap(own))
    assert_loaded(model, weights | fresh)
    last = build(family, out_indices=(3,))
    last.load_state_dict(wrap(own))
    assert_loaded(last, weights)
    earlier = build(family, out_indices=(2,))
    fresh = {n: t.clone() for n, t in earlier.state_dict().items() if n.startswith('outnorm')}
    earlier.load_state_dict(wrap(own))
    assert_loaded(earlier, weights | fresh)


def older_names(weights):
    """Of QuadMamba's first files."""
    return {name.replace('.norm.', '.ln_1.').replace('.op.', '.self_attention.')
            .replace('classifier.ln_1.', 'norm.').replace('classifier.head.', 'head.'): t
            for name, t in weights.items()}


@pytest.mark.parametrize('weights', [dense_weights, classifier_weights])
def test_older_names_of_quadmamba(weights, wrap):
    weights = weights(QuadMamba)
    assert {'layers.0.blocks.0.ln_1.weight', 'layers.0.blocks.0.self_attention.Ds'} <= set(older_names(weights))
    expected, model = build(QuadMamba, out_indices=(3,)), build(QuadMamba, out_indices=(3,))
    expected.load_state_dict(weights)
    model.load_state_dict(wrap(older_names(weights)))
    assert_loaded(model, expected.state_dict())


def test_init_cfg_takes_the_file(family, wrap, tmp_path):
    weights, file = dense_weights(family), tmp_path / 'authors.pth'
    torch.save(wrap(weights), file)
    model = build(family, init_cfg=dict(type='Pretrained', checkpoint=str(file)))
    model.init_weights()
    assert_loaded(model, weights)


def test_fewer_stages_take_their_part_of_the_file():
    model, weights = build(out_indices=(0, 1)), dense_weights()
    model.load_state_dict(weights)
    assert_loaded(model, weights)


def test_inside_a_detector(family, tmp_path):
    """MMEngine loads submodules one by one, with a prefix."""
    detector = nn.ModuleDict(dict(backbone=build(family), neck=nn.Linear(2, 2)))
    weights, file = classifier_weights(family), tmp_path / 'detector.pth'
    torch.save({'state_dict': prefixed(weights, 'backbone.') | prefixed(nn.Linear(2, 2).state_dict(), 'neck.')},
               file)
    fresh = {n: t.clone() for n, t in build(family).state_dict().items() if n.startswith('outnorm')}
    load_checkpoint(detector, str(file), strict=True)
    assert_loaded(detector['backbone'], weights | fresh)


def test_what_is_not_loaded_is_logged():
    MMLogger.get_instance('test_checkpoints').handlers[0].setLevel(logging.CRITICAL)
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    MMLogger.get_current_instance().addHandler(handler)
    try:
        build().load_state_dict(classifier_weights())
    finally:
        MMLogger.get_current_instance().removeHandler(handler)
    text = '\n'.join(lines)
    assert all(name in text for name in ('not used', 'head.weight', 'norm.bias'))
    assert all(name in text for name in ('kept as initialised', 'outnorm0.weight', 'outnorm3.bias'))


@pytest.mark.parametrize('init_cfg', [
    lambda file: [dict(type='Pretrained', checkpoint=file)],
    lambda file: dict(type='Pretrained', checkpoint=file, prefix='backbone.'),
], ids=['list', 'prefix'])
def test_file_of_a_runner(init_cfg, tmp_path):
    """It holds MMEngine's message hub and optimizer beside the weights."""
    detector = nn.Module()
    detector.backbone = build()
    detector.backbone.load_state_dict(dense_weights())
    hub = MessageHub.get_instance('test_file_of_a_runner')
    hub.update_scalar('train/loss', 0.5)
    hub.update_info('seed', np.int64(3))
    torch.save({'state_dict': detector.state_dict(), 'message_hub': hub.state_dict(), 'meta': {'iter': 1},
                'optimizer': torch.optim.AdamW(detector.parameters()).state_dict()}, tmp_path / 'epoch_1.pth')
    model = build(init_cfg=init_cfg(str(tmp_path / 'epoch_1.pth')))
    model.init_weights()
    assert_loaded(model, dense_weights())


def test_prefix_that_no_name_has(tmp_path):
    torch.save(dense_weights(), tmp_path / 'f.pth')
    model = build(init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'f.pth'), prefix='wrong.'))
    with pytest.raises(ValueError, match="prefix='wrong.'.*f.pth"):
        model.init_weights()


@pytest.mark.parametrize('checkpoint', [None, ''])
def test_no_file(checkpoint):
    with pytest.raises(ValueError, match='init_cfg has checkpoint='):
        build(init_cfg=dict(type='Pretrained', checkpoint=checkpoint)).init_weights()


@pytest.mark.parametrize('stray', ['layers.0.typo', 'patch_embed.typo', 'unheard.of'])
def test_stray_name_beside_the_backbone_is_reported(stray):
    weights = prefixed(dense_weights(), 'backbone.') | {stray: torch.zeros(1)}
    with pytest.raises(RuntimeError, match=stray):
        build().load_state_dict(weights)


@pytest.mark.parametrize('change, reported', [
    (lambda w: w.pop('layers.0.blocks.0.ln_1.weight'), 'layers.0.blocks.0.ln_1.weight'),
    (lambda w: w.update({'layers.0.blocks.0.extra': torch.zeros(1)}), 'layers.0.blocks.0.extra'),
    (lambda w: w.update({'patch_embed.conv1.conv.weight': torch.zeros(4, 3, 5, 5)}),
     'patch_embed.conv1.conv.weight'),
    (lambda w: w.pop('outnorm2.bias'), 'outnorm2.bias'),
], ids=['missing', 'unexpected', 'shape', 'norm'])
@pytest.mark.parametrize('by', ['load_state_dict', 'init_cfg'])
def test_mismatch_is_reported_by_key_and_raises(change, reported, by, tmp_path):
    weights = dense_weights()
    change(weights)
    if by == 'load_state_dict':
        with pytest.raises(RuntimeError, match=reported):
            build().load_state_dict(weights)
    else:
        torch.save({'model': weights}, tmp_path / 'f.pth')
        model = build(init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'f.pth')))
        with pytest.raises(RuntimeError, match=reported) as raised:
            model.init_weights()
        assert 'f.pth' in str(raised.value)


def foreign(path):
    torch.save({'state_dict': nn.Linear(2, 2).state_dict()}, path)


def truncated(path):
    torch.save(dense_weights(), path)
    path.write_bytes(path.read_bytes()[:-1000])


def code(path):
    torch.save({'model': print}, path)


class Attribute:
    """Pickles as a call of getattr that would reach code."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, '__init__')


def attribute(path):
    torch.save({'model': Attribute()}, path)


@pytest.mark.parametrize('write, error, words', [
    (lambda path: None, FileNotFoundError, ['no such file', 'init_cfg']),
    (foreign, RuntimeError, ['does not fit', 'bias', 'patch_embed.conv1.conv.weight']),
    (truncated, ValueError, ['cannot be read', 'truncated']),
    (lambda path: path.write_text('<html>not found</html>'), ValueError, ['cannot be read']),
    (lambda path: path.write_bytes(b''), ValueError, ['0 bytes', 'cannot be read']),
    (code, ValueError, ['more than weights']),
    (attribute, ValueError, ['more than weights', '__init__']),
    (lambda path: path.mkdir(), FileNotFoundError, ['no such file']),
    (lambda path: torch.save([torch.zeros(1)], path), ValueError, ['list', 'dict']),
], ids=['missing', 'foreign', 'truncated', 'text', 'empty', 'code', 'attribute', 'folder', 'list'])
def test_unfit_file_raises(write, error, words, tmp_path):
    file = tmp_path / 'bad.pth'
    write(file)
    model = build(init_cfg=dict(type='Pretrained', checkpoint=str(file)))
    with pytest.raises(error) as raised:
        model.init_weights()
    assert all(word in str(raised.value) for word in ['bad.pth', *words])


def test_own_checkpoint_round_trip():
    model, other = build(), build(out_indices=(0, 1, 2, 3))
    weights = dense_weights()
    model.load_state_dict(weights)
    other.load_state_dict(model.state_dict())
    assert_loaded(other, weights)
