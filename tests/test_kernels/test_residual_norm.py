"""What belongs to the residual LayerNorm alone."""
import math

import pytest
import torch
from kernel_testing import Call, cotangent_like, leaves, room
from mmengine.analysis import FlopAnalyzer

from mmvssm.kernels import residual_norm, residual_norm_reference, use_backend

OP, BACKENDS = 'residual_norm', ['triton', 'cpu', 'torch']
CASES = room(OP, 'cases').CASES


def inputs(name, dtype=torch.float64):
    return room(OP, 'cases').inputs(CASES[name], dtype)


def by_scalars(x, weight, bias, branch, scale, eps):
    """The docstring's equations one number at a time."""
    y, n = x.clone(), torch.zeros_like(x)
    for b, row, d in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
        if branch is not None:
            y[b, row, d] += branch[b, row, d] * (1 if scale is None else scale[b])
    for row, out in zip(y.flatten(0, -2).tolist(), n.flatten(0, -2)):
        mean = sum(row) / len(row)
        variance = sum((value - mean)**2 for value in row) / len(row)
        for d, value in enumerate(row):
            out[d] = (value - mean) / math.sqrt(variance + eps) * weight[d] + bias[d]
    return y, n


@pytest.mark.parametrize('name', ['tiny', 'tiny-scale', 'tiny-no_branch'])
def test_reference_computes_the_equations(name):
    tensors = inputs(name)
    tensors.update(scale=room(OP, 'cases').scale(CASES[name], tensors['x']), eps=0.1)
    for got, by_hand in zip(residual_norm_reference(**tensors), by_scalars(**tensors)):
        torch.testing.assert_close(got, by_hand)


@pytest.mark.parametrize('backend', BACKENDS)
def test_without_a_branch_the_sum_is_the_input(backend):
    tensors = Call(OP, 'tiny-no_branch', backend).inputs(torch.float32)
    with use_backend(backend):
        assert residual_norm(**tensors)[0] is tensors['x']


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('value', [1e4, 0.0])
def test_extreme_activations(backend, value):
    call = Call(OP, 'dim_16', backend)
    tensors = call.inputs(torch.float32)
    for name in ('x', 'branch'):
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
        output = residual_norm(**tensors)[result]
        got = torch.autograd.grad(output, list(tensors.values()), cotangent_like(output, 'tiny'), allow_unused=True)
    output = residual_norm_reference(**wide)[result]
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
            y, n = residual_norm(**args, scale=scale)
            (y * n).sum().backward()
        assert y.dtype == n.dtype == torch.float32
        results.append((y, n))
        grads.append([t.grad for t in args.values()])
        assert args['branch'].grad.dtype == branch.dtype
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(*grads))


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('name', ['tiny', 'tiny-no_branch'])
def test_norm_in_another_precision(backend, name):
    """It is rounded once; gradients are those of the rounded cotangent."""
    tensors = Call(OP, name, backend).inputs(torch.float32)
    narrow, wide = leaves(tensors), leaves(tensors)
    with use_backend(backend):
        y, n = residual_norm(**narrow, dtype=torch.bfloat16)
        exact = residual_norm(**wide)
        n.backward(cotangent_like(n, name))
        exact[1].backward(cotangent_like(n, name).float())
    assert (y.dtype, n.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(n, exact[1].bfloat16())
    assert torch.equal(y, exact[0])
    assert all(t is None or torch.equal(t.grad, wide[key].grad) for key, t in narrow.items())


@pytest.mark.parametrize('backend', BACKENDS)
def test_scale_gets_no_gradient(backend):
    tensors = Call(OP, 'tiny', backend).inputs(torch.float32)
    scale = torch.ones(2, requires_grad=True)
    tensors['x'].requires_grad_()
    with use_backend(backend):
        residual_norm(**tensors, scale=scale)[1].sum().backward()
    assert scale.grad is None
    assert tensors['x'].grad is not None


BAD_INPUTS = {
    'x-dims': (dict(x=lambda t: t[0, 0]), ValueError, r'x has shape \(4,\), expected \(batch, ..., D\)'),
    'x-dtype': (dict(x=lambda t: t.int()), TypeError, 'x has dtype torch.int32'),
    'branch-shape': (dict(branch=lambda t: t[:1]), ValueError,
                     r'branch has shape \(1, 3, 4\), expected that of x = \(2, 3, 4\)'),
    'branch-device': (dict(branch=lambda t: t.to('meta')), ValueError, 'one device, got .* branch on meta'),
    'weight-shape': (dict(weight=lambda t: t[1:]), ValueError, r'weight has shape \(3,\)'),
    'bias-shape': (dict(bias=lambda t: t[1:]), ValueError, r'bias has shape \(3,\)'),
    'scale-shape': (dict(scale=lambda t: t[:1]), ValueError,
                    r'scale has shape \(1,\), expected \(batch,\) = \(2,\)'),
    'dtype': (dict(dtype=lambda t: torch.int32), TypeError, 'dtype is torch.int32, expected one of'),
    'scale-alone': (dict(branch=lambda t: None), ValueError, 'scale is given without the branch'),
}


@pytest.mark.parametrize('changes, error, message', BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input(changes, error, message):
    tensors = dict(**inputs('tiny'), scale=torch.ones(2))
    tensors.update({name: change(tensors.get(name)) for name, change in changes.items()})
    with pytest.raises(error, match='^residual_norm: .*' + message):
        residual_norm(**tensors)


@pytest.mark.parametrize('name', ['tiny', 'tiny-no_branch'])
def test_flops(name):
    tensors = inputs(name)
    given = {key: t for key, t in tensors.items() if t is not None}

    class Model(torch.nn.Module):

        def forward(self, *args):
            return residual_norm(**{**tensors, **dict(zip(given, args))})[1]

    flops = FlopAnalyzer(Model(), tuple(given.values())).by_operator()
    assert flops == {OP: 5 * tensors['x'].numel()}


@pytest.mark.parametrize('backend', BACKENDS)
def test_no_eps(backend):
    """Rows that fill up a tile have no variance; they leave nothing in the sums of others."""
    call = Call(OP, 'tiny', backend)
    tensors = {**leaves(call.inputs(torch.float32)), 'eps': 0.0}
    with use_backend(backend):
        _, n = residual_norm(**tensors)
        grads = torch.autograd.grad(n.square().sum(), [tensors['weight'], tensors['bias'], tensors['x']])
    assert all(grad.isfinite().all() for grad in grads)
