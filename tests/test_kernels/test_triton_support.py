"""When Triton kernels can run, what is said where they cannot, and how tensors reach them."""
import warnings
from types import SimpleNamespace

import pytest
import torch

from mmvssm.kernels import BackendError, norm_gate, use_backend
from mmvssm.kernels._core import triton_support
from mmvssm.kernels._core.triton_support import (
    as_rows,
    cdiv,
    collect_launches,
    launch,
    next_power_of_2,
    why_not_triton,
)


def on_gpu(dtype=torch.bfloat16):
    return SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device('cuda:0'), get_device=lambda: 0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """A GPU that is new enough; nothing said so far."""
    monkeypatch.delenv('MMVSSM_BACKEND', raising=False)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda index: 'Imaginary 100')
    caches = triton_support._why_not_device, triton_support.warn_once, triton_support._starts_by_driver
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_runs_on_a_gpu(dtype):
    assert why_not_triton(on_gpu(dtype)) is None


def test_no_float64():
    assert why_not_triton(on_gpu(torch.float64)) == 'it computes in float32, this tensor is float64'


@pytest.mark.parametrize(('what', 'reason'), [
    ('old', r'Imaginary 100 has compute capability 7.5, .* need 8.0 or newer'),
    ('AMD', 'the kernels are written for NVIDIA GPUs'),
    ('old Triton', r'Triton \S+ is too old'),
    ('no compiler', 'Triton needs a C compiler, .* install gcc or clang, or set CC'),
    ('no headers', "Triton needs Python's headers, .* install python3-dev"),
    ('missing', 'Triton is not installed: pip install triton')])
def test_stand_in_is_announced_once(what, reason, monkeypatch):
    if what == 'old':
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index: (7, 5))
    elif what == 'AMD':
        monkeypatch.setattr(torch.version, 'hip', '6.0')
    elif what == 'old Triton':
        monkeypatch.delattr(pytest.importorskip('triton'), 'constexpr_function')
    elif what == 'no compiler':
        monkeypatch.setattr(triton_support, 'why_not_driver', lambda: 'no driver either')
        monkeypatch.delenv('CC', raising=False)
        monkeypatch.setenv('PATH', '')
    elif what == 'no headers':
        monkeypatch.setattr(triton_support, 'why_not_driver', lambda: 'no driver either')
        monkeypatch.setenv('CC', 'gcc')
        monkeypatch.setattr(triton_support.sysconfig, 'get_paths', lambda scheme: dict(include='nowhere'))
    else:
        monkeypatch.setattr(triton_support.importlib.util, 'find_spec', lambda name: None)
    with pytest.warns(UserWarning, match=f'composed PyTorch operations, slower: {reason}'):
        why_not_triton(on_gpu())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert why_not_triton(on_gpu())


def test_runs_without_a_compiler(monkeypatch):
    pytest.importorskip('triton')
    monkeypatch.delenv('CC', raising=False)
    monkeypatch.setenv('PATH', '')
    monkeypatch.setattr(triton_support, 'why_not_driver', lambda: None)
    assert why_not_triton(on_gpu()) is None
    assert triton_support._starts_by_driver()


def test_processor_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(triton_support, 'INTERPRETED', False)
    x = torch.ones(2, 3)
    with use_backend('triton'), pytest.raises(BackendError, match='triton: it runs CUDA tensors, this one is on cpu'):
        norm_gate(x, x, x[0], x[0])


def test_interpreter_runs_only_when_asked_for(monkeypatch):
    monkeypatch.setattr(triton_support, 'INTERPRETED', True)
    assert 'it runs CUDA tensors' in why_not_triton(torch.ones(1))


X = torch.arange(2 * 3 * 5 * 8.).view(2, 3, 5, 8)


@pytest.mark.parametrize('tensor, dims, row, copied', [
    pytest.param(X, 3, 8, False, id='dense'),
    pytest.param(X[..., 4:], 3, 8, False, id='half of the channels'),
    pytest.param(X[:, 1:], 2, 8, False, id='rows of an image'),
    pytest.param(X[:, 1:], 3, 8, True, id='rows of several images'),
    pytest.param(X[..., ::2], 3, 4, True, id='every other channel'),
    pytest.param(X.permute(0, 2, 3, 1), 3, 3, True, id='channels first'),
    pytest.param(X[:1].expand(4, -1, -1, -1), 2, 8, False, id='one image repeated, images apart'),
    pytest.param(X[:1].expand(4, -1, -1, -1), 3, 8, True, id='one image repeated'),
    pytest.param(X[..., 3:4], 3, 8, False, id='one channel'),
    pytest.param(X[:1, :1, :1, :3], 3, 3, False, id='one row'),
])
def test_as_rows(tensor, dims, row, copied):
    rows, distance = as_rows(tensor, dims)
    assert torch.equal(rows, tensor)
    assert distance == row
    assert (rows.data_ptr() != tensor.data_ptr()) == copied


@pytest.mark.parametrize('n, power', [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_sizes(n, power):
    assert next_power_of_2(n) == power
    assert cdiv(n, 64) == -(-n // 64)


class Compiled:
    """What a fake kernel compiles to; it notes how it is started."""
    function, packed_metadata = 'function', 'metadata'

    def __init__(self):
        self.started = []

    def run(self, *args):
        self.started.append(args)

    def __getitem__(self, grid):
        return lambda *args: self.started.append((*grid, *args))


class Kernel:
    """A kernel with two tensors, of which one may be absent, an integer and a constant."""
    params = [SimpleNamespace(is_constexpr=constant, do_not_specialize=number)
              for constant, number in ((False, False), (False, False), (False, True), (True, False))]

    def __init__(self):
        self.compiled = []

    def __getitem__(self, grid):
        def first(*args, **options):
            self.compiled.append(Compiled())
            return self.compiled[-1]
        return first


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(triton_support, 'INTERPRETED', False)
    monkeypatch.setattr(torch._C, '_cuda_getDevice', lambda: -1, raising=False)
    monkeypatch.setattr(torch._C, '_cuda_getCurrentRawStream', lambda device: 7, raising=False)
    runtime = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None)
    monkeypatch.setattr(triton_support, '_runtime', lambda: runtime)
    monkeypatch.setattr(triton_support, '_starter',
                        lambda compiled: (compiled.run, (compiled.function, compiled.packed_metadata)))
    for cache in ('_compiled', '_signatures'):
        monkeypatch.setattr(triton_support, cache, {})
    kernel = Kernel()
    kernel.runtime = runtime
    return kernel


def test_launch_compiles_once_and_passes_addresses(kernel):
    x, y = torch.zeros(8), torch.zeros(8)
    for number in (3, 3, 4):
        launch(kernel, (1, 2, 3), x, y, number, 16, num_warps=4)
    compiled, = kernel.compiled
    assert compiled.started == [(1, 2, 3, 7, 'function', 'metadata', x.data_ptr(), y.data_ptr(), number, 16)
                                for number in (3, 4)]


@pytest.mark.parametrize('change', [
    dict(x=torch.zeros(8, dtype=torch.bfloat16)), dict(x=torch.zeros(9)[1:]), dict(y=None), dict(y=torch.zeros(9)[1:]),
    dict(number=2**31), dict(constant=32), dict(num_warps=8)],
    ids=['dtype', 'alignment', 'absent', 'alignment_of_second', '64_bits', 'constant', 'option'])
def test_launch_compiles_anew_for(kernel, change):
    def call(x=torch.zeros(8), y=torch.zeros(8), number=3, constant=16, num_warps=4):  # noqa: B008
        launch(kernel, (1, 1, 1), x, y, number, constant, num_warps=num_warps)

    call()
    call(**change)
    assert len(kernel.compiled) == 2
    call(**change)
    call()
    assert len(kernel.compiled) == 2
    assert [len(compiled.started) for compiled in kernel.compiled] == [1, 1]


def test_launch_lets_profilers_know(kernel):
    launch(kernel, (1, 1, 1), torch.zeros(8), None, 3, 16)
    kernel.runtime.launch_enter_hook = print
    x = torch.zeros(8)
    launch(kernel, (1, 1, 1), x, None, 3, 16)
    assert kernel.compiled[0].started[0][3] is x  # by Triton's own way, which calls the hooks


def test_collected_launches_do_not_run(kernel):
    x = torch.empty(8, device='meta')
    with collect_launches() as launches:
        launch(kernel, (1, 1, 1), x, None, 3, 16, num_warps=4)
    assert not kernel.compiled
    assert launches == [(kernel, (1, 1, 1), (x, None, 3, 16), dict(num_warps=4))]
