"""What belongs to the depthwise convolution alone."""
import math

import pytest
import torch
from kernel_testing import Call, room
from mmengine.analysis import FlopAnalyzer

from mmvssm.kernels import depthwise_conv, depthwise_conv_reference

CASES = room('depthwise_conv', 'cases').CASES


def inputs(name, dtype=torch.float64):
    return room('depthwise_conv', 'cases').inputs(CASES[name], dtype)


def conv_by_scalars(x, weight, bias, residual, silu):
    """The docstring's equations one number at a time."""
    batch, height, width, dim = x.shape
    y = torch.zeros(x.shape, dtype=torch.float64)
    for b, row, column, d in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
        value = 0.0 if bias is None else bias[d].item()
        for i in range(3):
            for j in range(3):
                if 0 <= row + i - 1 < height and 0 <= column + j - 1 < width:
                    value += (weight[d, 0, i, j] * x[b, row + i - 1, column + j - 1, d]).item()
        value = value / (1 + math.exp(-value)) if silu else value
        y[b, row, column, d] = value + (x[b, row, column, d] if residual else 0)
    return y


@pytest.mark.parametrize('residual', [False, True], ids=['plain', 'residual'])
@pytest.mark.parametrize('silu', [False, True], ids=['linear', 'silu'])
@pytest.mark.parametrize('name', ['tiny', 'tiny-silu'])
def test_reference_computes_the_equations(name, silu, residual):
    tensors = inputs(name)
    torch.testing.assert_close(depthwise_conv_reference(**tensors, residual=residual, silu=silu),
                               conv_by_scalars(**tensors, residual=residual, silu=silu))


@pytest.mark.parametrize('backend', ['cpu', 'torch'])
@pytest.mark.parametrize('value', [1e4, 0.0])
def test_extreme_activations(backend, value):
    call = Call('depthwise_conv', 'silu-residual', backend)
    tensors = call.inputs(torch.float32)
    tensors['x'] = value * tensors['x'].sign()
    tensors['bias'] = value * tensors['bias']
    got = call.evaluate(tensors)
    assert all(t.isfinite().all() for t in got.values())
    call.check(got, call.expected(tensors))


BAD_INPUTS = {
    'x-dims': (dict(x=lambda t: t[0]), ValueError, r'x has shape \(2, 3, 2\), expected \(batch, H, W, D\)'),
    'x-rows': (dict(x=lambda t: t[:, :0]), ValueError, r'x has 0 rows, expected 1 or more.* \(2, 0, 3, 2\)'),
    'x-columns': (dict(x=lambda t: t[:, :, :0]), ValueError, 'x has 0 columns, expected 1 or more'),
    'x-channels': (dict(x=lambda t: t[..., :0]), ValueError, 'x has 0 channels, expected 1 or more'),
    'x-dtype': (dict(x=lambda t: t.byte()), TypeError, 'x has dtype torch.uint8'),
    'weight-shape': (dict(weight=lambda t: t[:1]), ValueError,
                     r'weight has shape \(1, 1, 3, 3\), expected \(D, 1, 3, 3\) = \(2, 1, 3, 3\)'),
    'weight-size': (dict(weight=lambda t: t[..., :2]), ValueError, r'weight has shape \(2, 1, 3, 2\)'),
    'weight-device': (dict(weight=lambda t: t.to('meta')), ValueError, 'one device, got x on cpu, weight on meta'),
    'bias-shape': (dict(bias=lambda t: t[:1]), ValueError, r'bias has shape \(1,\), expected \(D,\) = \(2,\)'),
    'bias-dtype': (dict(bias=lambda t: t.bool()), TypeError, 'bias has dtype torch.bool'),
    'activation': (dict(activation=lambda t: 'gelu'), ValueError, "activation is 'gelu', expected 'silu' or None"),
}


@pytest.mark.parametrize('changes, error, message', BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input(changes, error, message):
    arguments = dict(**inputs('tiny'), activation=None)
    arguments.update({name: change(arguments[name]) for name, change in changes.items()})
    with pytest.raises(error, match='^depthwise_conv: .*' + message):
        depthwise_conv(**arguments)


@pytest.mark.parametrize('name', ['7x7', 'no_bias-silu'])
def test_flops(name):
    tensors = {key: t for key, t in inputs(name).items() if t is not None}

    class Model(torch.nn.Module):

        def forward(self, *args):
            return depthwise_conv(*args, activation=CASES[name].activation)

    flops = FlopAnalyzer(Model(), tuple(tensors.values())).by_operator()
    assert flops == {'depthwise_conv': 9 * tensors['x'].numel()}
