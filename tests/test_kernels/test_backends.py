"""Which backend runs, how to ask for one, and what is said where it cannot."""
import warnings
from types import SimpleNamespace

import pytest
import torch
from kernel_testing import ROOMS, Call, backends, room

from mmvssm.kernels import BackendError, use_backend
from mmvssm.kernels._core import extension
from mmvssm.kernels._core.backends import Backend, choose, requested_backend

ANY = torch.zeros(1)


def backend(name, reason=None):
    return Backend(name, lambda tensor: reason, forward=None, backward=None)


@pytest.fixture(autouse=True)
def no_request(monkeypatch):
    monkeypatch.delenv('MMVSSM_BACKEND', raising=False)


@pytest.fixture
def library(monkeypatch):
    """Set the file that the compiled kernels are loaded from."""
    def set_to(path):
        monkeypatch.setattr(extension, '_LIBRARY', path)
        extension.why_not_loaded.cache_clear()
        extension._warn_once.cache_clear()
    yield set_to
    monkeypatch.undo()
    extension.why_not_loaded.cache_clear()


def test_first_able_backend_is_chosen():
    table = backend('fast', 'no GPU'), backend('middle'), backend('slow')
    assert choose('op', table, ANY).name == 'middle'


def test_request_is_met():
    with use_backend('slow'):
        assert choose('op', (backend('fast'), backend('slow')), ANY).name == 'slow'


def test_request_that_cannot_be_met_raises_its_reason():
    with use_backend('fast'), pytest.raises(BackendError, match='op: no requested backend.*fast: no GPU$'):
        choose('op', (backend('fast', 'no GPU'), backend('slow')), ANY)


def test_no_able_backend_raises_every_reason():
    table = backend('fast', 'no GPU'), backend('slow', 'too large')
    with pytest.raises(BackendError, match='op: no backend can run this call: fast: no GPU; slow: too large'):
        choose('op', table, ANY)


def test_reason_depends_on_the_tensor():
    table = (Backend('cpu', extension.why_not_cpu, None, None),)
    with pytest.raises(BackendError, match='cpu: it runs CPU tensors, this one is on meta'):
        choose('op', table, ANY.to('meta'))


@pytest.mark.parametrize('op, name', [(op, name) for op in ROOMS for name in ('cuda', 'nonsense')
                                      if name not in backends(op)])
def test_name_of_no_backend_raises_those_there_are(op, name):
    call, known = Call(op, 'tiny', name), ', '.join(backends(op))
    cases = room(op, 'cases')
    tensors = cases.inputs(cases.CASES['tiny'], torch.float32)
    with pytest.raises(BackendError, match=f"{op}: there is no backend '{name}' of this operator; it has {known}$"):
        call.forward(tensors)


def test_environment(monkeypatch):
    table = backend('fast'), backend('slow')
    monkeypatch.setenv('MMVSSM_BACKEND', 'slow')
    assert choose('op', table, ANY).name == 'slow'
    monkeypatch.setenv('MMVSSM_BACKEND', 'nonsense')
    with pytest.raises(BackendError, match="no backend 'nonsense'"):
        choose('op', table, ANY)
    monkeypatch.setenv('MMVSSM_BACKEND', '')
    assert choose('op', table, ANY).name == 'fast'


def test_context_goes_before_environment(monkeypatch):
    monkeypatch.setenv('MMVSSM_BACKEND', 'slow')
    with use_backend('fast'):
        assert requested_backend() == 'fast'
    assert requested_backend() == 'slow'


def test_contexts_nest():
    with use_backend('slow'):
        with use_backend('fast'):
            assert requested_backend() == 'fast'
        assert requested_backend() == 'slow'
        with use_backend(None):
            assert requested_backend() is None
        assert requested_backend() == 'slow'
    assert requested_backend() is None


def test_context_ends_with_an_exception():
    with pytest.raises(KeyError), use_backend('slow'):
        raise KeyError
    assert requested_backend() is None


@pytest.mark.parametrize('op', [op for op in ROOMS if 'cpu' in backends(op)])
def test_without_compiled_kernels(op, library, tmp_path):
    """The operators still run; asking for what is not built says how to build it."""
    library(tmp_path / '_C.so')
    cases = room(op, 'cases')
    tensors = cases.inputs(cases.CASES['tiny'], torch.float32)
    expected = Call(op, 'tiny', 'torch').forward(tensors)
    with pytest.warns(UserWarning, match='slower: the compiled kernels are not built'):
        assert torch.equal(Call(op, 'tiny', None).forward(tensors), expected)
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # once is enough
        Call(op, 'tiny', None).forward(tensors)
    with pytest.raises(BackendError, match=f'{op}: .*cpu: the compiled kernels are not built.*MMVSSM_BUILD_EXT=1'):
        Call(op, 'tiny', 'cpu').forward(tensors)


def test_compiled_kernels_of_another_pytorch(library, tmp_path):
    (tmp_path / '_C.so').write_bytes(b'no library')
    library(tmp_path / '_C.so')
    with pytest.warns(UserWarning, match='slower: .*built for another PyTorch'):
        extension.why_not_cpu(ANY)


@pytest.mark.parametrize('device, dtype, capability, message', [
    ('cpu', torch.float32, (9, 0), 'it runs CUDA tensors, this one is on cpu'),
    ('cuda', torch.float64, (9, 0), 'float64 runs on torch'),
    ('cuda', torch.bfloat16, (7, 5), 'it needs compute capability 8.0, this GPU has 7.5'),
    ('cuda', torch.bfloat16, (9, 0), 'the CUDA kernels are not built.*FORCE_CUDA=1')],
    ids=['cpu', 'float64', 'old', 'not_built'])
def test_reasons_against_the_cuda_kernels(device, dtype, capability, message, monkeypatch, tmp_path):
    tensor = SimpleNamespace(device=torch.device(device), dtype=dtype)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    monkeypatch.setattr(extension, '_CUDA_LIBRARY', tmp_path / '_C_cuda.so')
    monkeypatch.setattr(extension, 'why_not_loaded_cuda', extension.why_not_loaded_cuda.__wrapped__)
    table = Backend('cuda', extension.why_not_cuda, None, None), backend('torch')
    with use_backend('cuda'), pytest.raises(BackendError, match=f'no requested backend.*cuda: .*{message}'):
        choose('op', table, tensor)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        assert choose('op', table, tensor).name == 'torch'
        choose('op', table, tensor)
    assert not said  # others run, Triton's first


def test_cuda_kernels_of_another_pytorch(monkeypatch, tmp_path):
    tensor = SimpleNamespace(device=torch.device('cuda'), dtype=torch.float32)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    monkeypatch.setattr(extension, '_CUDA_LIBRARY', tmp_path / '_C_cuda.so')
    monkeypatch.setattr(extension, 'why_not_loaded_cuda', extension.why_not_loaded_cuda.__wrapped__)
    extension._warn_once.cache_clear()
    (tmp_path / '_C_cuda.so').write_bytes(b'no library')
    with pytest.warns(UserWarning, match='other kernels than those that were built: .*built for another PyTorch'):
        extension.why_not_cuda(tensor)


@pytest.mark.parametrize('said', ['', 'no kernel image is available'], ids=['this_gpu', 'others'])
def test_cuda_kernels_for_other_gpus(said, monkeypatch, tmp_path):
    tensor = SimpleNamespace(device=torch.device('cuda', 0), dtype=torch.float32)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    monkeypatch.setattr(extension, '_CUDA_LIBRARY', tmp_path)
    monkeypatch.setattr(extension, 'why_not_loaded_cuda', lambda: None)
    monkeypatch.setattr(extension, '_why_not_on', extension._why_not_on.__wrapped__)
    monkeypatch.setattr(torch.ops, 'mmvssm_cuda', SimpleNamespace(why_not=lambda index: said if index == 0 else None))
    extension._warn_once.cache_clear()
    if said:
        with pytest.warns(UserWarning, match='other GPUs than this one.* 9.0 .no kernel image is.*ARCH_LIST=9.0'):
            assert extension.why_not_cuda(tensor).startswith('the CUDA kernels were built for other GPUs')
    else:
        assert extension.why_not_cuda(tensor) is None
