"""What belongs to the state fusion alone."""
import pytest
import torch
from kernel_testing import Call, room
from mmengine.analysis import FlopAnalyzer

from mmvssm.kernels import state_fusion, state_fusion_reference

CASES = room('state_fusion', 'cases').CASES


def inputs(name, dtype=torch.float64):
    return room('state_fusion', 'cases').inputs(CASES[name], dtype)


def fusion_by_scalars(h, C, x, D, kernel1, kernel3, kernel5, alpha):
    """The docstring's equations one number at a time; replicate padding is a clamped index."""
    batch, height, width, d_state, dim = h.shape
    y = torch.zeros(x.shape, dtype=torch.float64)
    for b, row, column, d in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
        value = D[d] * x[b, row, column, d]
        for n in range(d_state):
            for weight, kernel, dilation in zip(alpha, (kernel1, kernel3, kernel5), (1, 3, 5)):
                for i in range(3):
                    for j in range(3):
                        near = (min(max(row + (i - 1) * dilation, 0), height - 1),
                                min(max(column + (j - 1) * dilation, 0), width - 1))
                        value += C[b, row, column, n] * weight * kernel[d, 0, i, j] * h[b, near[0], near[1], n, d]
        y[b, row, column, d] = value
    return y


def test_reference_computes_the_equations():
    tensors = inputs('tiny')
    assert tensors['h'].shape == (2, 2, 3, 2, 2)
    torch.testing.assert_close(state_fusion_reference(**tensors), fusion_by_scalars(**tensors))


@pytest.mark.parametrize('backend', ['cpu', 'torch'])
@pytest.mark.parametrize('value', [1e4, 0.0])
def test_extreme_activations(backend, value):
    call = Call('state_fusion', 'd_state_16', backend)
    tensors = call.inputs(torch.float32)
    for name in 'hCx':
        tensors[name] = value * tensors[name].sign()
    got = call.evaluate(tensors)
    assert all(t.isfinite().all() for t in got.values())
    call.check(got, call.expected(tensors))


BAD_INPUTS = {
    'h-dims': (dict(h=lambda t: t[0]), ValueError, r'h has shape \(2, 3, 2, 2\), expected \(batch, H, W, N, D\)'),
    'h-rows': (dict(h=lambda t: t[:, :0]), ValueError, r'h has 0 rows, expected 1 or more.* \(2, 0, 3, 2, 2\)'),
    'h-columns': (dict(h=lambda t: t[:, :, :0]), ValueError, 'h has 0 columns, expected 1 or more'),
    'h-states': (dict(h=lambda t: t[..., :0, :], C=lambda t: t[..., :0]), ValueError,
                 'h has 0 states, expected 1 or more'),
    'h-channels': (dict(h=lambda t: t[..., :0]), ValueError, 'h has 0 channels, expected 1 or more'),
    'h-dtype': (dict(h=lambda t: t.int()), TypeError, 'h has dtype torch.int32'),
    'C-shape': (dict(C=lambda t: t[..., :1]), ValueError, r'C has shape \(2, 2, 3, 1\), expected.* \(2, 2, 3, 2\)'),
    'x-shape': (dict(x=lambda t: t.flatten(1, 2)), ValueError, r'x has shape \(2, 6, 2\)'),
    'x-device': (dict(x=lambda t: t.to('meta')), ValueError, 'one device, got h on cpu.*x on meta'),
    'D-shape': (dict(D=lambda t: t[:1]), ValueError, r'D has shape \(1,\), expected \(D,\) = \(2,\)'),
    'kernels-number': (dict(kernels=lambda t: t[:2]), ValueError, 'kernels has 2 tensors, expected 3'),
    'kernels-shape': (dict(kernels=lambda t: [t[0], t[1], t[2].flatten(1)]), ValueError,
                      r'kernels\[2\] has shape \(2, 9\), expected \(D, 1, 3, 3\) = \(2, 1, 3, 3\)'),
    'kernels-dtype': (dict(kernels=lambda t: [t[0].long(), *t[1:]]), TypeError,
                      r'kernels\[0\] has dtype torch.int64'),
    'alpha-shape': (dict(alpha=lambda t: t[:2]), ValueError, r'alpha has shape \(2,\), expected \(3,\)'),
}


@pytest.mark.parametrize('changes, error, message', BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input(changes, error, message):
    h, C, x, D, *kernels, alpha = inputs('tiny').values()
    arguments = dict(h=h, C=C, x=x, D=D, kernels=kernels, alpha=alpha)
    arguments.update({name: change(arguments[name]) for name, change in changes.items()})
    with pytest.raises(error, match='^state_fusion: .*' + message):
        state_fusion(**arguments)


def test_flops():

    class Model(torch.nn.Module):

        def forward(self, h, C, x, D, *kernels_and_alpha):
            return state_fusion(h, C, x, D, kernels_and_alpha[:3], kernels_and_alpha[3])

    case = CASES['13x9']
    flops = FlopAnalyzer(Model(), tuple(inputs('13x9').values())).by_operator()
    assert flops == {'state_fusion': 27 * case.batch * case.height * case.width * case.d_state * case.dim}
