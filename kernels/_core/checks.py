"""Argument checks that the operators share; every message names the argument, what came and what is
allowed."""
from operator import index

import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensor(op, name, value):
    """``value`` must be a tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f'{op}: {name} is a {type(value).__name__}, expected a Tensor')


def check_shape(op, name, tensor, shape, legend):
    """``tensor.shape`` must equal ``shape``, described by ``legend``, e.g. ``'(batch, L, D)'``."""
    if tensor is None or tuple(tensor.shape) != tuple(shape):
        check_tensor(op, name, tensor)
        raise ValueError(f'{op}: {name} has shape {tuple(tensor.shape)}, expected {legend} = {tuple(shape)}')


def check_map(op, name, tensor, legend='(batch, H, W, D)', sides=('rows', 'columns', 'channels')):
    """``tensor`` must have the dimensions of ``legend``, and 1 or more of all ``sides``, those after the batch."""
    if tensor.dim() != 1 + len(sides):
        raise ValueError(f'{op}: {name} has shape {tuple(tensor.shape)}, expected {legend}')
    for size, side in zip(tensor.shape[1:], sides, strict=True):
        if size == 0:
            raise ValueError(f'{op}: {name} has 0 {side}, expected 1 or more; its shape is {tuple(tensor.shape)}')


def check_same_device(op, tensors):
    """All ``tensors``, a mapping of name to tensor or, but for the first, None, must share one device and be floating
    point."""
    first = next(iter(tensors))
    try:
        device = tensors[first].device
        if all(t is None or t.device == device and t.dtype in FLOATS for t in tensors.values()):
            return
    except AttributeError:  # it is no tensor
        pass
    present = {name: t for name, t in tensors.items() if t is not None or name == first}
    for name, tensor in present.items():
        check_tensor(op, name, tensor)
    devices = {name: t.device for name, t in present.items()}
    if len(set(devices.values())) > 1:
        where = ', '.join(f'{name} on {device}' for name, device in devices.items())
        raise ValueError(f'{op}: tensors must be on one device, got {where}')
    for name, tensor in present.items():
        if tensor.dtype not in FLOATS:
            raise TypeError(f'{op}: {name} has dtype {tensor.dtype}, expected one of '
                            f"{', '.join(str(d) for d in FLOATS)}")


def check_integer(op, name, value, least):
    """``value`` must be an integer of at least ``least``, which it is where a tracer or compiler puts its own."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    try:
        valid = index(value) >= least
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(f'{op}: {name} is {value!r}, expected an integer of at least {least}')
