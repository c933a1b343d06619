"""The backward pass of GELU with what surrounds it, sums over rows, and the MLP that uses both."""
import json
import math
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from kernel_testing import DEVICES, poisoned_memory

from mmvssm.kernels import BackendError, use_backend
from mmvssm.kernels._core.cases import lay_out, relative_error
from mmvssm.kernels.gelu_backward import column_sums, dispatch, gelu_backward
from mmvssm.models.layers.mlp import MLP

#: Relative error that a tensor may have, by its dtype.
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
HALF = (torch.bfloat16, torch.float16)
#: One row; fewer columns than a thread reads; blocks that columns do not fill; several blocks; more dimensions.
SHAPES = [(1, 1), (1, 40), (50, 3), (1000, 200), (70, 384), (2, 3, 5, 16)]
BACKENDS = [('triton', device) for device in DEVICES] + [('cpu', 'cpu'), ('torch', 'cpu')]


@pytest.fixture(params=BACKENDS, ids='-'.join)
def backend(request):
    """Runs the test on every backend, by request: its name and the device of the tensors."""
    name, device = request.param
    with use_backend(name):
        reason = next(b for b in dispatch.COLUMN_SUMS if b.name == name).why_not(torch.ones(1, device=device))
        if reason:
            pytest.skip(reason)
        yield SimpleNamespace(name=name, device=device)


def inputs(shape, dtype, device, layout='contiguous'):
    g = torch.Generator().manual_seed(0)
    grad, x = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    return [lay_out(t.to(device, dtype), layout) for t in (grad, 1.5 * x)]


def in_float64(grad, x):
    """The derivative by the normal distribution; ``erfc`` keeps its digits in the tails, where ``erf`` does not."""
    grad, x = grad.cpu().double(), x.cpu().double()
    below = torch.special.erfc(-x / math.sqrt(2)) / 2
    grad_x = grad * (below + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi))
    return grad_x, x * below, grad_x.flatten(0, -2).sum(0)


def check(got, grad, x, backend):
    """``got`` is what float64 says, up to one rounding. The composed backends sum up what was rounded before."""
    assert [t.dtype for t in got] == [x.dtype, x.dtype, torch.promote_types(x.dtype, torch.float32)]
    sums = x.dtype if backend.name != 'triton' else torch.float32
    for t, exact, tolerance in zip(got, in_float64(grad, x), (x.dtype, x.dtype, sums), strict=True):
        assert t.shape == exact.shape
        assert t.is_contiguous()
        assert relative_error(t, exact) <= TOLERANCES[tolerance]


@pytest.mark.parametrize('dtype', [torch.float32, *HALF], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_shapes_and_precision(shape, dtype, backend):
    grad, x = inputs(shape, dtype, backend.device)
    with poisoned_memory():
        check(gelu_backward(grad, x), grad, x, backend)
        sums = column_sums(x)
    assert sums.dtype == torch.float32
    assert sums.shape == shape[-1:]
    assert relative_error(sums, x.cpu().double().flatten(0, -2).sum(0)) <= TOLERANCES[torch.float32]


@pytest.mark.parametrize('layout', ['half', 'channels_first', 'expanded'])
def test_strides(layout, backend):
    grad, x = inputs((37, 24), torch.bfloat16, backend.device, layout)
    check(gelu_backward(grad, x), grad, x, backend)
    check(gelu_backward(grad.contiguous(), x), grad, x, backend)
    assert torch.equal(column_sums(x), column_sums(x.contiguous()))


def test_gradient_of_another_dtype(backend):
    grad, x = inputs((9, 16), torch.bfloat16, backend.device)
    check(gelu_backward(grad.float(), x), grad, x, backend)


@pytest.mark.parametrize('shape', [(0, 8), (2, 0, 8), (4, 0)], ids=str)
def test_empty(shape, backend):
    grad, x = inputs(shape, torch.float32, backend.device)
    grad_x, y, sums = gelu_backward(grad, x)
    assert grad_x.shape == y.shape == x.shape
    for t in (sums, column_sums(x)):
        assert t.dtype == torch.float32
        assert torch.equal(t.cpu(), torch.zeros(shape[-1]))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_extremes(dtype, backend):
    x = torch.tensor([[1e4, -1e4, 0.0, -0.0, 15.0, -15.0, 1e-20, -1e-20, 1e-4, -1e-4, 1e18, -1e18]])
    x = x.to(backend.device, dtype)
    for grad in (1e4, -1e-4):
        grad = torch.full_like(x, grad)
        got = gelu_backward(grad, x)
        assert all(t.isfinite().all() for t in got)
        for t, exact in zip(got, in_float64(grad, x)):
            tails = 1e-30 if backend.name == 'triton' else 1e-3  # PyTorch's own loses them
            torch.testing.assert_close(t.cpu().double(), exact, rtol=TOLERANCES[dtype], atol=tails)


@pytest.mark.parametrize('backend', [b for b in BACKENDS if b[0] == 'triton'], ids='-'.join, indirect=True)
def test_every_digit(backend):
    """No element has lost digits, however small the GELU; nothing but the exponential's argument grows."""
    x = torch.linspace(-12, 12, 4801, device=backend.device)[:, None]
    grad_x, y, _ = (t.cpu().double() for t in gelu_backward(torch.ones_like(x), x))
    slope, exact, _ = in_float64(torch.ones_like(x), x)
    wide = x.cpu().double()
    assert ((y - exact).abs() <= exact.abs() * (1e-6 + 1e-7 * wide**2)).all()
    assert ((grad_x - slope).abs() <= 4e-7).all()


@pytest.mark.parametrize('backend', [b for b in BACKENDS if b[1] == 'cpu'], ids='-'.join, indirect=True)
def test_equal_calls_give_equal_bits(backend):
    grad, x = inputs((300, 40), torch.bfloat16, backend.device)
    first = gelu_backward(grad, x)
    for got, expected in zip(gelu_backward(grad, x), first):
        assert torch.equal(got, expected)
    assert torch.equal(column_sums(x), column_sums(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no CUDA device')
@pytest.mark.parametrize('dim', [64, 256, 384, 2048])
def test_large_on_a_gpu(dim):
    """Several tiles for each program, equal bits."""
    g = torch.Generator('cuda').manual_seed(0)
    grad, x = torch.randn(2, 20_000_000 // dim, dim, generator=g, device='cuda').bfloat16()
    got = gelu_backward(grad, x)
    check(got, grad, x, SimpleNamespace(name='triton'))
    for first, second in zip((*got, column_sums(x)), (*gelu_backward(grad, x), column_sums(x)), strict=True):
        assert torch.equal(first, second)
    assert relative_error(column_sums(x), x.double().sum(0)) <= 1e-6


def test_float64():
    grad, x = inputs((20, 5), torch.float64, 'cpu')
    check(gelu_backward(grad, x), grad, x, SimpleNamespace(name='cpu'))
    assert column_sums(x).dtype == torch.float64


X = torch.ones(3, 4)
BAD_INPUTS = {
    'grad-shape': (gelu_backward, [X[:, 1:], X], ValueError,
                   r'grad has shape \(3, 3\), expected that of x = \(3, 4\)'),
    'grad-device': (gelu_backward, [X.to('meta'), X], ValueError, 'one device, got grad on meta, x on cpu'),
    'grad-dtype': (gelu_backward, [X.bool(), X], TypeError, 'grad has dtype torch.bool, expected one of'),
    'grad-list': (gelu_backward, [[1.0], X], TypeError, 'grad is a list, expected a Tensor'),
    'x-dtype': (gelu_backward, [X, X.to(torch.complex64)], TypeError, 'x has dtype torch.complex64, expected one of'),
    'x-dims': (gelu_backward, [X[0], X[0]], ValueError,
               r'x has shape \(4,\), expected \(..., D\) with at least two dimensions'),
    'sums-dtype': (column_sums, [X.int()], TypeError, 'x has dtype torch.int32, expected one of'),
    'sums-0d': (column_sums, [X[0, 0]], ValueError, r'x has shape \(\), expected \(..., D\) with at least two'),
    'sums-1d': (column_sums, [X[0]], ValueError, r'x has shape \(4,\), expected \(..., D\) with at least two'),
}


@pytest.mark.parametrize('function, args, error, message', BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input(function, args, error, message):
    with pytest.raises(error, match=f'^{function.__name__}: .*{message}'):
        function(*args)


def test_bad_backend():
    x = torch.ones(3, 4)
    with use_backend('nonsense'), pytest.raises(BackendError, match="column_sums: there is no backend 'nonsense'"):
        column_sums(x)
    with use_backend('triton'), pytest.raises(BackendError, match='it takes plain tensors, this one is a Parameter'):
        column_sums(torch.nn.Parameter(x))


FROZEN = {'nothing': (), 'first layer': ('fc1.weight', 'fc1.bias'), 'weights': ('fc1.weight', 'fc2.weight'),
          'biases': ('fc1.bias', 'fc2.bias'), 'all but one': ('fc1.weight', 'fc1.bias', 'fc2.weight')}


@pytest.mark.parametrize('frozen', FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize('of_input', [True, False], ids=['', 'input'])
def test_mlp(frozen, of_input, backend):
    """Gradients of what wants them, whatever does not, as PyTorch has them."""
    torch.manual_seed(0)
    mlp = MLP(12, 48).to(backend.device)
    for name in frozen:
        mlp.get_parameter(name).requires_grad_(False)
    x = torch.randn(2, 5, 12).to(backend.device).requires_grad_(of_input)
    wanted = {**dict(mlp.named_parameters()), 'x': x}
    wanted = {name: t for name, t in wanted.items() if t.requires_grad}

    def gradients(y):
        return dict(zip(wanted, torch.autograd.grad(y.square().sum(), list(wanted.values()))))

    expected = gradients(mlp.fc2(F.gelu(mlp.fc1(x))))
    for name, got in gradients(mlp(x)).items():
        torch.testing.assert_close(got, expected[name], msg=name)


@pytest.mark.parametrize('autocast', [True, False])
def test_mlp_in_half_precision(autocast, backend):
    """Under autocast parameters and their gradients are float32."""
    torch.manual_seed(0)
    exact = MLP(12, 48).bfloat16().double()
    mlp, x = MLP(12, 48), torch.randn(40, 12).bfloat16()
    mlp.load_state_dict(exact.state_dict())
    mlp = mlp.to(backend.device, torch.float32 if autocast else torch.bfloat16)
    with torch.autocast(backend.device, torch.bfloat16, enabled=autocast):
        y = mlp(x.to(backend.device))
    y.backward(torch.ones_like(y))
    with use_backend(None):
        exact(x.double()).sum().backward()
    for got, expected in zip(mlp.parameters(), exact.parameters()):
        assert got.grad.dtype == got.dtype
        assert relative_error(got.grad, expected.grad) <= 1e-2


def test_mlp_with_other_layers():
    """Hooks on the first layer are called; a first layer without bias, or of another kind, is left to itself."""
    called, x = [], torch.randn(3, 8)
    mlp = MLP(8, 32)
    expected = torch.autograd.grad(mlp(x).sum(), list(mlp.parameters()))
    mlp.fc1.register_forward_hook(lambda *args: called.append(1))
    for got, e in zip(torch.autograd.grad(mlp(x).sum(), list(mlp.parameters())), expected):
        torch.testing.assert_close(got, e)
    assert called
    mlp.fc1 = torch.nn.Linear(8, 32, bias=False)
    mlp(x).sum().backward()
    assert mlp.fc1.weight.grad is not None


_COMPILE = '''
import functools
import torch
from compile_for_gpu import report
from mmvssm.kernels.gelu_backward import triton as room
for dim in (3, 192, 256):
    room.launch = functools.partial(report, case=dim)
    x = torch.ones(20, dim, dtype=torch.bfloat16)
    room.gelu_backward(x, x), room.gelu_backward(x.float(), x.float()), room.column_sums(x)
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='Triton is for Linux')
def test_compiles_for_a_gpu():
    done = subprocess.run([sys.executable, '-c', _COMPILE], capture_output=True, text=True,
                          cwd=pathlib.Path(__file__).parent, env={**os.environ, 'TRITON_INTERPRET': '0'})
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert [kernel['case'] for kernel in kernels] == 6 * [3] + 6 * [192] + 6 * [256]
    assert not any(kernel['spilled'] for kernel in kernels)
    assert all(kernel['widest'] == 16 for kernel in kernels if kernel['case'] != 3)  # bytes of a thread at once
