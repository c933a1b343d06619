"""Triton's kernels without a C compiler.

Triton compiles kernels itself, but has a C compiler build what loads and starts them. Machines that only run models
often have none. Here the CUDA driver loads and starts them, called through ``ctypes``.
"""
import ctypes
import functools
import operator
import struct
import threading

import torch

#: What the kernels' arguments are to Triton, and in the memory that the driver copies them from.
_POINTERS = {torch.float32: '*fp32', torch.bfloat16: '*bf16', torch.float16: '*fp16', torch.int64: '*i64',
             torch.int32: '*i32'}
_FORMATS = {'*': 'Q', 'i32': 'i', 'i64': 'q'}
#: Versions of Triton whose kernels take two more pointers at the end, to memory that these kernels do not need.
_VERSIONS = ('3.6.',)
_SHARED_BY_DEFAULT = 48 * 1024
_MAX_DYNAMIC_SHARED = 8


@functools.cache
def _driver():
    """The CUDA driver's library."""
    driver = ctypes.CDLL('libcuda.so.1')
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint
    for name, arguments in dict(
            cuDriverGetVersion=[pointer],
            cuCtxGetCurrent=[pointer], cuCtxSetCurrent=[pointer], cuDevicePrimaryCtxRetain=[pointer, number],
            cuModuleLoadData=[pointer, ctypes.c_char_p], cuModuleGetFunction=[pointer, pointer, ctypes.c_char_p],
            cuFuncSetAttribute=[pointer, number, number], cuGetErrorString=[number, pointer],
            cuLaunchKernel=[pointer, *[size] * 7, pointer, pointer, pointer]).items():
        getattr(driver, name).argtypes = arguments
    return driver


@functools.cache
def why_not_driver():
    """Why kernels cannot be loaded and started here, or None."""
    import triton
    if not triton.__version__.startswith(_VERSIONS):
        return f'Triton {triton.__version__}'
    try:
        _driver()
    except (OSError, AttributeError) as error:
        return str(error)
    return None


def driver_version():
    """The newest CUDA that the driver can run, 12030 for 12.3; 0 without a driver."""
    version = ctypes.c_int()
    try:
        _driver().cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


def _check(result, what):
    if result:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(text))
        raise RuntimeError(f'mmvssm: {what}: CUDA error {result}, {(text.value or b"unknown").decode()}')


def types_of(kernel, args):
    """What ``args`` are to ``kernel``: a string by place of a tensor or number at run time, which others are not."""
    types = {}
    for i, (parameter, arg) in enumerate(zip(kernel.params, args, strict=True)):
        if isinstance(arg, torch.Tensor):
            types[i] = _POINTERS[arg.dtype]
        elif not parameter.is_constexpr and arg is not None:
            types[i] = 'i64' if arg >> 31 else 'i32'
    return types


def compile_kernel(kernel, args, options, capability):
    """``kernel`` compiled for ``args`` on GPUs of a compute ``capability`` (major, minor), or read from where Triton
    keeps what it compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    types = types_of(kernel, args)
    signature = {p.name: types.get(i, 'constexpr') for i, p in enumerate(kernel.params)}
    constants = {(i,): arg for i, arg in enumerate(args) if i not in types}
    aligned = {(i,): [['tt.divisibility', 16]] for i in types
               if isinstance(args[i], torch.Tensor) and args[i].data_ptr() % 16 == 0
               and not kernel.params[i].do_not_specialize_on_alignment}
    target = GPUTarget('cuda', 10 * capability[0] + capability[1], 32)
    return triton.compile(ASTSource(kernel, signature, constants, aligned), target=target, options=options)


class Starter:
    """Starts a compiled kernel on the current GPU: ``starter(*grid, stream, *values)``, with ``values`` for all
    parameters, addresses for tensors.

    Args:
        compiled: by :func:`compile_kernel`.
        types (dict): by :func:`types_of`.
    """

    def __init__(self, compiled, types, device):
        metadata = compiled.metadata
        self._name, self._shared, self._threads = metadata.name, metadata.shared, 32 * metadata.num_warps
        self._pick = operator.itemgetter(*types)
        self._pack = struct.Struct('@' + ''.join(_FORMATS[t if t in _FORMATS else '*'] for t in types.values()) + 'QQ')
        self._local = _Arguments(self._pack.size)
        driver = _driver()
        self._launch = driver.cuLaunchKernel
        context, module, self._function = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        _check(driver.cuCtxGetCurrent(ctypes.byref(context)), 'asking for the context')
        if not context:
            _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), f'making a context on GPU {device}')
            _check(driver.cuCtxSetCurrent(context), f'choosing GPU {device}')
        what = f'loading kernel {metadata.name}'
        _check(driver.cuModuleLoadData(ctypes.byref(module), compiled.asm['cubin']), what)
        _check(driver.cuModuleGetFunction(ctypes.byref(self._function), module, metadata.name.encode()), what)
        if self._shared > _SHARED_BY_DEFAULT:
            _check(driver.cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED, self._shared),
                   f'{what} with {self._shared} bytes of shared memory')

    def __call__(self, grid0, grid1, grid2, stream, *values):
        local = self._local
        self._pack.pack_into(local.memory, 0, *self._pick(values), 0, 0)
        result = self._launch(self._function, grid0, grid1, grid2, self._threads, 1, 1, self._shared, stream, None,
                              local.extra)
        if result:
            _check(result, f'starting kernel {self._name}')


class _Arguments(threading.local):
    """Memory for a kernel's arguments, and what tells the driver of it: forward and backward run in threads."""

    def __init__(self, size):
        self.memory, self._size = ctypes.create_string_buffer(size), ctypes.c_size_t(size)
        self.extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(self.memory), 2, ctypes.addressof(self._size), None)
