"""The compiled kernels, ``torch.ops.mmvssm_cpu.*`` and ``torch.ops.mmvssm_cuda.*``, if they were built."""
import functools
import pathlib
import warnings

import torch

from .backends import requested_backend

_FOLDER = pathlib.Path(__file__).resolve().parent.parent
_LIBRARY = _FOLDER / '_C.so'
_CUDA_LIBRARY = _FOLDER / '_C_cuda.so'


def _why_not_loaded(library, without):
    """None once ``library`` is loaded, else the reason why it is not; ``without`` is the one where it is not there."""
    if not library.exists():
        return without
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return (f'the compiled kernels were built for another PyTorch than {torch.__version__} '
                f'({error}); reinstall mmvssm')
    return None


@functools.cache
def why_not_loaded():
    """None once the kernels for the CPU are loaded, else the reason why they are not."""
    return _why_not_loaded(_LIBRARY, 'the compiled kernels are not built; with a C++ compiler at hand: '
                           'MMVSSM_BUILD_EXT=1 pip install --no-build-isolation -e .')


@functools.cache
def why_not_loaded_cuda():
    """None once the CUDA kernels are loaded, else the reason why they are not."""
    return _why_not_loaded(_CUDA_LIBRARY, 'the CUDA kernels are not built; with the CUDA toolkit at hand: '
                           'FORCE_CUDA=1 pip install --no-build-isolation -e .')


@functools.cache
def _why_not_on(device):
    """None if the CUDA kernels, loaded, have code that ``device`` runs, else the reason why not."""
    if not hasattr(torch.ops.mmvssm_cuda, 'why_not'):
        return 'the CUDA kernels were built from older sources; reinstall mmvssm'
    reason = torch.ops.mmvssm_cuda.why_not(device.index)
    if not reason:
        return None
    capability = '.'.join(map(str, torch.cuda.get_device_capability(device)))
    return (f'the CUDA kernels were built for other GPUs than this one, of compute capability {capability} ({reason}); '
            f'reinstall mmvssm with TORCH_CUDA_ARCH_LIST={capability}')


@functools.cache
def _warn_once(reason, instead='CPU tensors run on composed PyTorch operations, slower'):
    warnings.warn(f'mmvssm: {instead}: {reason}', stacklevel=2)


def why_not_cpu(tensor):
    """The reason why the C++ kernels cannot take ``tensor``, or None. Says once if others must stand in."""
    if tensor.device.type != 'cpu':
        return f'it runs CPU tensors, this one is on {tensor.device}'
    reason = why_not_loaded()
    if reason and not requested_backend():
        _warn_once(reason)
    return reason


def why_not_cuda(tensor):
    """The reason why the CUDA C++ kernels cannot take ``tensor``, or None. Others do where these are not built; that
    they are and cannot run here is said once."""
    if tensor.device.type != 'cuda' or torch.version.hip:
        return f'it runs CUDA tensors, this one is on {tensor.device}'
    if tensor.dtype == torch.float64:
        return 'it computes in float32; float64 runs on torch'
    capability = torch.cuda.get_device_capability(tensor.device)
    if capability < (8, 0):
        return f'it needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}'
    reason = why_not_loaded_cuda() or _why_not_on(tensor.device)
    if reason and _CUDA_LIBRARY.exists() and not requested_backend():
        _warn_once(reason, 'CUDA tensors run on other kernels than those that were built')
    return reason
