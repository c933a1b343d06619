"""The classifiers of the ImageNet configs: parity with the authors' own, and their checkpoints."""
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / 'tests' / 'data' / 'golden'
spec = importlib.util.spec_from_file_location('golden_rule', GOLDEN / 'rule.py')
rule = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rule)

LOGITS = 2e-5  # relative, fp32

# Parameters of the authors' classifiers.
PARAMETERS = {
    'spatialmamba_t': 26_748_862, 'spatialmamba_s': 43_074_280, 'spatialmamba_b': 95_745_592,
    'quadmamba_li': 6_598_944, 'quadmamba_t': 11_514_416, 'quadmamba_s': 31_252_176, 'quadmamba_b': 50_694_096,
}
MICRO = ['spatialmamba_micro', 'quadmamba_micro']


def golden(name):
    """A description of the authors' classifier, its weights by their names, its image and the logits of that."""
    meta = json.loads((GOLDEN / f'{name}.json').read_text())
    weights = {key: torch.from_numpy(value) for key, value in rule.state_dict(meta['classifier_shapes']).items()}
    image = torch.from_numpy(rule.image(name, meta['image']))
    return meta, weights, image, torch.from_numpy(np.load(GOLDEN / f'{name}.npz')['eval_logits'])


def build(config, arch=None, classes=1000):
    """The model of an ImageNet config, or a smaller one."""
    cfg = Config.fromfile(ROOT / 'configs' / f'{config}_in1k.py')
    if arch:
        cfg.model.backbone.arch = arch
        cfg.model.head.update(in_channels=8 * arch['embed_dims'], num_classes=classes)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    return MODELS.build(cfg.model).eval()


def build_micro(name):
    config = golden(name)[0]['config']
    arch = dict(embed_dims=config['dims'], depths=config['depths'])
    return build(name.replace('micro', 's'), arch, classes=10)


def older_names(weights):
    """A QuadMamba checkpoint as the first releases named it."""
    def older(name):
        name = name.removeprefix('classifier.')
        return name.replace('.op.', '.self_attention.').replace('.norm.', '.ln_1.') if 'blocks' in name else name
    return {older(name): value for name, value in weights.items()}


def error(value, expected):
    return float((value.double() - expected).norm() / expected.double().norm())


@pytest.mark.parametrize('name', PARAMETERS)
def test_logits_and_parameters(name):
    model, (_, weights, image, logits) = build(name), golden(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    model.load_state_dict({'model': weights})
    with torch.inference_mode():
        assert error(model(image), logits) <= LOGITS


def by_load_state_dict(model, checkpoint, file):
    model.load_state_dict(checkpoint)


def by_mmengine(model, checkpoint, file):
    torch.save(checkpoint, file)
    load_checkpoint(model, str(file), map_location='cpu', strict=True)


@pytest.mark.parametrize('load', [by_load_state_dict, by_mmengine])
@pytest.mark.parametrize('wrap', [
    lambda weights: weights,
    lambda weights: {'model': weights, 'model_ema': {}, 'epoch': 299},
    lambda weights: {'model': {f'module.{name}': value for name, value in weights.items()}},
], ids=['bare', 'model', 'module'])
@pytest.mark.parametrize('name', MICRO)
def test_authors_file(name, wrap, load, tmp_path):
    model, (_, weights, image, logits) = build_micro(name), golden(name)
    names = set(weights)
    load(model, wrap(weights), tmp_path / 'authors.pth')
    with torch.inference_mode():
        assert error(model(image), logits) <= LOGITS
    assert set(weights) == names


def test_older_names_of_quadmamba():
    model, (_, weights, image, logits) = build_micro('quadmamba_micro'), golden('quadmamba_micro')
    model.load_state_dict({'model': older_names(weights)})
    with torch.inference_mode():
        assert error(model(image), logits) <= LOGITS


def ending(weights, *ends):
    return [name for name in weights if name.endswith(ends) and 'layers' not in name]


@pytest.mark.parametrize('name', MICRO)
@pytest.mark.parametrize('edit, reported', [
    (lambda weights: weights.update(typo=torch.zeros(1)), 'backbone.typo'),
    (lambda weights: weights.pop(*ending(weights, 'head.bias')), 'head.fc.bias'),
    (lambda weights: weights.pop(*ending(weights, 'norm.bias')[-1:]), 'backbone.outnorm3.bias'),
    (lambda weights: weights.update({ending(weights, 'head.bias')[0]: torch.zeros(9)}), 'head.fc.bias'),
], ids=['unexpected', 'no head', 'no norm', 'other classes'])
def test_what_does_not_fit_is_reported(name, edit, reported):
    model, (_, weights, _, _) = build_micro(name), golden(name)
    edit(weights)
    with pytest.raises(RuntimeError, match=reported):
        model.load_state_dict({'model': weights})


def test_own_checkpoint():
    model, other = build_micro('spatialmamba_micro'), build_micro('spatialmamba_micro')
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    other.load_state_dict(model.state_dict())
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def test_foreign_checkpoint():
    """Its own names are in the message."""
    with pytest.raises(RuntimeError, match='"conv1.weight"'):
        build_micro('spatialmamba_micro').load_state_dict({'state_dict': {'conv1.weight': torch.zeros(1)}})
