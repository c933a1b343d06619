"""Repeat a function of kernels and matrix products without the Python that chose them.

What such a function does with tensors of the same shapes is always the same: memory, kernels and products, in one
order. A :class:`Recording` notes it in a pass over tensors without memory, and repeats it on real ones in a fraction of
the processor's time. Unlike a CUDA graph it holds no memory and works on whatever tensors it is given.
"""
import contextlib
import functools
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
    _aten.zero_.default: lambda _, x: x.zero_(),
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
    temporary tensors another one, and some results a third.

    Args:
        function (callable): launches kernels with ``triton_support.launch``, and calls a few PyTorch operations.
        inputs (Sequence[Tensor | None]): on the device ``meta``. Real ones must have the same shapes and dtypes, and be
            dense.
        device (torch.device): of the real ones.
        unaligned (Sequence[int]): the inputs whose addresses are no multiples of 16.
        apart (int | None): so many results have memory of their own; the others, where they are of one dtype, share a
            block, and keep it as long as one of them is held. None: all are apart.

    Raises:
        CannotRecord: there is an operation that it does not know.
        NotRunYet: there is a kernel that has not run yet.
    """

    def __init__(self, function, inputs, device, unaligned=(), apart=None):
        # In inference mode composed operations would not be taken apart.
        gpu = torch.cuda.device(device) if device.type == 'cuda' else contextlib.nullcontext()
        with gpu, torch.inference_mode(False), torch.no_grad(), collect_launches() as steps, _Operations(steps):
            results, kept = function(*inputs)
        # All tensors of the pass are alive here, so no two have the same storage.
        self._device, self._unaligned, self._count = device, unaligned, len(inputs)
        self._slots = {_storage(t): (i, 0) for i, t in enumerate(inputs) if t is not None}
        own = {_storage(t): t for t in results if t is not None and _storage(t) not in self._slots}
        if any(not t.is_contiguous() or t.untyped_storage().nbytes() != t.nbytes for t in own.values()):
            raise CannotRecord('a result that is a part of a tensor')
        shared = [] if apart is None else [t for t in results[apart:] if t is not None]
        alone = {_storage(t) for t in results[:apart] if t is not None}
        alone |= {_storage(t) for t in shared if t.dtype != shared[0].dtype}
        together = self._lives([(None, None, [t for key, t in own.items() if key not in alone], None)])
        lives = {key: life for key, life in self._lives([(None, None, kept, None)]).items() if key not in own}
        kept_size, shared_size = self._arrange(self._count, lives), self._arrange(self._count + 1, together)
        own = [t for key, t in own.items() if key in alone]
        self._slots.update({_storage(t): (self._count + 3 + i, 0) for i, t in enumerate(own)})
        self._temporary_size = self._arrange(self._count + 2, self._lives(steps))
        sizes = kept_size, shared_size, self._temporary_size
        code = _Code(inputs, device, sizes, own)
        for step in steps:
            self._step(code, *step)
        self._run = code.function([None if t is None else code.view(*self._place(t), t) for t in results])
        # What is kept may be an input: that itself, then.
        given = {id(t): i for i, t in enumerate(inputs) if t is not None}
        self._kept_inputs = {i: given[id(t)] for i, t in enumerate(kept) if id(t) in given}
        kept = [None if i in self._kept_inputs else t for i, t in enumerate(kept)]
        if any(t is not None and self._place(t)[0] != self._count for t in kept):
            raise CannotRecord('a result, or a part of an input, is to be kept')
        code = _Code(inputs, device, sizes)
        self._kept = code.function([None if t is None else code.view(*self._place(t), t) for t in kept], kept=True)
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

    def _step(self, code, function, grid, args, options):
        """Add an operation or a launch to ``code``."""
        if grid is None:
            code.call(_OPERATIONS[function], [code.view(*self._place(tensor), tensor) for tensor in args])
            return
        places = {i: self._place(arg) for i, arg in enumerate(args) if isinstance(arg, torch.Tensor)}
        if INTERPRETED:
            code.call(functools.partial(function[grid], **options),
                      [code.view(*places[i], arg) if i in places else code.constant(arg) for i, arg in enumerate(args)])
            return
        addresses = list(args)
        for i, (slot, offset) in places.items():
            addresses[i] = 1 if slot in self._unaligned else offset
        found = started(function, args, addresses, options, self._device)
        if found is None:
            raise NotRunYet(function.__name__)
        start, first = found
        code.call(start, [*map(code.constant, grid), 'stream', *map(code.constant, first),
                          *[code.address(*places[i]) if i in places else code.constant(arg)
                            for i, arg in enumerate(args)]])

    def __call__(self, inputs):
        """The results, and the memory of what is kept; None if that is nothing."""
        return self._run(inputs)

    def tensors_kept(self, inputs, kept):
        """What is kept, as the function returned it."""
        tensors = self._kept(inputs, kept)
        for i, given in self._kept_inputs.items():
            tensors[i] = inputs[given]
        return tensors


class _Code:
    """Source of a Python function, a line for each launch and operation: a loop over them would take twice the time.

    Blocks of memory, by their numbers: the inputs, blocks of some ``sizes`` in bytes, the first of which is kept, and
    results.
    """

    def __init__(self, inputs, device, sizes, results=()):
        current_stream = torch._C._cuda_getCurrentRawStream if device.type == 'cuda' else lambda index: None
        self._names = dict(empty=torch.empty, part=_part, device=device, index=device.index, uint8=torch.uint8,
                           current_stream=current_stream)
        self._count, self._lines, self._views = len(inputs), [], {}
        self._blocks = [(None, None, None) if t is None else (t.dtype, tuple(t.shape), t.stride()) for t in inputs]
        self._made = []
        for size in sizes:
            self._made.append(f'b{len(self._blocks)} = ' +
                              (f'empty({size}, dtype=uint8, device=device)' if size else 'None'))
            self._blocks.append((torch.uint8, (size,), (1,)))
        for t in results:
            self._made.append(f'b{len(self._blocks)} = empty({tuple(t.shape)}, dtype={self.constant(t.dtype)}, '
                              'device=device)')
            self._blocks.append((t.dtype, tuple(t.shape), t.stride()))

    def constant(self, value):
        """``value`` in the source."""
        return repr(value) if value is None or type(value) in (int, bool) else self._name(value)

    def _name(self, value):
        name = f'c{len(self._names)}'
        self._names[name] = value
        return name

    def address(self, block, offset):
        """The address ``offset`` bytes behind the beginning of a block."""
        if ('address', block) not in self._views:
            self._views['address', block] = f'a{block}'
            self._lines.append(f'a{block} = b{block}.data_ptr()')
        return f'a{block} + {offset}' if offset else f'a{block}'

    def view(self, block, offset, like):
        """The tensor ``offset`` bytes behind the beginning of a block, else like ``like``."""
        dtype, shape, stride = self._blocks[block]
        if shape == (0,):
            raise CannotRecord('nothing but empty tensors')
        spec = block, offset, like.dtype, tuple(like.shape), like.stride()
        if spec == (block, 0, dtype, shape, stride):
            return f'b{block}'
        if spec not in self._views:
            base = f'b{block}'
            if like.dtype != dtype:
                if (block, like.dtype) not in self._views:
                    self._views[block, like.dtype] = name = f'v{len(self._views)}'
                    self._lines.append(f'{name} = {base}.view({self.constant(like.dtype)})')
                base = self._views[block, like.dtype]
            self._views[spec] = name = f'v{len(self._views)}'
            self._lines.append(f'{name} = part({base}, {tuple(like.shape)}, {like.stride()}, '
                               f'{offset // like.element_size()})')
        return self._views[spec]

    def call(self, function, args):
        self._lines.append(f'{self._name(function)}({", ".join(args)})')

    def function(self, results, kept=False):
        """That of the inputs which does all this, and returns ``results`` and what is kept; with ``kept``, which has
        that from before, ``results``."""
        count = self._count
        unpack = [f'{"".join(f"b{i}, " for i in range(count))} = inputs'] if count else []
        made = [] if kept else [*self._made, 'stream = current_stream(index)']
        lines = [f'def run(inputs{f", b{count}" if kept else ""}):', *unpack, *made, *self._lines,
                 f'return [{", ".join(map(str, results))}]' + ('' if kept else f', b{count}')]
        exec(compile('\n    '.join(lines), '<recording>', 'exec'), self._names)  # noqa: S102
        return self._names.pop('run')  # which knows them


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
