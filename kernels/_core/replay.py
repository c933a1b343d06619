"""Repeat a function of kernels and matrix products without the Python that chose them.

What such a function does with tensors of the same shapes is always the same: memory, kernels and products, in one
order. A :class:`Recording` notes it in a pass over tensors without memory, and repeats it on real ones in a fraction of
the processor's time. Unlike a CUDA graph it holds no memory and works on whatever tensors it is given.
"""
import threading

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .triton_support import INTERPRETED, collect_launches, started, watched

try:  # Inductor's own, in half the time
    from torch._C._dynamo.guards import _reinterpret_tensor as _part
except ImportError:
    def _part(tensor, shape, stride, offset):
        return tensor.as_strided(shape, stride, tensor.storage_offset() + offset)

_ALIGNMENT = 256
_aten = torch.ops.aten
#: By PyTorch operation, how it is repeated on its output and the tensors among its arguments.
_OPERATIONS = {
    _aten.mm.default: lambda out, a, b: torch.mm(a, b, out=out),
    _aten.mm.dtype: lambda out, a, b: torch.mm(a, b, out_dtype=out.dtype, out=out),
    _aten.addmm.default: lambda out, bias, a, b: torch.addmm(bias, a, b, out=out),
    _aten.gelu.default: lambda out, x: torch._C._nn.gelu(x, out=out),
    _aten._to_copy.default: lambda out, x: out.copy_(x),
    _aten.add_.Tensor: lambda _, x, other: x.add_(other),
    _aten._foreach_copy_.default: lambda *both: torch._foreach_copy_(both[:len(both) // 2], both[len(both) // 2:]),
}
#: Those that make memory and write none.
_EMPTY = {_aten.empty.memory_format, _aten.empty_like.default, _aten.new_empty.default, _aten.empty_strided.default}


class CannotRecord(Exception):
    """The function does something that a recording cannot repeat."""


class NotRunYet(CannotRecord):
    """A kernel has not run yet: it is not known how to start it."""


class _Operations(TorchDispatchMode):
    """Adds PyTorch's operations that compute something to ``steps``, beside launches of kernels."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if function.is_view or function in _EMPTY or function is _aten.detach.default:
            return out
        if function not in _OPERATIONS or any(key != 'dtype' for key in kwargs) \
                or any(isinstance(arg, (int, float)) for arg in args):
            raise CannotRecord(f'{function} with {args} and {sorted(kwargs)}')
        self.steps.append((function, None, list(_tensors((out, *args))), {}))
        return out


def _tensors(values):
    """The tensors in a sequence, and in sequences in it."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _storage(tensor):
    return tensor.untyped_storage()._cdata


def _plan(lives):
    """Offsets for pieces of memory, {key: (bytes, first step, last step)}, so that none overlap while both live, the
    largest first; and the size of all."""
    placed, offsets = [], {}
    for key, (size, first, last) in sorted(lives.items(), key=lambda item: -item[1][0]):
        offset = 0
        for begin, end, born, died in sorted(placed):
            if born <= last and first <= died and begin < offset + size and offset < end:
                offset = end
        offsets[key] = offset
        placed.append((offset, offset + size, first, last))
    return offsets, max((end for _, end, *_ in placed), default=0)


class Recording:
    """What ``function(*inputs)`` does.

    ``function`` returns two lists: its results, and what a later function needs. The latter share one block of memory,
    and temporary tensors another one.

    Args:
        function (callable): launches kernels with ``triton_support.launch``, and calls a few PyTorch operations.
        inputs (Sequence[Tensor | None]): on the device ``meta``. Real ones must have the same shapes and dtypes, and be
            dense.
        device (torch.device): of the real ones.
        unaligned (Sequence[int]): the inputs whose addresses are no multiples of 16.

    Raises:
        CannotRecord: there is an operation that it does not know.
        NotRunYet: there is a kernel that has not run yet.
    """

    def __init__(self, function, inputs, device, unaligned=()):
        # In inference mode composed operations would not be taken apart.
        with torch.inference_mode(False), torch.no_grad(), collect_launches() as steps, _Operations(steps):
            results, kept = function(*inputs)
        # All tensors of the pass are alive here, so no two have the same storage.
        self._device, self._unaligned, self._count = device, unaligned, len(inputs)
        self._slots = {_storage(t): (i, 0) for i, t in enumerate(inputs) if t is not None}
        self._own = {_storage(t): t for t in results if t is not None and _storage(t) not in self._slots}
        lives = {key: life for key, life in self._lives([(None, None, kept, None)]).items() if key not in self._own}
        self._kept_size = self._arrange(self._count, lives)
        for i, (key, tensor) in enumerate(self._own.items()):
            if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.nbytes:
                raise CannotRecord('a result that is a part of a tensor')
            self._slots[key] = self._count + 1 + i, 0
        self._temporary_size = self._arrange(self._count + 1 + len(self._own), self._lives(steps))
        self._own = [(tuple(tensor.shape), tensor.dtype) for tensor in self._own.values()]
        self._views, self._kept_views = _Views(), _Views()
        self._steps = [self._step(*step) for step in steps]
        self._results = [None if t is None else self._view(t) for t in results]
        # What is kept may be an input: that itself, then.
        given = {id(t): i for i, t in enumerate(inputs) if t is not None}
        self._kept_inputs = {i: given[id(t)] for i, t in enumerate(kept) if id(t) in given}
        kept = [None if i in self._kept_inputs else t for i, t in enumerate(kept)]
        if any(t is not None and self._place(t)[0] != self._count for t in kept):
            raise CannotRecord('a result, or a part of an input, is to be kept')
        self._kept = [None if t is None else self._kept_views.number(*self._place(t), t) for t in kept]
        del self._slots

    def _lives(self, steps):
        """Of the memory that has no place yet: bytes, first step, last step."""
        lives = {}
        for i, (_, _, args, _) in enumerate(steps):
            for tensor in _tensors(args):
                key = _storage(tensor)
                if key not in self._slots:
                    size = -(-tensor.untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT
                    lives[key] = size, lives.get(key, (size, i))[1], i
        return lives

    def _arrange(self, slot, lives):
        offsets, size = _plan(lives)
        self._slots.update({key: (slot, offset) for key, offset in offsets.items()})
        return size

    def _place(self, tensor):
        """The block of memory that ``tensor`` is in, and how many bytes from its beginning."""
        slot, offset = self._slots[_storage(tensor)]
        return slot, offset + tensor.storage_offset() * tensor.element_size()

    def _view(self, tensor):
        return self._views.number(*self._place(tensor), tensor)

    def _step(self, function, grid, args, options):
        """An operation or launch as it is repeated: its function, and what :meth:`__call__` gives that."""
        if grid is None:
            return _OPERATIONS[function], [self._view(tensor) for tensor in args]
        tensors = [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor)]
        values = [None if isinstance(arg, torch.Tensor) else arg for arg in args]
        if INTERPRETED:

            def interpret(*given):
                call = list(values)
                for i, tensor in zip(tensors, given, strict=True):
                    call[i] = tensor
                function[grid](*call, **options)
            return interpret, [self._view(args[i]) for i in tensors]
        places = [(i, *self._place(args[i])) for i in tensors]
        addresses = list(values)
        for i, slot, offset in places:
            addresses[i] = offset
            if slot in self._unaligned:
                addresses[i] = 1
        found = started(function, args, addresses, options, self._device)
        if found is None:
            raise NotRunYet(function.__name__)
        start, first = found
        return start, None, grid, first, values, places

    def __call__(self, inputs):
        """The results, and the memory of what is kept; None if that is nothing."""
        device = self._device
        kept = torch.empty(self._kept_size, dtype=torch.uint8, device=device) if self._kept_size else None
        blocks = [*inputs, kept]
        for shape, dtype in self._own:
            blocks.append(torch.empty(shape, dtype=dtype, device=device))
        if self._temporary_size:
            blocks.append(torch.empty(self._temporary_size, dtype=torch.uint8, device=device))
        addresses = [None if block is None else block.data_ptr() for block in blocks]
        stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == 'cuda' else None
        made, make = self._views.of(blocks)
        for function, tensors, *launch in self._steps:
            if tensors is not None:
                function(*[tensor if (tensor := made[n]) is not None else make(n) for n in tensors])
                continue
            grid, first, values, places = launch
            values = values.copy()
            for i, slot, offset in places:
                values[i] = addresses[slot] + offset
            function(*grid, stream, *first, *values)
        return [None if n is None else tensor if (tensor := made[n]) is not None else make(n)
                for n in self._results], kept

    def tensors_kept(self, inputs, kept):
        """What is kept, as the function returned it."""
        made, make = self._kept_views.of([*inputs, kept])
        tensors = [None if n is None else tensor if (tensor := made[n]) is not None else make(n) for n in self._kept]
        for i, given in self._kept_inputs.items():
            tensors[i] = inputs[given]
        return tensors


class _Views:
    """Tensors that are parts of blocks of memory, by numbers."""

    def __init__(self):
        self._numbers, self._specs = {}, []

    def number(self, slot, offset, like):
        """That of the tensor ``offset`` bytes behind the beginning of block ``slot``, else like ``like``."""
        spec = slot, offset // like.element_size(), like.dtype, tuple(like.shape), like.stride()
        if spec not in self._numbers:
            self._numbers[spec] = len(self._specs)
            self._specs.append(spec)
        return self._numbers[spec]

    def of(self, blocks):
        """A list of the tensors made so far, None for the others, and a function that makes one, given its number."""
        made, bases = [None] * len(self._specs), {}

        def make(number):
            slot, offset, dtype, shape, stride = self._specs[number]
            base = blocks[slot]
            if base.dtype != dtype:
                base = bases.get((slot, dtype))
                if base is None:
                    base = bases[slot, dtype] = blocks[slot].view(dtype)
            elif base.shape == shape and base.stride() == stride:
                made[number] = base
                return base
            made[number] = tensor = _part(base, shape, stride, offset)
            return tensor

        return made, make


def can_repeat(device):
    """Whether recordings may run: ``device`` is the current one, and no profiler wants to see launches."""
    return INTERPRETED or device.index == torch._C._cuda_getDevice() and not watched()


class Recordings:
    """Recordings by what they depend on. One is made when a case comes for the third time: until then all its kernels
    have run, and images of one size may be few."""

    def __init__(self, before=2, most=1024):
        self._before, self._most, self._found, self._lock = before, most, {}, threading.Lock()

    def get(self, case, record):
        """That for ``case``, from ``record()`` if there is none; None if it is too early, or cannot be recorded."""
        found = self._found.get(case, 0)
        if type(found) is Recording:
            return found
        if found is None:
            return None
        if found < self._before:
            found += 1
        else:
            try:
                found = record()
            except NotRunYet:
                return None
            except CannotRecord:
                found = None
        with self._lock:  # backward passes run in threads of their own
            self._found[case] = found
            if len(self._found) > self._most:
                del self._found[next(iter(self._found))]
        return found if type(found) is Recording else None
