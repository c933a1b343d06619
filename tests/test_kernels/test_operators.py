"""What holds for every operator on every backend."""
import dataclasses
import itertools
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from kernel_testing import (
    DEVICES,
    ROOMS,
    Call,
    backends,
    calls,
    cotangent_like,
    evaluate,
    expected,
    leaves,
    poisoned_memory,
    room,
    tiny_calls,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmvssm.kernels import use_backend
from mmvssm.kernels._core.extension import why_not_loaded

ISAS = ('baseline', 'avx2', 'avx512')


def skip_threads(call, threads):
    if call.backend == 'triton' and threads > 1:
        pytest.skip('triton does not use the threads of the processor')


def assert_same_bits(got, other):
    assert got.keys() == other.keys()
    for name in other:
        assert torch.equal(got[name], other[name]), name


@pytest.mark.parametrize('dtype, threads', [
    pytest.param(torch.float64, 1, id='float64'),
    pytest.param(torch.float32, 1, id='float32'),
    pytest.param(torch.float32, 4, id='float32-4threads'),
    pytest.param(torch.bfloat16, 1, id='bfloat16'),
    pytest.param(torch.float16, 1, id='float16'),
], indirect=['threads'])
@pytest.mark.parametrize('call', calls(slow=True), ids=str)
def test_matches_reference(call, dtype, threads):
    skip_threads(call, threads)
    if call.interpreted and dtype.itemsize == 2 and 'tiny' not in call.case:
        pytest.skip("slow in Triton's interpreter, which runs this case in float32")
    call.check(call.evaluate(call.inputs(dtype)), expected(call.op, call.case, dtype))


@pytest.mark.parametrize('call', [call for call in tiny_calls() if call.backend == 'torch'], ids=str)
def test_gradcheck_of_reference(call):
    cases = room(call.op, 'cases')
    tensors = leaves(call.inputs(torch.float64))

    def function(*args):
        return cases.reference(cases.CASES[call.case], dict(zip(tensors, args)))

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))


@pytest.mark.parametrize('call', tiny_calls(), ids=str)
def test_gradcheck(call):
    tensors = leaves(call.inputs(torch.float64))

    def function(*args):
        return call.forward(dict(zip(tensors, args)))

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))


class Recorder(TorchDispatchMode):
    """Keeps the calls of this project's operators with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == 'mmvssm':
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def detached(args, requires_grad):
    return tuple(a.detach().requires_grad_(requires_grad and a.is_floating_point())
                 if isinstance(a, torch.Tensor) else a for a in args)


@pytest.mark.parametrize('call', tiny_calls(), ids=str)
def test_opcheck(call):
    tensors = call.inputs(torch.float32)
    with Recorder() as recorder:
        call.evaluate(tensors)
    (forward, args), (backward, backward_args) = recorder.calls
    with use_backend(call.backend):
        torch.library.opcheck(forward, detached(args, requires_grad=True))
        torch.library.opcheck(backward, detached(backward_args, requires_grad=False))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('call', calls(), ids=str)
def test_fake_tensors_foretell_shape_dtype_and_strides(call, dtype):
    with Recorder() as recorder:
        call.evaluate(call.inputs(dtype))
    assert len(recorder.calls) == 2
    for operator, args in recorder.calls:
        args = detached(args, requires_grad=False)
        with FakeTensorMode() as mode, use_backend(call.backend):
            fake = operator(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args))
        with use_backend(call.backend):
            real = operator(*args)
        for f, r in zip(tree_leaves(fake), tree_leaves(real), strict=True):
            assert (f.shape, f.dtype) == (r.shape, r.dtype)
            assert f.is_contiguous()
            assert r.is_contiguous()


@pytest.mark.parametrize('call', tiny_calls(), ids=str)
def test_device_meta_tells_shapes_and_dtypes(call):
    """Whatever backend is asked for."""
    tensors = call.inputs(torch.bfloat16)
    expected = call.evaluate(tensors)
    got = call.evaluate({name: None if t is None else t.to('meta') for name, t in tensors.items()})
    assert all(t.is_meta for t in got.values())
    assert {name: (t.shape, t.dtype) for name, t in got.items()} \
        == {name: (t.shape, t.dtype) for name, t in expected.items()}


@pytest.mark.parametrize('call', calls(lambda name, case: case.layout != 'contiguous', slow=True), ids=str)
def test_strides_do_not_matter(call):
    dtype, tolerance = (torch.float32, 1e-5) if call.backend == 'triton' else (torch.float64, 1e-12)
    strided = call.inputs(dtype)
    assert any(not t.is_contiguous() for t in strided.values() if t is not None)
    contiguous = {name: None if t is None else t.contiguous() for name, t in strided.items()}
    output = call.forward(contiguous)
    assert output.is_contiguous()
    cotangent = cotangent_like(output, call.case)
    dense = call.evaluate(contiguous, cotangent=cotangent)
    got = call.evaluate(strided, cotangent=cotangent.mT.contiguous().mT)
    for name, tensor in dense.items():
        torch.testing.assert_close(got[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize('threads', [1, 4], indirect=True)
@pytest.mark.parametrize('call', calls(lambda name, case: case.batch == 1 or name == 'half'), ids=str)
def test_equal_runs_give_equal_bits(call, threads):
    skip_threads(call, threads)
    tensors = call.inputs(torch.float32)
    with call.repeatable():
        first = call.evaluate(tensors)
        for _ in range(3):
            assert_same_bits(call.evaluate(tensors), first)


@pytest.mark.parametrize('threads', [1, 4], indirect=True)
@pytest.mark.parametrize('call', calls(), ids=str)
def test_reads_no_uninitialised_memory(call, threads):
    skip_threads(call, threads)
    tensors = call.inputs(torch.float32)
    with call.repeatable():
        usual = call.evaluate(tensors)
    with poisoned_memory():
        got = call.evaluate(tensors)
    assert_same_bits(got, usual)
    assert all(tensor.isfinite().all() for tensor in got.values())


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize('call', calls(lambda name, case: name == 'half_params' or 'tiny' in name), ids=str)
def test_autocast_changes_nothing(call, dtype):
    """Internals are float32 for whatever comes in."""
    if call.interpreted and dtype != torch.bfloat16:
        pytest.skip("slow in Triton's interpreter, which runs this in bfloat16")
    tensors = call.inputs(dtype)
    wide = {name: t.float() if t is not None and t.is_floating_point() else t for name, t in tensors.items()}
    cotangent = cotangent_like(call.forward(tensors), call.case)
    with call.repeatable():
        full = call.evaluate(wide, cotangent=cotangent.float())
        with torch.autocast(call.device, torch.bfloat16):
            got = call.evaluate(tensors, cotangent=cotangent)
    assert got['output'].dtype == dtype
    assert_same_bits(got, {name: tensor.to(got[name].dtype) for name, tensor in full.items()})


@pytest.mark.parametrize('value', [[1.0], 1.0, np.ones(1)], ids=['list', 'number', 'array'])
@pytest.mark.parametrize('op', ROOMS)
def test_no_tensor(op, value):
    """In place of any of the arguments: the message names it."""
    cases = room(op, 'cases')
    tensors = cases.inputs(cases.CASES['tiny'], torch.float32)
    for name in tensors:
        named = rf'kernels\[{"135".index(name[-1])}\]' if name.startswith('kernel') else name
        with pytest.raises(TypeError, match=f': {named} is a {type(value).__name__}, expected a Tensor'):
            cases.operator(cases.CASES['tiny'], {**tensors, name: value})


@pytest.mark.parametrize('call', tiny_calls(), ids=str)
def test_compiles_without_graph_break(call):
    torch._dynamo.reset()
    cases = room(call.op, 'cases')

    def function(case, tensors):
        return cases.operator(case, {name: None if t is None else t * 1 for name, t in tensors.items()}) * 2

    case, tensors = cases.CASES[call.case], call.inputs(torch.float32)
    with call.repeatable(), use_backend(call.backend):
        eager = evaluate(function, case, tensors)
        compiled = evaluate(torch.compile(function, backend='aot_eager', fullgraph=True), case, tensors)
    assert_same_bits(compiled, eager)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('op, first, second', [(op, *pair) for op in ROOMS
                                               for pair in itertools.permutations(backends(op), 2)])
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16], ids=['float64', 'bfloat16'])
def test_backward_may_run_on_another_backend(op, first, second, dtype, device):
    """A request can change between forward and backward: what forward leaves behind is common to all."""
    interpreted = 'triton' in (first, second) and device == 'cpu'
    for name in room(op, 'cases').CASES:
        if interpreted and not name.startswith('tiny'):
            continue  # slow
        forward, backward = Call(op, name, first, device), Call(op, name, second, device)
        backward.inputs(dtype)  # or skip
        tensors = leaves(forward.inputs(dtype))
        output = forward.forward(tensors)
        wanted = {key: t for key, t in tensors.items() if t is not None and t.requires_grad}
        with use_backend(second):
            grads = torch.autograd.grad(output, list(wanted.values()), cotangent_like(output, name))
        judge = forward if first == 'triton' else backward
        judge.check({'output': output, **dict(zip(wanted, grads))}, expected(op, name, dtype))


@pytest.mark.parametrize('call', calls(lambda name, case: name == 'half_params'), ids=str)
def test_gradients_of_some_arguments_only(call):
    tensors = call.inputs(torch.float32)
    with call.repeatable():
        everything = call.evaluate(tensors)
        for name, t in tensors.items():
            if t is None or not t.is_floating_point():
                continue
            some = {**tensors, name: t.detach().requires_grad_()}
            output = call.forward(some)
            with use_backend(call.backend):
                grad, = torch.autograd.grad(output, some[name], cotangent_like(output, call.case))
            assert torch.equal(grad, everything[name]), name


@pytest.mark.parametrize('call', tiny_calls(), ids=str)
def test_second_derivatives_raise(call):
    tensors = leaves(call.inputs(torch.float32))
    with use_backend(call.backend):
        first = next(iter(tensors.values()))
        grad, = torch.autograd.grad(call.forward(tensors).sum(), first, create_graph=True)
        with pytest.raises(NotImplementedError, match=f'{call.op}: second derivatives'):
            grad.sum().backward()


@pytest.mark.parametrize('call', tiny_calls(), ids=str)
def test_inference_mode(call):
    tensors = call.inputs(torch.float32)
    with torch.inference_mode():
        output = call.forward(tensors)
    assert torch.equal(output, call.evaluate(tensors)['output'])


@pytest.mark.parametrize('call', calls(lambda name, case: name == 'tiny'), ids=str)
def test_runs_on_the_chosen_backend(call, monkeypatch):
    ops, tensors = room(call.op, 'ops'), call.inputs(torch.float32)
    ran = []

    def spied(backend):

        def record(step):
            def run(*args, **kwargs):
                ran.append((backend.name, step))
                return getattr(backend, step)(*args, **kwargs)
            return run

        return dataclasses.replace(backend, forward=record('forward'), backward=record('backward'))

    monkeypatch.setattr(ops, 'BACKENDS', tuple(spied(backend) for backend in ops.BACKENDS))
    call.evaluate(tensors)
    assert ran == [(call.backend, 'forward'), (call.backend, 'backward')]


@pytest.fixture(scope='module')
def results_by_isa(tmp_path_factory):
    """What each instruction set makes of every case: {asked for: (in use, {(op, case): results})}."""
    if why_not_loaded():
        pytest.skip(why_not_loaded())
    folder = tmp_path_factory.mktemp('isa')
    code = 'import sys; from kernel_testing import save_cpu_results; save_cpu_results(sys.argv[1])'
    started = [subprocess.Popen([sys.executable, '-c', code, str(folder / isa)],
                                cwd=pathlib.Path(__file__).parent,
                                env={**os.environ, 'MMVSSM_CPU_ISA': isa, 'OMP_NUM_THREADS': '1'})
               for isa in ISAS]
    assert [process.wait(120) for process in started] == [0, 0, 0]
    return {isa: torch.load(folder / isa) for isa in ISAS}


@pytest.mark.parametrize('isa', ISAS)
def test_instruction_sets_agree(isa, results_by_isa):
    in_use, results = results_by_isa[isa]
    if in_use != isa:
        pytest.skip(f'this machine has no {isa}')
    assert results.keys() == {(call.op, call.case) for call in calls() if call.backend == 'cpu'}
    for (op, case), got in results.items():
        Call(op, case, 'cpu').check(got, expected(op, case, torch.float32))


def test_unknown_instruction_set_raises():
    if why_not_loaded():
        pytest.skip(why_not_loaded())
    code = 'import mmvssm.kernels._core.extension as e, torch; e.why_not_loaded(); torch.ops.mmvssm_cpu.isa()'
    done = subprocess.run([sys.executable, '-c', code], env={**os.environ, 'MMVSSM_CPU_ISA': 'sse9'},
                          capture_output=True, text=True)
    assert done.returncode != 0
    assert "MMVSSM_CPU_ISA='sse9': expected baseline, avx2 or avx512" in done.stderr
