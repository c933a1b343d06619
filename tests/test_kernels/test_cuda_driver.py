"""Kernels are loaded and started through the CUDA driver where there is no C compiler; here by one that takes notes."""
import ctypes
import struct
import threading
from types import SimpleNamespace

import pytest
import torch

from mmvssm.kernels._core import cuda_driver, triton_support
from mmvssm.kernels._core.cuda_driver import Starter, types_of
from mmvssm.kernels._core.triton_support import launch

KERNEL = SimpleNamespace(params=[SimpleNamespace(name=name, is_constexpr=constant, do_not_specialize=number)
                                 for name, constant, number in (('x', 0, 0), ('y', 0, 0), ('n', 0, 1), ('N', 1, 0))])
COMPILED = SimpleNamespace(asm=dict(cubin=b'code'), metadata=SimpleNamespace(name='scan', shared=60000, num_warps=4))
MODULE, FUNCTION = 0x7700000000, 0x7f00000001


class Driver:
    """The functions of libcuda, for one module with one kernel."""

    def __init__(self, fails=None, context=1, version=13000):
        self.calls, self.fails, self.context, self.arguments, self.version = [], fails, context, [], version

    def __getattr__(self, name):
        if not name.startswith('cu'):
            raise AttributeError(name)

        def call(*args):
            self.calls.append(name)
            return 700 if name == self.fails else getattr(self, f'_{name[2:]}', lambda *args: 0)(*args)
        return call

    def cuGetErrorString(self, number, text):
        text._obj.value = b'an illegal memory access'

    def _CtxGetCurrent(self, context):
        context._obj.value = self.context
        return 0

    def _DriverGetVersion(self, version):
        version._obj.value = self.version
        return 0

    def _ModuleLoadData(self, module, code):
        assert code == b'code'
        module._obj.value = MODULE
        return 0

    def _ModuleGetFunction(self, function, module, name):
        assert (module.value, name) == (MODULE, b'scan')
        function._obj.value = FUNCTION
        return 0

    def _FuncSetAttribute(self, function, attribute, value):
        assert (function.value, attribute, value) == (FUNCTION, 8, 60000)
        return 0

    def _LaunchKernel(self, function, *numbers):
        *numbers, extra = numbers
        assert function.value == FUNCTION
        assert (extra[0], extra[2], extra[4]) == (1, 2, None)
        size = ctypes.c_size_t.from_address(extra[3]).value
        self.arguments.append((numbers, ctypes.string_at(extra[1], size)))
        return 0


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(cuda_driver, '_driver', lambda: driver)
    return driver


def test_starts_with_the_arguments_of_the_kernel(driver):
    x, y = torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16)
    starter = Starter(COMPILED, types_of(KERNEL, (x, y, 5, 16)), 0)
    starter(1, 2, 3, 99, x.data_ptr(), y.data_ptr(), 5, 16)
    (numbers, memory), = driver.arguments
    assert numbers == [1, 2, 3, 128, 1, 1, 60000, 99, None]
    assert memory == struct.pack('QQi4xQQ', x.data_ptr(), y.data_ptr(), 5, 0, 0)  # numbers and pointers aligned as in C
    assert 'cuCtxSetCurrent' not in driver.calls


def test_absent_tensors_and_large_numbers(driver):
    types = types_of(KERNEL, (torch.zeros(4, dtype=torch.int64), None, 2**40, 16))
    assert types == {0: '*i64', 2: 'i64'}
    Starter(COMPILED, types, 0)(1, 1, 1, 0, 64, None, 2**40, 16)
    assert driver.arguments[0][1] == struct.pack('QqQQ', 64, 2**40, 0, 0)


def test_makes_a_context_where_a_thread_has_none(driver):
    driver.context = None
    Starter(COMPILED, {0: '*fp32', 1: 'i32'}, 0)
    assert driver.calls[:3] == ['cuCtxGetCurrent', 'cuDevicePrimaryCtxRetain', 'cuCtxSetCurrent']


@pytest.mark.parametrize('function, what', [
    ('cuModuleLoadData', 'loading kernel scan'), ('cuFuncSetAttribute', 'with 60000 bytes of shared memory'),
    ('cuLaunchKernel', 'starting kernel scan')])
def test_errors_say_what_failed(driver, function, what):
    driver.fails = function
    with pytest.raises(RuntimeError, match=f'mmvssm: .*{what}: CUDA error 700, an illegal memory access'):
        Starter(COMPILED, {0: '*fp32', 1: 'i32'}, 0)(1, 1, 1, 0, 64, 3)


def test_threads_do_not_share_arguments(driver):
    starter = Starter(COMPILED, {0: '*fp32', 1: 'i32'}, 0)
    meet = threading.Barrier(2)
    launched = driver._LaunchKernel

    def launch_late(*args):  # when the other thread has written its arguments, too
        meet.wait(10)
        return launched(*args)

    starter._launch = launch_late
    threads = [threading.Thread(target=starter, args=(1, 1, 1, 0, address, 1)) for address in (64, 128)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {struct.unpack('Qi4xQQ', memory)[0] for _, memory in driver.arguments} == {64, 128}


def test_launch(driver, monkeypatch):
    monkeypatch.setattr(triton_support, 'INTERPRETED', False)
    monkeypatch.setattr(triton_support, '_starts_by_driver', lambda: True)
    monkeypatch.setattr(torch._C, '_cuda_getDevice', lambda: -1, raising=False)
    monkeypatch.setattr(torch._C, '_cuda_getCurrentRawStream', lambda device: 7, raising=False)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    compiled = []
    monkeypatch.setattr(triton_support, 'compile_kernel', lambda *args: compiled.append(args) or COMPILED)
    for cache in ('_compiled', '_signatures'):
        monkeypatch.setattr(triton_support, cache, {})
    x, y = torch.zeros(4), torch.zeros(4)
    for number in (5, 6):
        launch(KERNEL, (1, 2, 3), x, y, number, 16, num_warps=4)
    assert compiled == [(KERNEL, (x, y, 5, 16), dict(num_warps=4), (9, 0))]
    assert [struct.unpack('QQi4xQQ', memory)[:3] for _, memory in driver.arguments] \
        == [(x.data_ptr(), y.data_ptr(), number) for number in (5, 6)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_same_on_a_gpu(monkeypatch):
    from mmvssm.kernels import norm_gate
    x, z = torch.randn(2, 50, 96, device='cuda')
    weight, bias = torch.randn(2, 96, device='cuda')
    usual = norm_gate(x, z, weight, bias)
    monkeypatch.setattr(triton_support, '_starts_by_driver', lambda: True)
    monkeypatch.setattr(triton_support, '_compiled', {})
    for _ in range(2):
        assert torch.equal(norm_gate(x, z, weight, bias), usual)


@pytest.mark.parametrize('capability, version, can', [((9, 0), 12030, True), ((10, 0), 13000, True),
                                                      ((8, 9), 13000, False), ((9, 0), 12020, False)])
def test_kernels_overlap_where_gpu_and_driver_can(capability, version, can, monkeypatch):
    monkeypatch.setattr(cuda_driver, '_driver', lambda: Driver(version=version))
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index: capability)
    assert triton_support._overlaps.__wrapped__(0) is can


def test_no_driver_is_of_version_0(monkeypatch):
    def missing():
        raise OSError('libcuda.so.1: cannot open shared object file')

    monkeypatch.setattr(cuda_driver, '_driver', missing)
    assert cuda_driver.driver_version() == 0
