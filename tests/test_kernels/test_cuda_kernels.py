"""The CUDA kernels of selective_scan_fn where there is no GPU: run on the CPU by an emulator, compiled by nvcc."""
import shutil

import emulated_scan
import pytest
import torch
from kernel_testing import cotangent_like, evaluate, room

from mmvssm.kernels._core.cases import relative_error
from mmvssm.kernels.selective_scan_fn.ops import CHUNK

CASES = room('selective_scan_fn', 'cases')
WALKED = 'u', 'delta', 'z'


@pytest.fixture(scope='module')
def library(tmp_path_factory):
    if not shutil.which('c++'):
        pytest.skip('there is no C++ compiler to build the emulator with')
    return emulated_scan.build(tmp_path_factory.mktemp('emulated'))


def prepared(case, dtype):
    """Inputs of ``case`` as the extension hands them to the kernels: parameters in float32, groups, adjacent steps."""
    tensors = CASES.inputs(case, dtype)
    for name, t in tensors.items():
        if t is not None and t.dim() < 3:
            tensors[name] = t.float().contiguous()
        elif name in 'BC' and t.dim() == 3:
            tensors[name] = t.unsqueeze(1)
    return tensors


def run(library, case, tensors, cotangent, **options):
    kernels = emulated_scan.Run(library, softplus='softplus' in case.options, **options, **tensors)
    output = kernels.forward().clone()
    return kernels, dict(output=output, **kernels.backward(cotangent))


def check(library, case, dtype, **options):
    tensors = prepared(case, dtype)
    wide = {name: None if t is None else t.double() for name, t in tensors.items()}
    cotangent = cotangent_like(tensors['u'], case.name)
    expected = evaluate(CASES.reference, case, wide, cotangent=cotangent.double())
    kernels, got = run(library, case, tensors, cotangent, **options)
    assert got.keys() == expected.keys()
    for name, t in got.items():
        tolerance = CASES.TOLERANCES[t.dtype][name]
        error = relative_error(t, expected[name])
        assert error <= tolerance, f'{name}: relative error {error:.1e}, allowed {tolerance:.0e}'
    again = run(library, case, tensors, cotangent, descending=True, **options)[1]
    assert all(torch.equal(again[name], got[name]) for name in got), 'the order of threads matters'
    return kernels.args.plan


Case = CASES.Case
SHAPES = [case for case in CASES.CASES.values() if case.layout == 'contiguous' and case.batch]


@pytest.mark.parametrize('case', SHAPES, ids=lambda case: case.name)
def test_float32(case, library):
    check(library, case, torch.float32)


def test_chunk(library):
    assert emulated_scan.CHUNK == CHUNK
