"""What the test cases of every operator share: random numbers, memory layouts, tolerances."""
import zlib

import torch

LAYOUTS = ('contiguous', 'half', 'channels_first', 'expanded')


def generator(name, seed=0):
    """Random numbers that belong to the case ``name``, on the CPU, so that every device gets the same."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)


def lay_out(tensor, layout):
    """``tensor`` in the memory layout that a caller might bring, NaN in the memory between its elements.

    ``'half'``: the second half of a tensor twice as wide, what ``chunk(2, -1)`` returns.
    ``'channels_first'``: (batch, D, ...) or (N, D) in memory, permuted.
    ``'expanded'``: the first entry of dimension 0 repeated with stride 0; the only layout that changes values.
    """
    if layout == 'half':
        return torch.cat([torch.full_like(tensor, torch.nan), tensor], -1).chunk(2, -1)[1]
    if layout == 'channels_first':
        where = min(1, tensor.dim() - 2)
        return tensor.movedim(-1, where).contiguous().movedim(where, -1)
    if layout == 'expanded':
        return tensor[:1].expand_as(tensor)
    return tensor


def relative_error(got, expected):
    """``||got - expected|| / ||expected||`` in float64; the plain norm of ``got`` where ``expected`` is 0."""
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    norm = expected.norm().item()
    return (got - expected).norm().item() / (norm or 1.0)
