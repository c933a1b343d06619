"""Functions of kernels and PyTorch operations are repeated without their Python."""
import ctypes
import gc
import random
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kernel_testing import deterministic

from mmvssm.kernels._core import replay, triton_support
from mmvssm.kernels._core.replay import CannotRecord, NotRunYet, Recording, Recordings
from mmvssm.kernels._core.triton_support import launch

CPU = torch.device('cpu')


class AddKernel:
    """Stands in for a compiled Triton kernel: it adds float32 numbers, of which it has nothing but the addresses."""
    __name__ = 'add'
    params = [SimpleNamespace(is_constexpr=constant, do_not_specialize=number)
              for constant, number in ((False, False), (False, False), (False, False), (False, True), (True, False))]

    @staticmethod
    def start(grid0, grid1, grid2, stream, first, a, b, out, size, scale):
        def numbers(address):
            return np.frombuffer((ctypes.c_float * size).from_address(address), np.float32)
        np.copyto(np.frombuffer((ctypes.c_float * size).from_address(out), np.float32),
                  numbers(a) * scale + (0 if b is None else numbers(b)))


@pytest.fixture
def add(monkeypatch):
    """The kernel's launch, as on a GPU."""
    kernel = AddKernel()
    for module in (triton_support, replay):
        monkeypatch.setattr(module, 'INTERPRETED', False)
    for cache in ('_compiled', '_signatures'):
        monkeypatch.setattr(triton_support, cache, {})
    monkeypatch.setattr(torch._C, '_cuda_getDevice', lambda: -1, raising=False)
    monkeypatch.setattr(torch._C, '_cuda_getCurrentRawStream', lambda device: None, raising=False)
    monkeypatch.setattr(triton_support, '_runtime', lambda: SimpleNamespace(launch_enter_hook=None,
                                                                            launch_exit_hook=None))
    monkeypatch.setattr(triton_support, '_key', lambda kernel, args, values, options, device: args[-1])
    triton_support._compiled[2.] = None, kernel.start, ('first',)

    def call(a, b, out, scale=2.):
        launch(kernel, (1, 1, 1), a, b, out, a.numel(), scale)
        return out
    return call


def like(*tensors):
    return [None if t is None else torch.empty_like(t, device='meta') for t in tensors]


def function(add):
    """Launches, operations, temporary tensors that follow one another, parts of tensors, results and what is kept."""
    def run(x, y, absent):
        assert absent is None
        both = torch.empty_like(x.new_empty(2, *x.shape))
        total, scaled = both.unbind()
        add(x, y, total)
        add(total, None, scaled)
        product = torch.mm(scaled, y.t())
        more = torch.mm(product, x)
        result = add(more, scaled, torch.empty_like(x))
        last = torch.empty_like(result)
        add(torch.nn.functional.gelu(result), more, last)
        half = last.to(torch.bfloat16)
        product.add_(product)
        return [result, None, last.view(-1), x], [both, half, x, product[1:]]
    return run


def test_results_and_kept_are_the_same(add):
    x, y = torch.randn(2, 8, 16)
    run = function(add)
    expected = run(x, y, None)
    recording = Recording(run, like(x, y, None), CPU)
    for _ in range(2):
        results, kept = recording((x, y, None))
        for got, want in zip((*results, *recording.tensors_kept((x, y, None), kept)), (*expected[0], *expected[1]),
                             strict=True):
            assert got is want or torch.equal(got, want)
    assert results[3] is x
    assert kept.dtype == torch.uint8
    x, y = torch.randn(2, 8, 16)
    assert torch.equal(recording((x, y, None))[0][0], run(x, y, None)[0][0])


def test_memory_is_not_read_before_it_is_written(add):
    x, y = torch.randn(2, 8, 16)
    recording = Recording(function(add), like(x, y, None), CPU)
    usual, _ = recording((x, y, None))
    with deterministic(fill=True):
        got, kept = recording((x, y, None))
        assert all(t.isfinite().all() for t in recording.tensors_kept((x, y, None), kept))
    for a, b in zip(got, usual, strict=True):
        assert a is b or torch.equal(a, b)


def test_parts_of_inputs(add):
    x = torch.randn(9, 16)[1:]  # dense, and begins within its storage
    recording = Recording(lambda x: ([torch.mm(x[2:].t(), x[2:])], []), like(x), CPU)
    assert torch.equal(recording([x])[0][0], x[2:].t() @ x[2:])


def test_temporary_memory_is_shared(add):
    def chain(x):
        for _ in range(10):
            x = add(x, x, torch.empty_like(x))
        return [x], []

    x = torch.randn(64, 64)
    recording = Recording(chain, like(x), CPU)
    assert recording._temporary_size == 2 * x.nbytes
    assert torch.equal(recording([x])[0][0], chain(x)[0][0])


@pytest.mark.parametrize('apart', [None, 1, 2])
def test_results_that_share_memory(add, apart):
    def run(x, y):
        total = add(x, y, torch.empty_like(x))
        product = torch.mm(total, y.t())
        more = add(torch.mm(product, x), total, torch.empty_like(x))
        return [more, torch.mm(x, y.t()), add(x, x, torch.empty_like(x)), None, y, more.to(torch.bfloat16)], [total]

    x, y = torch.randn(2, 8, 16)
    recording = Recording(run, like(x, y), CPU, apart=apart)
    with deterministic(fill=True):
        (results, kept), (again, _) = recording((x, y)), recording((x, y))
    expected = run(x, y)
    assert torch.equal(recording.tensors_kept((x, y), kept)[0], expected[1][0])
    for got, more, want in zip(results, again, expected[0], strict=True):
        assert got is want or torch.equal(got, want) and got.is_contiguous() and got.data_ptr() % 64 == 0
        assert got is None or got is y or got.data_ptr() != more.data_ptr()
    # Those of one dtype share: torch.save takes no tensors of two dtypes that do.
    assert len({results[i].untyped_storage().data_ptr() for i in (0, 1, 2, 5)}) == 4 - (apart == 1)


def test_dropped_recordings_are_gone():
    recording = Recording(lambda x: ([torch.mm(x, x)], []), like(torch.empty(4, 4)), CPU)
    function = weakref.ref(recording._run)
    gc.disable()  # as training loops do
    try:
        del recording
        assert function() is None
    finally:
        gc.enable()


@pytest.mark.parametrize('seed', range(20))
def test_plan_has_nothing_overlap(seed):
    r = random.Random(seed)
    lives = {}
    for i in range(30):
        first, last = sorted(r.choices(range(20), k=2))
        lives[i] = 256 * r.randint(1, 9), first, last
    offsets, size = replay._plan(lives)
    for i, (bytes_, first, last) in lives.items():
        assert 0 <= offsets[i] <= size - bytes_
        for j, (other, born, died) in lives.items():
            if i < j and first <= died and born <= last:
                assert offsets[i] + bytes_ <= offsets[j] or offsets[j] + other <= offsets[i]
    assert size <= sum(bytes_ for bytes_, *_ in lives.values())


@pytest.mark.parametrize('what', [
    lambda x: ([x.sin()], []), lambda x: ([x.sum(0)], []), lambda x: ([torch.empty_like(x)[1:]], []),
    lambda x: ([torch.add(x, x, alpha=2)], []), lambda x: ([torch.mm(x, x).add_(2)], []),
    lambda x: (2 * [y := torch.mm(x, x)], [y]), lambda x: ([], [x[1:]])],
    ids=['unknown', 'sum', 'part', 'option', 'number', 'result_kept', 'part_of_input_kept'])
def test_what_cannot_be_recorded(what):
    with pytest.raises(CannotRecord):
        Recording(what, like(torch.empty(4, 4)), CPU)


def test_kernel_that_has_not_run_is_recorded_later(add):
    def run(x):
        return [add(x, None, torch.empty_like(x), 3.)], []

    x, recordings = torch.randn(4), Recordings(before=0)
    with pytest.raises(NotRunYet, match='add'):
        Recording(run, like(x), CPU)
    assert recordings.get('case', lambda: Recording(run, like(x), CPU)) is None
    triton_support._compiled[3.] = triton_support._compiled[2.]
    assert recordings.get('case', lambda: Recording(run, like(x), CPU))


def test_alignment_is_part_of_what_starts_a_kernel(add, monkeypatch):
    asked = []
    monkeypatch.setattr(replay, 'started', lambda kernel, args, values, *_: asked.append(values[:3]) or (print, ()))
    x = torch.empty(8, 16)

    def run(x, y):
        both = add(x, y[1, 1:], torch.empty_like(x))
        return [add(both, None, torch.empty_like(x))], []

    Recording(run, like(x, x), CPU)
    Recording(run, like(x, x), CPU, unaligned=[1])
    assert [[None if a is None else a % 16 for a in values] for values in asked] \
        == [[0, 4, 0], [0, None, 0], [0, 1, 0], [0, None, 0]]


def test_recorded_when_a_case_comes_again():
    made = []

    def record(x=torch.empty(4, 4, device='meta')):  # noqa: B008
        made.append(1)
        return Recording(lambda x: ([torch.mm(x, x)], []), [x], CPU)

    recordings = Recordings(before=2, most=3)
    assert [recordings.get('a', record) is None for _ in range(4)] == [True, True, False, False]
    assert len(made) == 1

    def cannot():
        made.append(1)
        raise CannotRecord

    assert [recordings.get('b', cannot) for _ in range(5)] == [None] * 5
    assert len(made) == 2
    for case in 'cd':  # the oldest are forgotten
        recordings.get(case, record)
    assert recordings.get('a', record) is None
