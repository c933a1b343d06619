"""What belongs to the gated LayerNorm alone."""
import math

import pytest
import torch
from kernel_testing import Call, room
from mmengine.analysis import FlopAnalyzer

from mmvssm.kernels import norm_gate, norm_gate_reference, use_backend

CASES = room('norm_gate', 'cases').CASES


def inputs(name, dtype=torch.float64):
    return room('norm_gate', 'cases').inputs(CASES[name], dtype)


def norm_gate_by_scalars(x, z, weight, bias, eps):
    """The docstring's equation one number at a time."""
    y = torch.zeros_like(x)
    for row, gates, out in zip(x.flatten(0, -2), z.flatten(0, -2), y.flatten(0, -2)):
        mean = sum(row.tolist()) / len(row)
        variance = sum((value - mean)**2 for value in row.tolist()) / len(row)
        for d, (value, gate) in enumerate(zip(row.tolist(), gates.tolist())):
            normed = (value - mean) / math.sqrt(variance + eps) * weight[d] + bias[d]
            out[d] = normed * gate / (1 + math.exp(-gate))
    return y


def test_reference_computes_the_equation():
    tensors = inputs('tiny')
    torch.testing.assert_close(norm_gate_reference(**tensors, eps=0.1), norm_gate_by_scalars(**tensors, eps=0.1))


@pytest.mark.parametrize('backend', ['cpu', 'torch'])
@pytest.mark.parametrize('shape', [(3,), (2, 3), (2, 1, 4, 3)], ids=str)
def test_any_leading_dimensions_and_eps(backend, shape):
    Call('norm_gate', 'tiny', backend).inputs(torch.float64)  # or skip
    g = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, *shape, generator=g, dtype=torch.float64)
    weight, bias = torch.randn(2, 3, generator=g, dtype=torch.float64)
    arguments = (x, z, weight, bias, 0.1)
    with use_backend(backend):
        y = norm_gate(*arguments)
    torch.testing.assert_close(y, norm_gate_reference(*arguments))


@pytest.mark.parametrize('backend', ['cpu', 'torch'])
@pytest.mark.parametrize('value', [1e4, 0.0])
def test_extreme_activations(backend, value):
    call = Call('norm_gate', 'dim_40', backend)
    tensors = call.inputs(torch.float32)
    for name in 'xz':
        tensors[name] = value * tensors[name].sign()
    got = call.evaluate(tensors)
    assert all(t.isfinite().all() for t in got.values())
    call.check(got, call.expected(tensors))


BAD_INPUTS = {
    'x-dims': (dict(x=lambda t: t[0, 0, 0]), ValueError, r'x has shape \(\), expected \(..., D\)'),
    'x-dtype': (dict(x=lambda t: t.int()), TypeError, 'x has dtype torch.int32'),
    'x-none': (dict(x=lambda t: None), TypeError, 'x is a NoneType, expected a Tensor'),
    'z-shape': (dict(z=lambda t: t[:1]), ValueError, r'z has shape \(1, 3, 4\), expected.* \(2, 3, 4\)'),
    'z-device': (dict(z=lambda t: t.to('meta')), ValueError, 'one device, got x on cpu, z on meta'),
    'weight-none': (dict(weight=lambda t: None), TypeError, 'weight is a NoneType, expected a Tensor'),
    'weight-shape': (dict(weight=lambda t: t[1:]), ValueError, r'weight has shape \(3,\), expected.* \(4,\)'),
    'bias-shape': (dict(bias=lambda t: t[1:]), ValueError, r'bias has shape \(3,\), expected.* \(4,\)'),
}


@pytest.mark.parametrize('changes, error, message', BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input(changes, error, message):
    tensors = inputs('tiny')
    tensors.update({name: change(tensors[name]) for name, change in changes.items()})
    with pytest.raises(error, match='^norm_gate: .*' + message):
        norm_gate(**tensors)


def test_flops():
    tensors = inputs('tiny')

    class Model(torch.nn.Module):

        def forward(self, *args):
            return norm_gate(*args)

    flops = FlopAnalyzer(Model(), tuple(tensors.values())).by_operator()
    assert flops == {'norm_gate': 5 * tensors['x'].numel()}
