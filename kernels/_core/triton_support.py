"""What the Triton backends share outside their kernels: when they can run, and how tensors reach them."""
import contextlib
import functools
import importlib.util
import math
import operator
import os
import shutil
import sysconfig
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import torch

from .backends import requested_backend
from .cuda_driver import Starter, compile_kernel, driver_version, types_of, why_not_driver

#: Kernels run as Python on CPU tensors, slowly, to test them without a GPU. Triton reads it when imported.
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
_NEWEST_TOO_OLD = (7, 5)


@functools.cache
def _why_not_device(index):
    """The reason why GPU ``index`` (-1: the interpreter) cannot run Triton kernels, or None."""
    if importlib.util.find_spec('triton') is None:
        return 'Triton is not installed: pip install triton, of the version that PyTorch asks for'
    import triton
    if not hasattr(triton, 'constexpr_function'):
        return f'Triton {triton.__version__} is too old: the kernels were written for 3.6, which PyTorch 2.11 brings'
    if torch.version.hip is not None:
        return 'the kernels are written for NVIDIA GPUs'
    if index >= 0:
        capability = torch.cuda.get_device_capability(index)
        if capability <= _NEWEST_TOO_OLD:
            return (f'{torch.cuda.get_device_name(index)} has compute capability '
                    f"{'.'.join(map(str, capability))}, the kernels need 8.0 or newer")
        if _starts_by_driver() and (reason := why_not_driver()):
            return f'{_why_not_build()} ({reason})'
    return None


@functools.cache
def _starts_by_driver():
    """Whether kernels are loaded and started without Triton's own functions, which it cannot build."""
    from triton import knobs
    return knobs.build.impl is None and _why_not_build() is not None


def _why_not_build():
    """Why Triton cannot build what starts a kernel, on the machine where it runs; or None."""
    if not (os.environ.get('CC') or shutil.which('gcc') or shutil.which('clang')):
        return 'Triton needs a C compiler, and there is none: install gcc or clang, or set CC'
    scheme = sysconfig.get_default_scheme().replace('posix_local', 'posix_prefix')  # as Triton looks for them
    if not os.path.exists(os.path.join(sysconfig.get_paths(scheme)['include'], 'Python.h')):
        return "Triton needs Python's headers, and they are missing: install python3-dev, or what has Python.h"
    return None


@functools.cache
def warn_once(reason):
    """Say, once for each ``reason``, that composed operations stand in."""
    warnings.warn(f'mmvssm: CUDA tensors run on composed PyTorch operations, slower: {reason}', stacklevel=2)


def has_triton(tensor):
    """Whether the Triton kernels run on the GPU of ``tensor``."""
    return tensor.is_cuda and _why_not_device(tensor.get_device()) is None


def why_not_triton(tensor):
    """The reason why the Triton kernels cannot take ``tensor``, or None. Says once if others must stand in."""
    if not tensor.is_cuda:
        if tensor.device.type != 'cpu' or not INTERPRETED or requested_backend() != 'triton':
            return f'it runs CUDA tensors, this one is on {tensor.device}'
        index = -1
    else:
        index = tensor.get_device()
    if tensor.dtype == torch.float64:
        return 'it computes in float32, this tensor is float64'
    reason = _why_not_device(index)
    if reason and not requested_backend():
        warn_once(reason)
    return reason


_OLDEST_THAT_OVERLAPS, _OLDEST_DRIVER_THAT_CAPTURES_IT = (9, 0), 12030


@functools.cache
def _overlaps(index):
    return (torch.cuda.get_device_capability(index) >= _OLDEST_THAT_OVERLAPS
            and driver_version() >= _OLDEST_DRIVER_THAT_CAPTURES_IT)


def overlaps(tensor):
    """Whether the GPU of ``tensor``, or the current one if it has none, can start a kernel before the one ahead of it
    has ended: with ``launch_pdl``, and ``let_next_start`` and ``wait_for_previous`` of ``triton_math``."""
    if tensor.is_cuda:
        return _overlaps(tensor.get_device())
    return not INTERPRETED and torch.cuda.is_available() and _overlaps(torch.cuda.current_device())


def cdiv(a, b):
    """``a / b`` rounded up; Triton's own takes microseconds."""
    return -(-a // b)


def next_power_of_2(n):
    """The least power of 2 that is not below ``n``."""
    return 1 << (n - 1).bit_length()


def unit_of(*sizes):
    """What the kernels count sizes in. They are runtime arguments, so that one compiled kernel serves all widths of a
    network; multiplied by a constant unit they remain known to be aligned."""
    return math.gcd(16, *sizes)


def as_rows(tensor, dims=1):
    """``tensor`` with dense channels (its last dimension) and the ``dims`` dimensions before them evenly spaced, so
    that they count as one dimension of rows: itself if it is so (a slice of channels is), else a copy. Returns it
    and the number of elements from one row to the next."""
    if tensor.is_contiguous():
        return tensor, tensor.shape[-1]
    row, rows = None, 1
    dense = tensor.shape[-1] == 1 or tensor.stride(-1) == 1
    for dim in range(-2, -2 - dims, -1):
        size, stride = tensor.shape[dim], tensor.stride(dim)
        if size > 1:
            row = stride if row is None else row
            dense = dense and stride == row * rows
        rows *= size
    if not dense:
        tensor, row = tensor.contiguous(), None
    return tensor, tensor.shape[-1] if row is None else row


#: Compiled kernels by all that their code depends on, and what is what among a kernel's arguments. By identity: kernels
#: live as long as their modules, and to hash one takes Triton longer than to start it.
_compiled, _signatures = {}, {}


def _signature(kernel):
    """Places of tensors and of integers among the arguments of ``kernel``, and a function that picks the constants."""
    places = [i for i, p in enumerate(kernel.params) if not p.is_constexpr]
    numbers = [i for i in places if kernel.params[i].do_not_specialize]
    constants = [i for i, p in enumerate(kernel.params) if p.is_constexpr]
    _signatures[id(kernel)] = [i for i in places if i not in numbers], numbers, operator.itemgetter(*constants)
    return _signatures[id(kernel)]


@functools.cache
def _runtime():
    from triton import knobs
    return knobs.runtime


def _is_watched(hook):
    return hook is not None and getattr(hook, 'calls', True)


def _starter(compiled):
    """What starts a compiled kernel, and what it wants between the stream and the arguments: no hooks, no metadata."""
    run, function = compiled.run, compiled.function
    first = function, compiled.packed_metadata, None, None, None
    import triton
    if triton.__version__.startswith('3.6.') and type(run).__name__ == 'CudaLauncher' \
            and not run.global_scratch_size and not run.profile_scratch_size:
        # What it does itself where the kernel needs no memory, a function of C.
        return run.launch, (function, run.launch_cooperative_grid, run.launch_pdl, None, None, *first[1:])
    return run, first


def launch(kernel, grid, *args, **options):
    """``kernel[grid](*args, **options)`` in a fraction of the processor time: a kernel compiled before is looked up
    by the constants, and by precision and alignment of the tensors, and started with bare addresses. A kernel must
    list its runtime integers in ``do_not_specialize``, and in ``do_not_specialize_on_alignment`` tensors that may lie
    anywhere, as one row of a table does; its first tensor must be there. ``grid`` has three numbers, ``args`` are all
    arguments in their order."""
    if _local.collected is not None:
        _local.collected.append((kernel, grid, args, options))
        return
    if INTERPRETED:
        kernel[grid](*args, **options)
        return
    tensors = (_signatures.get(id(kernel)) or _signature(kernel))[0]
    device = args[tensors[0]].get_device()
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            launch(kernel, grid, *args, **options)
        return
    values = list(args)
    for i in tensors:
        if values[i] is not None:
            values[i] = values[i].data_ptr()
    key = _key(kernel, args, values, options, device)
    found = _compiled.get(key)
    if found is None and _starts_by_driver():
        compiled = compile_kernel(kernel, args, options, torch.cuda.get_device_capability(device))
        found = _compiled[key] = None, Starter(compiled, types_of(kernel, args), device), ()
    elif found is None:
        compiled = kernel[grid](*args, **options)
        _compiled[key] = compiled, *_starter(compiled)
        return
    compiled, start, first = found
    if compiled is not None and watched():
        compiled[grid](*args)
    else:
        start(*grid, torch._C._cuda_getCurrentRawStream(device), *first, *values)


def _key(kernel, args, values, options, device):
    """What the code depends on, in a call with ``args`` of which ``values`` has tensors' addresses."""
    tensors, numbers, constants = _signatures.get(id(kernel)) or _signature(kernel)
    key, addresses, largest = [id(kernel), device, constants(args)], 0, 0
    for i in tensors:
        if values[i] is None:
            key.append(None)
        else:
            addresses |= values[i]
            key.append(args[i].dtype)
    for i in numbers:
        largest |= values[i]
    if addresses & 15 or largest >> 31:  # seldom: which of them are not aligned, or need 64 bits
        key += [values[i] is not None and values[i] & 15 > 0 for i in tensors]
        key += [values[i] >> 31 > 0 for i in numbers]
    return (*key, *options.values())


def started(kernel, args, values, options, device):
    """What starts ``kernel``, and what that wants before the arguments, if :func:`launch` has had such a call on
    ``device``; else None. ``values``: ``args`` with addresses in the place of tensors, or what is left of them when
    divided by 16."""
    found = _compiled.get(_key(kernel, args, values, options, device.index))
    return found and found[1:]


def watched():
    """Whether a profiler waits for launches."""
    runtime = _runtime()
    return _is_watched(runtime.launch_enter_hook) or _is_watched(runtime.launch_exit_hook)


class _Local(threading.local):
    collected = None


_local = _Local()


def collecting():
    """Whether launches of this thread are collected."""
    return _local.collected is not None


@contextlib.contextmanager
def collect_launches():
    """In this thread :func:`launch` only notes what it is called with, in the list that this yields. For passes over
    tensors on the device ``meta``, which have shapes and no memory."""
    _local.collected = collected = []
    try:
        yield collected
    finally:
        _local.collected = None


def compile_launches(launches, device):
    """Compile for GPU ``device`` what launches that were collected need, side by side: one kernel takes seconds, and a
    model has dozens. Those compiled before cost nothing."""
    different = {}
    for kernel, grid, args, options in launches:
        tensors, numbers, constants = _signatures.get(id(kernel)) or _signature(kernel)
        tensors = tuple(a is not None and (a.dtype, a.data_ptr() & 15 > 0) for a in map(args.__getitem__, tensors))
        large = tuple(args[i] >> 31 > 0 for i in numbers)
        different[id(kernel), constants(args), tensors, large, tuple(options.values())] = kernel, grid, args, options

    by_driver, capability = _starts_by_driver(), torch.cuda.get_device_capability(device)
    with torch.cuda.device(device):
        for kernel in () if by_driver else {id(kernel): kernel for kernel, *_ in launches}.values():
            kernel.device_caches[device.index]  # else made by each thread that is among the first to ask for it

    def compile_one(kernel, grid, args, options):
        if by_driver:
            compile_kernel(kernel, args, options, capability)
            return
        with torch.cuda.device(device):
            kernel.warmup(*args, grid=grid, **options).run  # noqa: B018 (what starts the kernel is compiled, too)

    processors = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    with ThreadPoolExecutor(max(1, processors // int(os.environ.get('LOCAL_WORLD_SIZE', 1)))) as pool:
        for launch_ in different.values():
            pool.submit(compile_one, *launch_)  # what cannot be compiled says so when it is launched
