"""Triton's interpreter takes what its compiler does not, so kernels are compiled as well, for an H100 that need not be
there."""
import json
import os
import pathlib
import subprocess
import sys

import pytest
from kernel_testing import ROOMS, backends, room

#: Kernels that keep some values in memory for lack of registers, and at most how many bytes of them.
SPILLS = {'_scan': 64, '_scan_backward': 400, '_scan_fn_backward': 200, '_forward': 64, '_norm_backward': 64,
          '_forward_kernel': 64}
#: Kernels whose threads load what they need and never meet.
ALONE = {'_scan'}
#: Cases cut as larger ones of a network are: segments, and blocks of 8 steps; whole chunks, rows of a length that is no
#: multiple of 8, channels that are adjacent instead of steps, and many states.
CUT = {'selective_scan': ['length_65@dim=128,length=600', 'length_65@dim=128,length=70,batch=80'],
       'selective_scan_fn': ['length_1000@dim=32', 'length_257@dim=128,length=197,d_state=16', 'd_state_256@length=300',
                             'channels_last@dim=128,length=512,d_state=16,batch=16',
                             'tiny@dim=128,length=512,batch=16:float32']}
#: Bytes of shared memory that a program has on GPUs of compute capability 8.6 and 8.9; others have more.
SHARED = 99 << 10


@pytest.mark.skipif(sys.platform != 'linux', reason='Triton is for Linux')
@pytest.mark.parametrize('op', [op for op in ROOMS if 'triton' in backends(op)])
def test_compiles_for_a_gpu(op):
    names = [name for name in room(op, 'cases').CASES
             if name.startswith(('tiny', 'rank_')) or name in ('no_bias', 'segments')]
    names += ['128', '128:float32'] + [f'{name}:float32' for name in names if name.startswith('rank_')]
    names += CUT.get(op, [])
    done = subprocess.run([sys.executable, 'compile_for_gpu.py', op, *names], capture_output=True, text=True,
                          cwd=pathlib.Path(__file__).parent, env={**os.environ, 'TRITON_INTERPRET': '0'})
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel['case'] for kernel in kernels} == {*names}
    for kernel in (kernel for kernel in kernels if kernel['case'] in ('128', *CUT.get(op, []))):
        assert kernel['spilled'] <= SPILLS.get(kernel['kernel'], 0), kernel
        states = 2 if kernel['case'] == '128' else 1  # between which there is a barrier
        assert kernel['kernel'] not in ALONE or kernel['barriers'] <= states - 1, kernel
    if op == 'selective_scan':  # the second of two passes over segments starts while the first one ends
        passes = [(kernel['lets'], kernel['waits']) for kernel in kernels
                  if kernel['kernel'] == '_scan' and kernel['case'] == CUT[op][0]]
        assert passes == [(True, False), (False, True)]
    for kernel in kernels:
        assert kernel['shared'] <= SHARED, kernel
        assert kernel['parameters'], kernel
        assert kernel['first'], kernel
    assert max(kernel['widest'] for kernel in kernels) >= 8  # bytes of a thread at once


SELECTION = """
import functools
import torch
from compile_for_gpu import report
from mmvssm.kernels.quadtree import selection
selection.launch = functools.partial(report, case='selection')
for dtype in (torch.float32, torch.bfloat16):
    z, noise, gains = (torch.empty(s, dtype=d, device='meta') for s, d in (
        ((2, 96, 2), dtype), ((2, 4), torch.float32), ((2, 4, 24), torch.float32)))
    selection.select(z, None, 8, 12, (0, 0), False)
    _, soft = selection.select(z, noise, 8, 12, (1, -1), True)
    selection.select_backward(z, soft, gains, 8, 12, (1, -1))
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='Triton is for Linux')
def test_selection_compiles_for_a_gpu():
    done = subprocess.run([sys.executable, '-c', SELECTION], capture_output=True, text=True,
                          cwd=pathlib.Path(__file__).parent, env={**os.environ, 'TRITON_INTERPRET': '0'})
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 6
    assert not any(kernel['spilled'] for kernel in kernels), kernels
    assert all(kernel['parameters'] and kernel['first'] for kernel in kernels), kernels


QUADTREE = """
import functools, sys
from importlib import import_module
import torch
from compile_for_gpu import report
triton = import_module('mmvssm.kernels.selective_scan.triton')
for name in ('forward', 'backward', 'blocks', 'quadtree'):
    import_module(f'{triton.__name__}.{name}').launch = functools.partial(report, case='quadtree')

def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device='meta')

x, p = empty(128, 3136, 192, dtype=torch.bfloat16), empty(128, 3136, 2, 8, dtype=torch.bfloat16)
dt, B, C = p.split((6, 1, 1), -1)
order = triton.Quadtree(empty(128, 4), 56, 56, (7, -7), sys.argv[1])
args = x, dt, empty(2, 192, 1), B, C, empty(2, 192, 6), empty(2, 192), empty(2, 192), order
y, states = import_module(f'{triton.__name__}.forward').forward(*args, chunk=32)
*_, rest = import_module(f'{triton.__name__}.backward').backward(x, *args, states, chunk=32)
rest = rest if sys.argv[1] == 'released' else None
import_module(f'{triton.__name__}.quadtree').gains_of(x, y, x, x, p, p, rest, order)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='Triton is for Linux')
@pytest.mark.parametrize('token_order', ['released', 'quadtree'])
def test_quadtree_compiles_for_a_gpu(token_order):
    """Without more barriers than there are without an order: what threads tell each other of tokens takes none."""
    done = subprocess.run([sys.executable, '-c', QUADTREE, token_order], capture_output=True, text=True,
                          cwd=pathlib.Path(__file__).parent, env={**os.environ, 'TRITON_INTERPRET': '0'})
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = {kernel['kernel']: kernel for kernel in map(json.loads, done.stdout.splitlines())}
    assert {'_scan', '_scan_backward', '_finish_tokens', '_gains'} <= kernels.keys()
    for kernel in kernels.values():
        assert kernel['spilled'] <= SPILLS.get(kernel['kernel'], 0), kernel
        assert kernel['parameters'], kernel
        assert kernel['first'], kernel
    assert min(kernels[name]['widest'] for name in ('_scan', '_scan_backward')) >= 8  # bytes of a thread at once
    assert kernels['_scan']['barriers'] <= 1, kernels['_scan']  # between directions
    assert kernels['_scan']['shared'] == 0, kernels['_scan']
