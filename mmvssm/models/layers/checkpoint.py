"""Reading checkpoint files, the authors' and ours, into a backbone's names."""
import io
import pickle
from collections.abc import Mapping

import numpy as np
import torch
from mmengine import fileio
from mmengine.logging import HistoryBuffer

#: Under what files keep the weights, outermost first.
WRAPPERS = ('state_dict', 'model', 'model_ema', 'module')
#: What wrapping modules put before every name, outermost first.
PREFIXES = ('module.', 'backbone.')

_multiarray = (getattr(np, '_core', None) or np.core).multiarray


def _method_of_history_buffer(owner, name):
    """``getattr`` as far as a HistoryBuffer's pickle needs it; without limits it would let a file run code."""
    if owner is not HistoryBuffer or name.startswith('_'):
        raise pickle.UnpicklingError(f'attribute {name!r} of {owner!r} is not allowed')
    return getattr(owner, name)


#: What MMEngine's Runner saves beside weights: logged scalars and their statistics.
SAFE_GLOBALS = [
    (_method_of_history_buffer, 'builtins.getattr'),
    HistoryBuffer, _multiarray._reconstruct, _multiarray.scalar, np.ndarray, np.dtype,
    *{type(np.dtype(kind)) for kind in ('f4', 'f8', 'i4', 'i8', 'u4')}]


def read_checkpoint(filename):
    """The content of a checkpoint file or URL, on the CPU, read with ``weights_only=True``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, no PyTorch checkpoint, or holds more than tensors, plain containers and
            what MMEngine's Runner saves; or it is no dict.
    """
    filename = str(filename)
    if filename.startswith(('http://', 'https://')):
        content = torch.hub.load_state_dict_from_url(filename, map_location='cpu', weights_only=True)
    else:
        try:
            data = fileio.get(filename)
        except (FileNotFoundError, IsADirectoryError):
            raise FileNotFoundError(f"checkpoint '{filename}': no such file") from None
        try:
            with torch.serialization.safe_globals(SAFE_GLOBALS):
                content = torch.load(io.BytesIO(data), map_location='cpu', weights_only=True)
        except Exception as error:  # damaged files fail in every way that unpickling can
            why = ' '.join(str(error).split('WeightsUnpickler error:')[-1].split())[:200] or type(error).__name__
            raise ValueError(f"checkpoint '{filename}' ({len(data)} bytes) cannot be read: it is truncated, no "
                             f'PyTorch checkpoint, or holds more than weights ({why})') from error
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint '{filename}' holds a {type(content).__name__}, expected a dict of weights")
    return content


def weights_of(checkpoint):
    """The mapping of names to tensors inside ``checkpoint``, without wrapping keys."""
    while (inner := next((checkpoint[key] for key in WRAPPERS
                          if isinstance(checkpoint.get(key), Mapping)), None)) is not None:
        checkpoint = inner
    return checkpoint


def unwrap(checkpoint):
    """The mapping of names to tensors inside ``checkpoint``, without wrapping keys and prefixes.

    ``module.`` is taken off where every name has it. Where names start with ``backbone.``, those alone are
    returned if the others belong to modules of a larger model (``neck``, ``*head``, ``data_preprocessor``); any
    other name among them is kept, for the caller to report.
    """
    checkpoint = weights_of(checkpoint)
    wrapper, backbone = PREFIXES
    if checkpoint and all(str(name).startswith(wrapper) for name in checkpoint):
        checkpoint = {name[len(wrapper):]: value for name, value in checkpoint.items()}
    if any(str(name).startswith(backbone) for name in checkpoint):
        checkpoint = {name[len(backbone):] if name.startswith(backbone) else name: value
                      for name, value in checkpoint.items()
                      if name.startswith(backbone) or not _of_larger_model(name)}
    return checkpoint


def _of_larger_model(name):
    first = str(name).split('.')[0]
    return first.endswith(('head', 'neck')) or first == 'data_preprocessor'
