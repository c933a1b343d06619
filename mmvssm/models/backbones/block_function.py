"""A block of a backbone as one autograd function, for GPUs: what blocks of all kinds have in common.

A block's ``forward`` says what it computes. Run that way, its modules, operators and nodes of the autograd graph cost
the processor more time than the GPU needs for the work. A :class:`BlockFunction` calls the same kernels one after the
other, forward and backward; weights are cast at once, and gradients are added up where they are produced. It stands in
only where nobody can tell the difference: see :func:`fits`.
"""
import weakref

import torch
from mmengine.logging import print_log
from torch import nn
from torch.nn.modules import module as nn_module

from mmvssm.kernels._core.backends import BackendError, requested_backend
from mmvssm.kernels._core.eager import is_plain
from mmvssm.kernels._core.precision import autocast_on, without_autocast
from mmvssm.kernels._core.replay import Recording, Recordings, can_repeat
from mmvssm.kernels._core.triton_support import INTERPRETED, collect_launches, compile_launches, why_not_triton
from mmvssm.kernels._core.vjp import no_second_derivative

#: Whether matrix products can return float32 for half precision.
_WIDE_PRODUCTS = 'dtype' in torch.ops.aten.mm.overloads()
_PLAIN = {torch.Tensor, nn.Parameter}


def untouched(modules):
    """Whether nobody could tell if these modules were not called: there is no hook and no ``forward`` of their own."""
    for m in modules:
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks \
                or 'forward' in m.__dict__:
            return False
    return not nn_module._has_any_global_hook()


def are_plain(parameters):
    """Whether these are parameters and nothing that looks like one. FSDP's are plain tensors, which the second pass of
    checkpointing does not find in the modules: both passes call these, then."""
    kinds = set(map(type, parameters))
    return kinds == {nn.Parameter} or kinds <= _PLAIN and not _saving_is_watched()


def fits(x, branch, scale, parameters, dim, cast):
    """Whether a block of ``dim`` channels with ``parameters`` may run as one function. False if its modules must be
    called one by one: another backend than Triton, a compiler, tracer or mode that wants to see operators, or arguments
    that do not fit, which the modules report. ``cast``: places of the parameters that matrix products take."""
    if requested_backend() not in (None, 'triton') or why_not_triton(x) is not None or not x.numel() \
            or not is_plain((x, branch, scale)):
        return False
    device = x.get_device()
    if {p.get_device() for p in parameters} != {device} or x.dim() != 4 or x.shape[-1] != dim:
        return False
    if branch is not None and (branch.shape != x.shape or branch.get_device() != device
                               or not branch.is_floating_point()):
        return False
    if scale is not None and (branch is None or scale.shape != x.shape[:1] or scale.get_device() != device):
        return False
    return autocast_on(x) or all(parameters[i].dtype == x.dtype for i in cast)


def precision(x):
    """That of matrix products."""
    return torch.get_autocast_dtype(x.device.type) if autocast_on(x) else x.dtype


def cast(parameters, dtype):
    """``parameters`` in ``dtype``, by one kernel."""
    if all(p.dtype == dtype for p in parameters):
        return parameters
    cast = [torch.empty_like(p, dtype=dtype) for p in parameters]
    torch._foreach_copy_(cast, parameters)
    return cast


def product(a, b, dtype):
    """``a @ b`` in ``dtype``, rounded once if PyTorch can."""
    if a.dtype == dtype:
        return torch.mm(a, b)
    if _WIDE_PRODUCTS and dtype == torch.float32 and (a.is_cuda or a.is_meta and not INTERPRETED):
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


class BlockFunction:
    """What blocks of a kind compute, from tensors and constants. The first tensors are ``x``, ``branch``, ``scale``, as
    a block takes them, and the ``scale2`` of its first branch; the last are its parameters.

    Args:
        name (str): of the backbone, for messages.
        given (int): tensors ahead of the parameters. Those after the first four are dense and aligned, or None.
        sizes (Sequence[int]): places of parameters that all other shapes follow from.
        forward (callable): ``forward(inputs, constants, dtype, kept)`` returns the sum so far, and the branch that is
            yet to be added to it; what backward needs is appended to the list ``kept``, unless that is None.
        backward (callable): ``backward(grad_sum, grad_branch, constants, needed, inputs, kept)`` returns gradients of
            ``x`` and ``branch``, and a list of those of the parameters. ``needed``: whether each of these is.
    """

    def __init__(self, name, given, sizes, forward, backward):
        self.name, self.given, self.sizes, self.forward, self.backward = name, given, sizes, forward, backward
        self.recordings = Recordings()

    def __call__(self, inputs, constants):
        """The sum, and the branch that is yet to be added to it."""
        dtype = precision(inputs[0])
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
            return _Function.apply(self, constants, dtype, *inputs)
        recorded = self.recorded_forward(self.case(inputs, constants, dtype), inputs, constants, dtype, False)
        return tuple(recorded(inputs)[0] if recorded else self.forward(inputs, constants, dtype, None))

    def gradients(self, grad_sum, grad_branch, constants, needed, inputs, kept):
        """Of all inputs, a list."""
        x, branch, grads = self.backward(grad_sum, grad_branch, constants, needed, inputs, kept)
        return [x, branch, *[None] * (self.given - 2), *(
            grad if grad is None or grad.dtype == p.dtype else grad.to(p.dtype)
            for grad, p in zip(grads, inputs[self.given:], strict=True))]

    def case(self, inputs, constants, dtype):
        """All that a recording depends on. None if there can be none: it takes dense tensors in aligned memory."""
        x, branch, scale, scale2, *more = inputs[:self.given]
        parameters = inputs[self.given:]
        if not can_repeat(x.device) or not all(t is None or t.is_contiguous() for t in (scale, scale2)):
            return None
        addresses = 0
        for tensor in (x, *parameters) if branch is None else (x, branch, *parameters):
            if not tensor.is_contiguous():
                return None
            addresses |= tensor.data_ptr()
        if addresses & 15:
            return None
        return (x.shape, *[parameters[i].shape for i in self.sizes], x.dtype, dtype, constants, x.device,
                branch is not None and branch.dtype, scale is not None and scale.dtype, _unaligned(scale),
                scale2 is not None and scale2.dtype, _unaligned(scale2), *[t is None for t in more],
                *[p.dtype for p in parameters])

    def recorded_forward(self, case, inputs, constants, dtype, keeps):
        """The recording of ``forward`` for ``inputs``, or None."""
        def forward(*inputs):
            kept = [] if keeps else None
            results = self.forward(inputs, constants, dtype, kept)
            return results, kept or []

        def record():
            return Recording(forward, _like(inputs), inputs[0].device, [i for i in (2, 3) if _unaligned(inputs[i])])

        return case and self.recordings.get((case, keeps), record)

    def recorded_backward(self, case, recorded, inputs, constants, needed):
        """The recording of ``gradients`` that follows the one ``recorded``, or None. ``inputs``: the gradients, those
        of ``recorded``, and the memory that it kept."""
        def backward(grad_sum, grad_branch, *inputs):
            *inputs, kept = inputs
            kept = recorded.tensors_kept(inputs, kept)
            return self.gradients(grad_sum, grad_branch, constants, needed, inputs, kept), []

        def record():
            # Gradients of parameters come and go together.
            return Recording(backward, _like(inputs), inputs[0].device, [i for i in (4, 5) if _unaligned(inputs[i])], 2)

        if not all(grad.is_contiguous() and not grad.data_ptr() & 15 for grad in inputs[:2]):
            return None
        return self.recordings.get((case, needed, inputs[0].dtype, inputs[1].dtype), record)


def _unaligned(scale):
    return None if scale is None else scale.data_ptr() & 15 > 0


def _saving_is_watched():
    """Whether hooks see what is saved for backward: checkpointing wants the same tensors in both of its passes."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _like(tensors):
    return [None if t is None else torch.empty_like(t, device='meta') for t in tensors]


class _Function(torch.autograd.Function):

    @staticmethod
    def forward(ctx, function, constants, dtype, *inputs):
        ctx.function, ctx.constants, ctx.dtype = function, constants, dtype
        ctx.case = function.case(inputs, constants, dtype)
        ctx.recorded = function.recorded_forward(ctx.case, inputs, constants, dtype, True)
        if ctx.recorded:
            results, kept = ctx.recorded(inputs)
            if _saving_is_watched():
                ctx.save_for_backward(*inputs, *ctx.recorded.tensors_kept(inputs, kept))
                ctx.recorded = None
            else:
                ctx.save_for_backward(*inputs, kept)
            return tuple(results)
        kept = []
        results = function.forward(inputs, constants, dtype, kept)
        ctx.save_for_backward(*inputs, *kept)
        return tuple(results)

    @staticmethod
    def backward(ctx, grad_sum, grad_branch):
        if requested_backend() not in (None, 'triton'):
            raise BackendError(f"backend '{requested_backend()}' is requested for the backward pass of a block of "
                               f"{ctx.function.name} that ran on 'triton'; request it for both passes")
        with torch.no_grad():
            grads = _gradients(ctx, grad_sum, grad_branch)
        if torch.is_grad_enabled():
            grads = _Final.apply(ctx.function.name, torch.empty(0, requires_grad=True), *grads)
        return None, None, None, *grads


def _gradients(ctx, grad_sum, grad_branch):
    function, saved, needed = ctx.function, ctx.saved_tensors, ctx.needs_input_grad[3 + ctx.function.given:]
    count = function.given + len(needed)
    inputs, kept = saved[:count], saved[count:]
    if ctx.recorded:
        # ``p.data = ...`` gives a parameter another dtype or layout and nobody notices.
        if function.case(inputs, ctx.constants, ctx.dtype) == ctx.case:
            inputs_too = grad_sum, grad_branch, *saved
            recorded = function.recorded_backward(ctx.case, ctx.recorded, inputs_too, ctx.constants, needed)
            if recorded:
                return recorded(inputs_too)[0]
        kept = ctx.recorded.tensors_kept(inputs, *kept)
    return without_autocast(function.gradients)(grad_sum, grad_branch, ctx.constants, needed, inputs, kept)


class _Final(torch.autograd.Function):
    """Gradients that have none of their own: PyTorch would take these for zero."""

    @staticmethod
    def forward(ctx, name, anchor, *grads):
        ctx.name = name
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx, *grads):
        return no_second_derivative(ctx.name, 'what is built of *_reference functions')(ctx, *grads)


_compiled = weakref.WeakKeyDictionary()


def compile_kernels(name, stages, x, ready, launches_of):
    """Compile the kernels of all ``stages`` side by side, before the first pass; one after the other, as they are
    needed, would take minutes. ``x`` is the input of the first stage. ``ready(x)``: whether its blocks run as
    functions; ``launches_of(stages, x, backward)``: the launches of both passes."""
    if INTERPRETED:
        return
    done = _compiled.setdefault(stages, set())
    case = x.device, x.dtype, precision(x), torch.is_grad_enabled(), stages.training
    if case not in done and ready(x):
        done.add(case)
        with torch.cuda.device(x.device):
            launches = launches_of(stages, x, torch.is_grad_enabled())
        print_log(f'{name}: the GPU kernels are compiled, or read from where Triton keeps them, before the first pass',
                  logger='current')
        compile_launches(launches, x.device)


@torch.no_grad()
def block_launches(function, stages, x, backward, case_of):
    """The kernel launches of the blocks in a pass over ``x``, the first stage's input, and of its ``backward`` pass;
    equal blocks of a stage are left out.

    ``case_of(block, batch, height, width)`` gives constants, the tensors between the first four and the parameters, and
    these, on any device; or None for a block that does not run as one function.
    """
    dtype, (batch, height, width, _) = precision(x), x.shape

    def meta(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device='meta')

    with collect_launches() as launches:
        for stage in stages:
            seen, dropped = set(), False
            for i, block in enumerate(stage.blocks):
                found = case_of(block, batch, height, width)
                if found is None:
                    continue
                constants, more, parameters = found
                drops = block.drop_path.training and block.drop_path.drop_prob > 0
                case, dropped = (i > 0, dropped, drops, len(parameters)), drops
                if case in seen:
                    continue
                seen.add(case)
                more, parameters = _like(more), _like(parameters)
                shape, factor = (batch, height, width, parameters[0].shape[0]), meta(batch, dtype=torch.float32)
                inputs = (meta(*shape, dtype=x.dtype), meta(*shape) if i > 0 else None, factor if case[1] else None,
                          factor if drops else None, *more, *parameters)
                kept = []
                results = function.forward(inputs, constants, dtype, kept)
                if backward:
                    function.gradients(*results, constants, [True] * len(parameters), inputs, kept)
            height, width = -(-height // 2), -(-width // 2)
    return launches
