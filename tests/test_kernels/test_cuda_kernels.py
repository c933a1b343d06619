"""The CUDA kernels of selective_scan_fn where there is no GPU: run on the CPU by an emulator, compiled by nvcc."""
import pathlib
import re
import shutil
import subprocess

import emulated_scan
import pytest
import torch
from kernel_testing import cotangent_like, evaluate, room
from torch.utils.cpp_extension import CUDA_HOME, include_paths

import mmvssm.kernels
from mmvssm.kernels._core.cases import relative_error
from mmvssm.kernels.selective_scan_fn.ops import CHUNK

cases = room('selective_scan_fn', 'cases')
Case, CASES = cases.Case, cases.CASES
SOURCES = pathlib.Path(mmvssm.kernels.__file__).resolve().parent / 'selective_scan_fn' / 'csrc' / 'cuda'
#: Of 8 steps of float32, 16-byte accesses do for 256 and 300 steps, 8-byte ones for 70; of bfloat16, those for 196.
EXTRA = {case.name: case for case in (
    Case('vim', batch=1, dim=3, length=196, d_state=16),
    Case('length_70', batch=1, length=70, options='D softplus'),
    Case('turns', batch=1, dim=20, length=300, d_state=2),
    Case('segments', batch=1, dim=4, length=1500, d_state=2),
    Case('segments-constant', batch=2, dim=2, length=800, d_state=2, B='constant', options='bias softplus'),
)}


@pytest.fixture(scope='module')
def library(tmp_path_factory):
    if not shutil.which('c++'):
        pytest.skip('there is no C++ compiler to build the emulator with')
    return emulated_scan.build(tmp_path_factory.mktemp('emulated'))


def prepared(case, dtype):
    """Inputs of ``case`` as the extension hands them to the kernels: parameters in float32, groups, adjacent steps."""
    tensors = cases.inputs(case, dtype)
    for name, t in tensors.items():
        if t is not None and t.dim() < 3:
            tensors[name] = t.float().contiguous()
        elif name in 'BC' and t.dim() == 3:
            tensors[name] = t.unsqueeze(1)
    return tensors


def run(library, case, tensors, cotangent, **options):
    kernels = emulated_scan.Run(library, softplus='softplus' in case.options, **options, **tensors)
    output = kernels.forward().clone()
    segments = kernels.args.plan.segments
    results = dict(output=output, **kernels.backward(cotangent))
    return results, (segments, kernels.args.plan.segments, kernels.args.plan.turns)


def check(library, case, dtype, cotangent=None, **options):
    """All results are right, and the same in another order of threads. Returns the segments of both passes and the
    turns of backward."""
    tensors = prepared(case, dtype)
    wide = {name: None if t is None else t.double() for name, t in tensors.items()}
    cotangent = cotangent_like(tensors['u'], case.name) if cotangent is None else cotangent
    expected = evaluate(cases.reference, case, wide, cotangent=cotangent.double())
    got, cut = run(library, case, tensors, cotangent, **options)
    assert got.keys() == expected.keys()
    for name, t in got.items():
        tolerance = cases.TOLERANCES[t.dtype][name]
        error = relative_error(t, expected[name])
        assert error <= tolerance, f'{name}: relative error {error:.1e}, allowed {tolerance:.0e}'
    again, _ = run(library, case, tensors, cotangent, descending=True, **options)
    assert all(torch.equal(again[name], got[name]) for name in got), 'the order of threads matters'
    return cut


@pytest.mark.parametrize('name', [name for name, case in CASES.items() if case.layout == 'contiguous' and case.batch]
                         + ['length_70', 'turns'])
def test_float32(name, library):
    assert check(library, {**CASES, **EXTRA}[name], torch.float32) == (1, 1, 3 if name == 'turns' else 1)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bfloat16', 'float16'])
@pytest.mark.parametrize('name', ['tiny', 'constant_B', 'length_256', 'vim', 'large_steps'])
def test_half_precision(name, dtype, library):
    check(library, {**CASES, **EXTRA}[name], dtype)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('name', ['half', 'expanded'])
def test_strides(name, dtype, library):
    case = CASES[name]
    shape = case.batch, case.dim, case.length
    cotangent = cotangent_like(torch.empty(shape[1], shape[0], shape[2], dtype=dtype), name).transpose(0, 1)
    check(library, case, dtype, cotangent)


@pytest.mark.parametrize('name, processors, segments', [
    ('length_1000', 1, (4, 2)), ('length_1000', 100, (4, 4)), ('segments', 1, (3, 2)), ('segments', 2, (6, 3)),
    ('segments-constant', 1, (4, 2)), ('segments-constant', 100, (4, 4))])
def test_segments(name, processors, segments, library):
    """A GPU of many multiprocessors has too few channels of these: the sequence is shared out as well."""
    assert check(library, {**CASES, **EXTRA}[name], torch.float32, processors=processors) == (*segments, 1)


def test_chunk():
    assert emulated_scan.CHUNK == CHUNK


@pytest.fixture(scope='module')
def nvcc(tmp_path_factory):
    """Compiles one of the sources with the compiler that setup.py takes, and returns what that says."""
    compiler = CUDA_HOME and shutil.which('nvcc', path=f'{CUDA_HOME}/bin')
    if not compiler:
        pytest.skip('nvcc is not there to compile the kernels')

    def run(source, *options):
        done = subprocess.run([compiler, '-std=c++17', *options, SOURCES / source,
                               '-o', tmp_path_factory.mktemp('nvcc') / 'compiled'], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stderr

    return run


@pytest.mark.parametrize('architecture', ['sm_80', 'sm_90'])
def test_registers(architecture, nvcc):
    """Few enough for 24 warps of a multiprocessor in forward and 16 in backward. Only forward spills for that, which
    README.md says was measured."""
    for name, kernels, most, most_spilled in ('forward', 12, 80, 160), ('backward', 15, 128, 0):
        said = nvcc(f'{name}.cu', '-O3', f'-arch={architecture}', '-cubin', '-Xptxas', '-v')
        registers = [int(n) for n in re.findall(r'Used (\d+) registers', said)]
        spills = [int(n) for n in re.findall(r'(\d+) bytes spill stores', said)]
        assert len(registers) == len(spills) == kernels
        assert max(registers) <= most
        assert max(spills) <= most_spilled, said
        assert sum(map(bool, spills)) <= 6


def test_compiles_for_gpus_that_do_not_run_it(nvcc):
    """``TORCH_CUDA_ARCH_LIST`` may have them, as in NVIDIA's containers; without this nothing would be built there."""
    nvcc('forward.cu', '-arch=sm_75', '-cubin')


def test_what_pytorch_calls_compiles(nvcc):
    """``op.cpp`` alone has PyTorch's headers; the emulator does without it."""
    if not torch.version.cuda:
        pytest.skip('this PyTorch has no headers for CUDA')
    nvcc('op.cpp', '-c', '-Xcompiler', '-fsyntax-only', *(f'-I{path}' for path in include_paths()))
