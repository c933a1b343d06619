"""Parity with the authors' own models and CUDA kernels; see tests/data/golden/README.md."""
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mmvssm.kernels import use_backend
from mmvssm.kernels._core.extension import why_not_loaded
from mmvssm.models.backbones import SpatialMamba

GOLDEN = Path(__file__).parents[1] / 'data' / 'golden'
spec = importlib.util.spec_from_file_location('golden_rule', GOLDEN / 'rule.py')
rule = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rule)

FEATURES, GRADIENTS = 2e-5, 2e-4  # relative, fp32


BACKENDS = [pytest.param('cpu', marks=pytest.mark.skipif(bool(why_not_loaded()), reason=str(why_not_loaded()))),
            'torch']


def load(name, **kwargs):
    """The backbone with golden weights, its image, the expected arrays and the description."""
    meta = json.loads((GOLDEN / f'{name}.json').read_text())
    arch = dict(embed_dims=meta['config']['dims'], depths=meta['config']['depths'])
    model = SpatialMamba(arch, **kwargs)
    model.load_state_dict(tensors(meta['backbone_shapes']))
    image = torch.from_numpy(rule.image(name, meta['image']))
    return model, image, np.load(GOLDEN / f'{name}.npz'), meta


def tensors(shapes):
    return {name: torch.from_numpy(array) for name, array in rule.state_dict(shapes).items()}


def error(value, expected):
    expected = torch.from_numpy(np.asarray(expected))
    assert value.shape == expected.shape
    return float((value.double() - expected).norm() / expected.double().norm())


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('name', ['micro', 't', 's', 'b'])
def test_features(name, backend):
    name = f'spatialmamba_{name}'
    model, image, expected, _ = load(name)
    with torch.inference_mode(), use_backend(backend):
        features = model.eval()(image)
    errors = [error(f, expected[f'eval_feat{i}']) for i, f in enumerate(features)]
    assert max(errors) <= FEATURES, errors


@pytest.mark.parametrize('name', ['micro', 't', 's', 'b'])
def test_logits_from_the_classification_checkpoint(name):
    name = f'spatialmamba_{name}'
    _, image, expected, meta = load(name)
    arch = dict(embed_dims=meta['config']['dims'], depths=meta['config']['depths'])
    weights = tensors(meta['classifier_shapes'])
    model = SpatialMamba(arch, out_indices=(3,)).eval()
    model.load_state_dict({'model': weights})
    with torch.inference_mode():
        pooled = model(image)[0].mean((2, 3))
        logits = torch.nn.functional.linear(pooled, weights['head.weight'], weights['head.bias'])
    assert error(logits, expected['eval_logits']) <= FEATURES


@pytest.fixture(scope='module', params=BACKENDS)
def trained(request):
    """Gradients of the golden loss by parameter name, and what they should be."""
    name = 'spatialmamba_micro'
    model, image, expected, _ = load(name, norm_eval=True, drop_path_rate=0.)
    image.requires_grad_()
    with use_backend(request.param):
        features = model.train()(image)
        loss = sum((f * torch.from_numpy(rule.cotangent(name, i, f.shape))).sum() / f.numel()
                   for i, f in enumerate(features))
        loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()} | {'image': image.grad}
    return features, loss, grads, expected


def test_features_in_training(trained):
    features, loss, _, expected = trained
    for i, feature in enumerate(features):
        assert error(feature.detach(), expected[f'train_feat{i}']) <= FEATURES
    assert loss.item() == pytest.approx(float(expected['loss']), rel=1e-4)


def test_every_gradient(trained):
    _, _, grads, expected = trained
    names = {key.removeprefix('grad:') for key in expected.files if key.startswith('grad:')}
    assert set(grads) == names
    errors = {name: error(grads[name], expected[f'grad:{name}']) for name in names}
    assert {name: e for name, e in errors.items() if not e <= GRADIENTS} == {}


@pytest.mark.parametrize('arch, name, parameters', [
    ('tiny', 't', 26_748_862), ('small', 's', 43_074_280), ('base', 'b', 95_745_592)])
def test_parameter_count_of_the_classifier(arch, name, parameters):
    backbone = SpatialMamba(arch, out_indices=(3,))
    head = torch.nn.Linear(backbone.out_channels[0], 1000)
    assert sum(p.numel() for m in (backbone, head) for p in m.parameters()) == parameters
    meta = json.loads((GOLDEN / f'spatialmamba_{name}.json').read_text())
    own = {n: list(t.shape) for n, t in SpatialMamba(arch).state_dict().items()}
    assert own == meta['backbone_shapes']
