"""Reading checkpoint files, the authors' and ours, into a backbone's names."""
import io
import pickle
from collections.abc import Mapping

import torch
from mmengine import fileio

#: Under what files keep the weights, outermost first.
WRAPPERS = ('state_dict', 'model', 'model_ema', 'module')
#: What wrapping modules put before every name.
PREFIXES = ('module.', 'backbone.')


def read_checkpoint(filename):
    """The content of a checkpoint file or URL, read with ``weights_only=True``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, no PyTorch checkpoint, or holds more than tensors and plain containers.
    """
    filename = str(filename)
    if filename.startswith(('http://', 'https://')):
        return torch.hub.load_state_dict_from_url(filename, map_location='cpu', weights_only=True)
    try:
        content = fileio.get(filename)
    except FileNotFoundError:
        raise FileNotFoundError(f"checkpoint '{filename}' does not exist; set init_cfg to "
                                "dict(type='Pretrained', checkpoint=FILE), or to None to train from "
                                'scratch') from None
    try:
        return torch.load(io.BytesIO(content), map_location='cpu', weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"checkpoint '{filename}' ({len(content)} bytes) cannot be read: it is truncated, no "
                         f'PyTorch checkpoint, or holds more than weights ({error})') from error


def unwrap(checkpoint):
    """The mapping of names to tensors inside ``checkpoint``, without wrapping keys and prefixes.

    Where names start with ``backbone.``, those alone are returned: the rest belongs to necks and heads.
    """
    while (inner := next((checkpoint[key] for key in WRAPPERS
                          if isinstance(checkpoint.get(key), Mapping)), None)) is not None:
        checkpoint = inner
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in checkpoint):
            checkpoint = {name[len(prefix):]: value for name, value in checkpoint.items()
                          if name.startswith(prefix)}
    return checkpoint
