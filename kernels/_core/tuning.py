"""Which of several tilings a Triton kernel runs with.

Each kernel has a default, so nothing is searched unless asked for: with ``MMVSSM_TUNE=1`` the first call of a class of
shapes times all candidates, on its own tensors, and the fastest is kept in a file for later runs, with the switch or
without. Tilings differ in the order of their sums, so results change in the last bits when one is found, and are equal
from run to run before and after. Search in one process: several may find different ones.
"""
import functools
import json
import os
import statistics
import uuid
import warnings
from pathlib import Path

import torch

from .triton_support import collecting

_REPEATS = 5


def _file(device):
    """Where the choices for this GPU are kept."""
    import triton
    folder = os.environ.get('MMVSSM_CACHE') or os.path.join(
        os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'mmvssm')
    name = f'{torch.cuda.get_device_name(device)} triton {triton.__version__}'.replace(' ', '_').replace('/', '_')
    return Path(folder) / f'tilings_{name}.json'


@functools.cache
def _choices(device):
    """Found tilings of GPU ``device`` by kernel and class of shapes."""
    file = _file(device)
    try:
        choices = json.loads(file.read_text())
        if not isinstance(choices, dict) or not all(isinstance(tiles, list) for tiles in choices.values()):
            raise ValueError('it has something else than lists by name')
        return choices
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f'mmvssm: {file} is not read, the default tilings are used: {error}', stacklevel=2)
        return {}


def _save(device, choices):
    file = _file(device)
    part = file.with_name(f'{file.name}.{uuid.uuid4().hex}')  # readable to others, as tempfile's are not
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_text(json.dumps(choices, indent=1, sort_keys=True))
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        warnings.warn(f'mmvssm: tilings are searched again in the next run, {file} cannot be written: {error}',
                      stacklevel=2)


def _milliseconds(function):
    """Median of some calls, after one that compiles."""
    function()
    times = []
    for _ in range(_REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)  # the GPU waits until the call is queued
        start.record()
        function()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def size_class(number):
    """The power of 2 not above ``number``: shapes of one class share their tilings."""
    return number.bit_length() - 1


_known = {}


def tiling(kernel, shape_class, candidates, tensor, run):
    """The tiling for ``kernel`` on a class of shapes.

    Args:
        kernel (str): its name.
        shape_class (tuple): numbers that the choice depends on; see :func:`size_class`.
        candidates (tuple): tilings, tuples; the first is the default.
        tensor (Tensor): one of the call's.
        run (callable): does the work of the call with the tiling that it is given.
    """
    device = _device(tensor)
    if device is None:
        return candidates[0]
    key = kernel, shape_class, tensor.dtype, device
    best = _known.get(key)
    if best is None:
        name = ' '.join(map(str, (kernel, *shape_class, tensor.dtype)))
        best = _stored(name, candidates, device)
        if best is None:
            if os.environ.get('MMVSSM_TUNE') != '1':
                best = candidates[0]
            elif collecting() or torch.cuda.is_current_stream_capturing():
                return candidates[0]
            else:
                best = _search(name, candidates, device, run)
        _known[key] = best
    return best


def _device(tensor):
    """Index of the GPU that the call is for, or None."""
    if tensor.is_cuda:
        return tensor.get_device()
    return torch.cuda.current_device() if collecting() and torch.cuda.is_available() else None


def _stored(name, candidates, device):
    found = _choices(device).get(name)
    return tuple(found) if found is not None and tuple(found) in candidates else None


def _search(name, candidates, device, run):
    with torch.no_grad(), torch.cuda.device(device):
        times = {candidate: _milliseconds(lambda: run(candidate)) for candidate in candidates}  # noqa: B023
    best = min(times, key=times.get)
    print(f'mmvssm: {name}: tiling {best} takes {times[best]:.3f} ms, the default {times[candidates[0]]:.3f} ms',
          flush=True)
    _choices.cache_clear()  # other processes may have found others
    _choices(device)[name] = list(best)
    _save(device, _choices(device))
    return best
