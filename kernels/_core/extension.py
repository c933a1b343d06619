"""The compiled kernels, ``torch.ops.mmvssm_cpu.*``, if they were built."""
import functools
import pathlib
import warnings

import torch

from .backends import requested_backend

_LIBRARY = pathlib.Path(__file__).resolve().parent.parent / '_C.so'


@functools.cache
def why_not_loaded():
    """None once the compiled kernels are loaded, else the reason why they are not."""
    if not _LIBRARY.exists():
        return ('the compiled kernels are not built; with a C++ compiler at hand: '
                'MMVSSM_BUILD_EXT=1 pip install --no-build-isolation -e .')
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as error:
        return (f'the compiled kernels were built for another PyTorch than {torch.__version__} '
                f'({error}); reinstall mmvssm')
    return None


@functools.cache
def _warn_once(reason):
    warnings.warn(f'mmvssm: CPU tensors run on composed PyTorch operations, slower: {reason}', stacklevel=2)


def why_not_cpu(tensor):
    """The reason why the C++ kernels cannot take ``tensor``, or None. Says once if others must stand in."""
    if tensor.device.type != 'cpu':
        return f'it runs CPU tensors, this one is on {tensor.device}'
    reason = why_not_loaded()
    if reason and not requested_backend():
        _warn_once(reason)
    return reason
