"""Compile an operator's Triton kernels for an H100, without one: ``compile_for_gpu.py OPERATOR CASE...``.

Every launch of the cases' forward and backward passes, in bfloat16, or in float32 where a case is followed by
``:float32``, is compiled instead of run, and reported as a line of JSON: case, kernel, registers that spill (bytes),
shared memory (bytes), the widest load from memory (bytes of a thread), barriers, whether it waits for the kernel before
or lets the next one start, whether it has its first tensor, by which ``launch`` finds the device, and whether its
parameters are what cuda_driver.py gives it. A number as case: the first of the cases with so many channels, all of them
real and every row aligned, as in a network. ``CASE@dim=128,length=600``: a case with other sizes.
"""
import dataclasses
import functools
import json
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import torch
import triton

from mmvssm.kernels._core.cuda_driver import compile_kernel, types_of

PTXAS = next((Path(triton.__file__).parent / 'backends/nvidia/bin').glob('ptxas*'))


@functools.cache
def compiled(kernel, arguments, options):
    """``kernel`` compiled for ``arguments``: dtypes of tensors, ``'i32'`` for runtime integers, or (constant,)."""
    args = [torch.empty(0, dtype=a, device='meta') if isinstance(a, torch.dtype) else 1 if a == 'i32' else a[0]
            for a in arguments]
    return compile_kernel(kernel, args, dict(options), (9, 0))


def spilled(ptx, registers):
    """Bytes that threads keep in memory for lack of registers, by the assembler's report."""
    with tempfile.NamedTemporaryFile('w', suffix='.ptx') as file:
        file.write(ptx)
        file.flush()
        target = re.search(r'\.target (\w+)', ptx)[1]
        limit = [f'--maxrregcount={registers}'] if registers else []
        report = subprocess.run([PTXAS, '-v', f'--gpu-name={target}', *limit, file.name, '-o', '/dev/null'],
                                capture_output=True, text=True, check=True).stderr
    return int(re.search(r'(\d+) bytes spill stores', report)[1])


def report(kernel, grid, *args, case, **options):
    """Stands in for ``launch``."""
    arguments = tuple((a,) if parameter.is_constexpr or a is None else a.dtype if isinstance(a, torch.Tensor) else 'i32'
                      for parameter, a in zip(kernel.params, args, strict=True))
    result = compiled(kernel, arguments, tuple(options.items()))
    ptx = result.asm['ptx']
    widths = [int(bits) // 8 * int(count or 1)
              for count, bits in re.findall(r'(?:ld\.global|cp\.async\S*)\S*?(?:\.v(\d))?\.b(\d+)', ptx)]
    expected = ['u32' if kind == 'i32' else 'u64' for kind in types_of(kernel, args).values()] + ['u64', 'u64']
    entry = re.search(r'\.entry [^(]*\(([^)]*)\)', ptx)[1]
    print(json.dumps(dict(case=case, kernel=kernel.__name__, spilled=spilled(ptx, options.get('maxnreg')),
                          shared=result.metadata.shared, widest=max(widths, default=0),
                          barriers=len(re.findall(r'\bbar(?:rier)?\.(?:cta\.)?sync', ptx)),
                          waits='griddepcontrol.wait' in ptx, lets='griddepcontrol.launch_dependents' in ptx,
                          first=args[0] is not None,
                          parameters=re.findall(r'\.param \.(\w+)', entry) == expected)))


def main(op, *names):
    cases, dispatch = (import_module(f'mmvssm.kernels.{op}.{part}') for part in ('cases', 'dispatch'))
    import_module(f'mmvssm.kernels.{op}.triton')
    backend = next(b for b in dispatch.BACKENDS if b.name == 'triton')
    import_module(f'mmvssm.kernels.{op}.ops').BACKENDS = (dataclasses.replace(backend, why_not=lambda tensor: None),)
    kernels = [m for name, m in sys.modules.items() if name.startswith('mmvssm.kernels.')]
    modules = [m for m in kernels if hasattr(m, 'launch')]
    for module in (m for m in kernels if hasattr(m, 'overlaps')):
        module.overlaps = lambda tensor: True
    for name in names:
        for module in modules:
            module.launch = functools.partial(report, case=name)
        name, _, dtype = name.partition(':')
        name, _, sizes = name.partition('@')
        case = next(iter(cases.CASES.values())) if name.isdigit() else cases.CASES[name]
        sizes = dict(dim=name) if name.isdigit() else dict(size.split('=') for size in sizes.split(',') if size)
        case = dataclasses.replace(case, **{key: int(value) for key, value in sizes.items()})
        tensors = cases.inputs(case, getattr(torch, dtype or 'bfloat16'))
        for tensor in tensors.values():
            if tensor is not None and tensor.is_floating_point():
                tensor.requires_grad_()
        cases.operator(case, tensors).sum().backward()


if __name__ == '__main__':
    main(*sys.argv[1:])
