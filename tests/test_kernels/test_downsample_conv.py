"""What belongs to the convolution of a downsampling alone."""
import pytest
import torch
from kernel_testing import Call, room
from mmengine.analysis import FlopAnalyzer

from mmvssm.kernels import downsample_conv, downsample_conv_reference

CASES = room('downsample_conv', 'cases').CASES


def inputs(name, dtype=torch.float64):
    return room('downsample_conv', 'cases').inputs(CASES[name], dtype)


def conv_by_scalars(x, weight, bias):
    """The docstring's equation one number at a time."""
    batch, height, width, dim = x.shape
    y = torch.zeros(batch, -(-height // 2), -(-width // 2), dim, dtype=torch.float64)
    for b, row, column, d in torch.cartesian_prod(*map(torch.arange, y.shape)).tolist():
        value = bias[d].item()
        for i in range(3):
            for j in range(3):
                if 0 <= 2 * row + i - 1 < height and 0 <= 2 * column + j - 1 < width:
                    value += weight[d, 0, i, j].item() * max(x[b, 2 * row + i - 1, 2 * column + j - 1, d].item(), 0)
        y[b, row, column, d] = max(value, 0)
    return y


@pytest.mark.parametrize('name', ['tiny', '1x8', '8x6'])
def test_reference_computes_the_equation(name):
    tensors = inputs(name)
    torch.testing.assert_close(downsample_conv_reference(**tensors), conv_by_scalars(**tensors))


@pytest.mark.parametrize('backend', ['cpu', 'torch'])
@pytest.mark.parametrize('value', [1e4, 0.0])
def test_extreme_activations(backend, value):
    call = Call('downsample_conv', '13x9', backend)
    tensors = call.inputs(torch.float32)
    tensors['x'] = value * tensors['x'].sign()
    got = call.evaluate(tensors)
    assert all(t.isfinite().all() for t in got.values())
    call.check(got, call.expected(tensors))


@pytest.mark.parametrize('changes, error, message', [
    (dict(x=lambda t: t[0]), ValueError, r'x has shape \(2, 3, 2\), expected \(batch, H, W, D\)'),
    (dict(x=lambda t: t[:, :0]), ValueError, r'x has 0 rows, expected 1 or more.* \(2, 0, 3, 2\)'),
    (dict(x=lambda t: t[:, :, :0]), ValueError, 'x has 0 columns, expected 1 or more'),
    (dict(x=lambda t: t[..., :0]), ValueError, 'x has 0 channels, expected 1 or more'),
    (dict(x=lambda t: t.byte()), TypeError, 'x has dtype torch.uint8'),
    (dict(weight=lambda t: t[:1]), ValueError,
     r'weight has shape \(1, 1, 3, 3\), expected \(D, 1, 3, 3\) = \(2, 1, 3, 3\)'),
    (dict(weight=lambda t: t.to('meta')), ValueError, 'one device, got x on cpu, weight on meta'),
    (dict(bias=lambda t: t[:1]), ValueError, r'bias has shape \(1,\), expected \(D,\) = \(2,\)'),
    (dict(bias=lambda t: t.bool()), TypeError, 'bias has dtype torch.bool'),
], ids=['x-dims', 'x-rows', 'x-columns', 'x-channels', 'x-dtype', 'weight-shape', 'weight-device', 'bias-shape',
        'bias-dtype'])
def test_bad_input(changes, error, message):
    arguments = inputs('tiny')
    arguments.update({name: change(arguments[name]) for name, change in changes.items()})
    with pytest.raises(error, match='^downsample_conv: .*' + message):
        downsample_conv(**arguments)


@pytest.mark.parametrize('name', ['7x7', '8x6'])
def test_flops(name):
    tensors = inputs(name)

    class Model(torch.nn.Module):

        def forward(self, *args):
            return downsample_conv(*args)

    flops = FlopAnalyzer(Model(), tuple(tensors.values())).by_operator()
    assert flops == {'downsample_conv': 9 * downsample_conv(**tensors).numel()}
