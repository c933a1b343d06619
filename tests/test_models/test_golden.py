"""Parity with the authors' own models and CUDA kernels; see tests/data/golden/README.md."""
import importlib.util
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mmvssm.kernels import use_backend
from mmvssm.kernels._core.extension import why_not_loaded
from mmvssm.models.backbones import QuadMamba, SpatialMamba
from mmvssm.models.backbones.quad_mamba import QuadtreeSSM

GOLDEN = Path(__file__).parents[1] / 'data' / 'golden'
spec = importlib.util.spec_from_file_location('golden_rule', GOLDEN / 'rule.py')
rule = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rule)

FEATURES, GRADIENTS = 2e-5, 2e-4  # relative, fp32

FAMILIES = dict(spatialmamba=SpatialMamba, quadmamba=QuadMamba)
NAMES = [f'spatialmamba_{variant}' for variant in ('micro', 't', 's', 'b')]
NAMES += [f'quadmamba_{variant}' for variant in ('micro', 'li', 't', 's', 'b')]

BACKENDS = ['cpu', 'torch']


def describe(name):
    """The class of a golden file's model, its arch and the file's description."""
    meta = json.loads((GOLDEN / f'{name}.json').read_text())
    arch = dict(embed_dims=meta['config']['dims'], depths=meta['config']['depths'])
    return FAMILIES[name.split('_')[0]], arch, meta


def load(name, **kwargs):
    """The backbone with golden weights, its image, the expected arrays and the description."""
    family, arch, meta = describe(name)
    model = family(arch, **kwargs)
    model.load_state_dict(tensors(meta['backbone_shapes']))
    image = torch.from_numpy(rule.image(name, meta['image']))
    return model, image, np.load(GOLDEN / f'{name}.npz'), meta


def skip_without(backend):
    if backend == 'cpu' and why_not_loaded():
        pytest.skip(why_not_loaded())


def tensors(shapes):
    return {name: torch.from_numpy(array) for name, array in rule.state_dict(shapes).items()}


def error(value, expected):
    expected = torch.from_numpy(np.asarray(expected))
    assert value.shape == expected.shape
    return float((value.double() - expected).norm() / expected.double().norm())


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('name', NAMES)
def test_features(name, backend):
    skip_without(backend)
    model, image, expected, _ = load(name)
    with torch.inference_mode(), use_backend(backend):
        features = model.eval()(image)
    errors = [error(f, expected[f'eval_feat{i}']) for i, f in enumerate(features)]
    assert max(errors) <= FEATURES, errors


@pytest.mark.parametrize('name', NAMES)
def test_logits_from_the_classification_checkpoint(name):
    _, image, expected, meta = load(name)
    family, arch, _ = describe(name)
    weights = tensors(meta['classifier_shapes'])
    model = family(arch, out_indices=(3,)).eval()
    model.load_state_dict({'model': weights})
    head = family.classifier_prefixes[1]
    with torch.inference_mode():
        pooled = model(image)[0].mean((2, 3))
        logits = torch.nn.functional.linear(pooled, weights[f'{head}weight'], weights[f'{head}bias'])
    assert error(logits, expected['eval_logits']) <= FEATURES


@pytest.fixture(scope='module', params=itertools.product(['spatialmamba_micro', 'quadmamba_micro'], BACKENDS),
                ids=lambda param: '-'.join(map(str, param)))
def trained(request):
    """Gradients of the golden loss by parameter name, and what they should be."""
    name, backend = request.param
    skip_without(backend)
    model, image, expected, _ = load(name, norm_eval=True, drop_path_rate=0.)
    image.requires_grad_()
    model.train()
    for module in model.modules():
        if isinstance(module, QuadtreeSSM):
            module.training = False  # the golden files have the best window, not a sampled one
    with use_backend(backend):
        features = model(image)
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
    ('tiny', 'spatialmamba_t', 26_748_862), ('small', 'spatialmamba_s', 43_074_280),
    ('base', 'spatialmamba_b', 95_745_592), ('lite', 'quadmamba_li', 6_598_944),
    ('tiny', 'quadmamba_t', 11_514_416), ('small', 'quadmamba_s', 31_252_176), ('base', 'quadmamba_b', 50_694_096)])
def test_parameter_count_of_the_classifier(arch, name, parameters):
    family, _, meta = describe(name)
    backbone = family(arch, out_indices=(3,))
    head = torch.nn.Linear(backbone.out_channels[0], 1000)
    assert sum(p.numel() for m in (backbone, head) for p in m.parameters()) == parameters
    own = {n: list(t.shape) for n, t in family(arch).state_dict().items()}
    assert own == meta['backbone_shapes']
