"""What belongs to the residual convolution with norm alone."""
import math
from importlib import import_module

import pytest
import torch
from kernel_testing import Call, cotangent_like, expected, leaves, room
from mmengine.analysis import FlopAnalyzer

from mmvssm.kernels import residual_conv_norm, residual_conv_norm_reference, use_backend

OP, BACKENDS = 'residual_conv_norm', ['triton', 'cpu', 'torch']
CASES = room(OP, 'cases').CASES


def inputs(name, dtype=torch.float64):
    return room(OP, 'cases').inputs(CASES[name], dtype)


def by_scalars(x, conv_weight, conv_bias, norm_weight, norm_bias, branch, scale, eps):
    """The docstring's equations one number at a time."""
    batch, height, width, dim = x.shape
    u, y, n = x.clone(), torch.zeros_like(x), torch.zeros_like(x)
    for b, row, column, d in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
        if branch is not None:
            u[b, row, column, d] += branch[b, row, column, d] * (1 if scale is None else scale[b])
    for b, row, column, d in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
        value = u[b, row, column, d] + (0 if conv_bias is None else conv_bias[d])
        for i in range(3):
            for j in range(3):
                if 0 <= row + i - 1 < height and 0 <= column + j - 1 < width:
                    value += conv_weight[d, 0, i, j] * u[b, row + i - 1, column + j - 1, d]
        y[b, row, column, d] = value
    for pixel, out in zip(y.flatten(0, -2).tolist(), n.flatten(0, -2)):
        mean = sum(pixel) / dim
        variance = sum((value - mean)**2 for value in pixel) / dim
        for d, value in enumerate(pixel):
            out[d] = (value - mean) / math.sqrt(variance + eps) * norm_weight[d] + norm_bias[d]
    return y, n


@pytest.mark.parametrize('name', ['tiny', 'tiny-scale', 'tiny-no_branch'])
def test_reference_computes_the_equations(name):
    tensors = inputs(name)
    tensors.update(scale=room(OP, 'cases').scale(CASES[name], tensors['x']), eps=0.1)
    for got, by_hand in zip(residual_conv_norm_reference(**tensors), by_scalars(**tensors)):
        torch.testing.assert_close(got, by_hand)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('value', [1e4, 0.0])
def test_extreme_activations(backend, value):
    call = Call(OP, '7x7', backend)
    tensors = call.inputs(torch.float32)
    for name in ('x', 'branch', 'conv_bias'):
        tensors[name] = value * tensors[name].sign()
    got = call.evaluate(tensors)
    assert all(t.isfinite().all() for t in got.values())
    call.check(got, call.expected(tensors))


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('result', [0, 1], ids=['y', 'n'])
def test_gradient_of_one_result(backend, result):
    tensors = leaves(Call(OP, 'tiny', backend).inputs(torch.float32))
    wide = leaves({name: t.double() for name, t in tensors.items()})
    with use_backend(backend):
        output = residual_conv_norm(**tensors)[result]
        got = torch.autograd.grad(output, list(tensors.values()), cotangent_like(output, 'tiny'), allow_unused=True)
    output = residual_conv_norm_reference(**wide)[result]
    wanted = torch.autograd.grad(output, list(wide.values()), cotangent_like(output.float(), 'tiny').double(),
                                 materialize_grads=True, allow_unused=True)
    for name, g, w in zip(tensors, got, wanted):
        torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('scaled', [False, True], ids=['unscaled', 'scaled'])
def test_branch_in_another_precision(backend, scaled):
    """Each result has the type of ``x``, each gradient that of its argument."""
    tensors = Call(OP, 'tiny', backend).inputs(torch.float32)
    tensors['branch'] = tensors['branch'].bfloat16()
    scale = torch.tensor([0.5, 2.0]) if scaled else None
    results, grads = [], []
    for branch in (tensors['branch'], tensors['branch'].float()):
        args = leaves({**tensors, 'branch': branch})
        with use_backend(backend):
            y, n = residual_conv_norm(**args, scale=scale)
            (y * n).sum().backward()
        assert y.dtype == n.dtype == torch.float32
        results.append((y, n))
        grads.append([t.grad for t in args.values()])
        assert args['branch'].grad.dtype == branch.dtype
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(*grads))


@pytest.mark.parametrize('backend', BACKENDS)
def test_scale_gets_no_gradient(backend):
    tensors = Call(OP, 'tiny', backend).inputs(torch.float32)
    scale = torch.ones(2, requires_grad=True)
    tensors['x'].requires_grad_()
    with use_backend(backend):
        residual_conv_norm(**tensors, scale=scale)[1].sum().backward()
    assert scale.grad is None
    assert tensors['x'].grad is not None


@pytest.mark.parametrize('programs', [1, 3])
@pytest.mark.parametrize('name', ['18x4', '13x9'])
def test_any_share_of_the_work(name, programs, monkeypatch):
    """How much a program of the Triton kernels does depends on the shape; large ones do not run here."""
    call = Call(OP, name, 'triton')
    tensors = call.inputs(torch.float32)
    folder = 'mmvssm.kernels.residual_conv_norm.triton'
    monkeypatch.setattr(import_module(f'{folder}.forward'), 'PROGRAMS', programs)
    for constant in ('NORM_PROGRAMS', 'CONV_PROGRAMS'):
        monkeypatch.setattr(import_module(f'{folder}.backward'), constant, programs)
    call.check(call.evaluate(tensors), expected(OP, name, torch.float32))


BAD_INPUTS = {
    'x-dims': (dict(x=lambda t: t[0]), ValueError, r'x has shape \(2, 3, 4\), expected \(batch, H, W, D\)'),
    'x-rows': (dict(x=lambda t: t[:, :0]), ValueError, r'x has 0 rows, expected 1 or more.* \(2, 0, 3, 4\)'),
    'x-columns': (dict(x=lambda t: t[:, :, :0]), ValueError, 'x has 0 columns, expected 1 or more'),
    'x-channels': (dict(x=lambda t: t[..., :0]), ValueError, 'x has 0 channels, expected 1 or more'),
    'x-dtype': (dict(x=lambda t: t.int()), TypeError, 'x has dtype torch.int32'),
    'branch-shape': (dict(branch=lambda t: t[:1]), ValueError,
                     r'branch has shape \(1, 2, 3, 4\), expected that of x = \(2, 2, 3, 4\)'),
    'branch-device': (dict(branch=lambda t: t.to('meta')), ValueError, 'one device, got .* branch on meta'),
    'conv_weight-shape': (dict(conv_weight=lambda t: t[1:]), ValueError,
                          r'conv_weight has shape \(3, 1, 3, 3\), expected \(D, 1, 3, 3\) = \(4, 1, 3, 3\)'),
    'conv_bias-shape': (dict(conv_bias=lambda t: t[1:]), ValueError, r'conv_bias has shape \(3,\)'),
    'norm_weight-shape': (dict(norm_weight=lambda t: t[1:]), ValueError, r'norm_weight has shape \(3,\)'),
    'norm_bias-shape': (dict(norm_bias=lambda t: t[1:]), ValueError, r'norm_bias has shape \(3,\)'),
    'scale-shape': (dict(scale=lambda t: t[:1]), ValueError,
                    r'scale has shape \(1,\), expected \(batch,\) = \(2,\)'),
    'scale-alone': (dict(branch=lambda t: None), ValueError, 'scale is given without the branch'),
}


@pytest.mark.parametrize('changes, error, message', BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input(changes, error, message):
    tensors = dict(**inputs('tiny'), scale=torch.ones(2))
    tensors.update({name: change(tensors[name]) for name, change in changes.items()})
    with pytest.raises(error, match='^residual_conv_norm: .*' + message):
        residual_conv_norm(**tensors)


@pytest.mark.parametrize('name', ['tiny', 'tiny-no_branch', 'no_bias'])
def test_flops(name):
    tensors = inputs(name)
    given = {key: t for key, t in tensors.items() if t is not None}

    class Model(torch.nn.Module):

        def forward(self, *args):
            return residual_conv_norm(**{**tensors, **dict(zip(given, args))})

    flops = FlopAnalyzer(Model(), tuple(given.values())).by_operator()
    assert flops == {OP: (9 + 5) * tensors['x'].numel()}
