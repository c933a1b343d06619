"""A block of Spatial-Mamba as one autograd function, for GPUs.

``Block.forward`` in spatial_mamba.py says what a block computes. Run that way, its modules, operators and nodes of the
autograd graph cost the processor more time than the GPU needs for the work. Here the same kernels are called one after
the other, forward and backward; weights are cast at once, and gradients are added up where they are produced. It
stands in only where nobody can tell the difference: see :func:`parameters_of`.
"""
import functools
import operator
import weakref

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import nn
from torch.nn.modules import module as nn_module

from mmvssm.kernels._core.backends import BackendError, requested_backend
from mmvssm.kernels._core.eager import is_plain
from mmvssm.kernels._core.precision import without_autocast
from mmvssm.kernels._core.replay import Recording, Recordings, can_repeat
from mmvssm.kernels._core.triton_support import INTERPRETED, collect_launches, compile_launches, why_not_triton
from mmvssm.kernels._core.vjp import no_second_derivative
from mmvssm.kernels.selective_scan.ops import CHUNK

from ..layers.depthwise import DepthwiseConv
from ..layers.mlp import MLP

#: Whether matrix products can return float32 for half precision.
_WIDE_PRODUCTS = 'dtype' in torch.ops.aten.mm.overloads()


@functools.cache
def _rooms():
    """The kernels, which need Triton."""
    from mmvssm.kernels.depthwise_conv import triton as conv
    from mmvssm.kernels.downsample_conv import triton as downsample
    from mmvssm.kernels.gelu_backward import triton as gelu
    from mmvssm.kernels.norm_gate import triton as gate
    from mmvssm.kernels.residual_conv_norm import triton as residual
    from mmvssm.kernels.selective_scan import triton as scan
    from mmvssm.kernels.state_fusion import triton as fusion
    return residual, conv, scan, fusion, gate, gelu, downsample


#: Names of modules and of parameters by where they are found; the order of the parameters is that of :func:`run`.
_OF_BLOCK = operator.itemgetter('cpe1', 'ln_1', 'self_attention', 'cpe2', 'ln_2', 'mlp')
_OF_MIXER = operator.itemgetter('in_proj', 'conv2d', 'state_fusion', 'out_norm', 'out_proj')
_OF_MLP = operator.itemgetter('fc1', 'act', 'fc2')
_SCAN = operator.itemgetter('x_proj_weight', 'dt_projs_weight', 'dt_projs_bias', 'A_logs', 'Ds')
_FUSION = operator.itemgetter('kernel_3', 'kernel_3_1', 'kernel_3_2', 'alpha')
_BOTH = operator.itemgetter('weight', 'bias')
#: Places of the parameters that matrix products take, in the precision of autocast.
_CAST = IN_PROJ, X_PROJ, OUT_PROJ, FC1, FC1_BIAS, FC2, FC2_BIAS = 4, 7, 18, 23, 24, 25, 26
_PLAIN = {torch.Tensor, nn.Parameter}


@functools.cache
def _kinds():
    from .spatial_mamba import Block, StateFusion, StructureAwareSSM
    return (Block, DepthwiseConv, nn.LayerNorm, StructureAwareSSM, DepthwiseConv, nn.LayerNorm, MLP, nn.Linear,
            DepthwiseConv, StateFusion, nn.LayerNorm, nn.Linear, nn.Linear, nn.GELU, nn.Linear)


@functools.lru_cache
def _shapes_of(dim, inner, rank, d_state, hidden):
    """Of the parameters, in order."""
    conv, wide_conv = ((dim, 1, 3, 3), (dim,)), ((inner, 1, 3, 3), (inner,))
    norm = (dim,), (dim,)
    return (*conv, *norm, (2 * inner, dim), *wide_conv, (rank + 2 * d_state, inner), (inner, rank), (inner,),
            (inner, d_state), (inner,), *[wide_conv[0]] * 3, (3,), (inner,), (inner,), (dim, inner), *conv, *norm,
            (hidden, dim), (hidden,), (dim, hidden), (dim,))


def untouched(modules):
    """Whether nobody could tell if these modules were not called: there is no hook and no ``forward`` of their own."""
    for m in modules:
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks \
                or 'forward' in m.__dict__:
            return False
    return not nn_module._has_any_global_hook()


def _parameters(block):
    """The block's parameters in the order in which :func:`run` takes them. None if there is something else in it than
    its own modules and parameters, or a hook, that would go unnoticed."""
    if type(block) is not _kinds()[0]:
        return None
    try:
        own = _OF_BLOCK(block._modules)
        modules = own + _OF_MIXER(own[2]._modules) + _OF_MLP(own[5]._modules)
        if tuple(map(type, modules)) != _kinds()[1:]:
            return None
        cpe1, ln_1, mixer, cpe2, ln_2, _, in_proj, conv, fusion, out_norm, out_proj, fc1, act, fc2 = modules
        if act.approximate != 'none' or in_proj._parameters['bias'] is not None \
                or out_proj._parameters['bias'] is not None or not untouched(modules):
            return None
        parameters = (*_BOTH(cpe1._parameters), *_BOTH(ln_1._parameters), in_proj._parameters['weight'],
                      *_BOTH(conv._parameters), *_SCAN(mixer._parameters), *_FUSION(fusion._parameters),
                      *_BOTH(out_norm._parameters), out_proj._parameters['weight'], *_BOTH(cpe2._parameters),
                      *_BOTH(ln_2._parameters), *_BOTH(fc1._parameters), *_BOTH(fc2._parameters))
        if not _PLAIN.issuperset(map(type, parameters)):
            return None
        (dim,), (inner, rank), (_, d_state), (hidden, _) = (parameters[i].shape for i in (1, 8, 10, FC1))
    except (AttributeError, KeyError, ValueError):
        return None
    if tuple([p.shape for p in parameters]) != _shapes_of(dim, inner, rank, d_state, hidden):
        return None
    return parameters


def parameters_of(block, x, branch, scale):
    """The parameters for :func:`run`. None if the modules must be called one by one: another backend than Triton, a
    compiler, tracer or mode that wants to see operators, other modules or hooks than the block's own, or
    arguments that do not fit, which the modules report."""
    if requested_backend() not in (None, 'triton') or why_not_triton(x) is not None or not x.numel() \
            or not is_plain((x, branch, scale)):
        return None
    parameters = _parameters(block)
    device = x.get_device()
    if parameters is None or {p.get_device() for p in parameters} != {device}:
        return None
    if x.dim() != 4 or x.shape[-1] != parameters[1].shape[0]:
        return None
    if branch is not None and (branch.shape != x.shape or branch.get_device() != device
                               or not branch.is_floating_point()):
        return None
    if scale is not None and (branch is None or scale.shape != x.shape[:1] or scale.get_device() != device):
        return None
    if not torch.is_autocast_enabled(x.device.type) and any(parameters[i].dtype != x.dtype for i in _CAST):
        return None
    return parameters


def _cast(parameters, dtype):
    """Those of ``_CAST`` in ``dtype``."""
    parameters = [parameters[i] for i in _CAST]
    if all(p.dtype == dtype for p in parameters):
        return parameters
    cast = [torch.empty_like(p, dtype=dtype) for p in parameters]
    torch._foreach_copy_(cast, parameters)
    return cast


def _product(a, b, dtype):
    """``a @ b`` in ``dtype``, rounded once if PyTorch can."""
    if a.dtype == dtype:
        return torch.mm(a, b)
    if _WIDE_PRODUCTS and dtype == torch.float32 and (a.is_cuda or a.is_meta and not INTERPRETED):
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def _forward(x, branch, scale, scale2, eps, parameters, dtype, kept):
    """The block's results. What its backward pass needs is appended to ``kept``, unless that is None."""
    residual, conv, scan, fusion, gate, *_ = _rooms()
    (cpe1_w, cpe1_b, ln1_w, ln1_b, _, conv_w, conv_b, _, dt_w, dt_b, A_logs, Ds, k1, k3, k5, alpha, norm_w, norm_b, _,
     cpe2_w, cpe2_b, ln2_w, ln2_b, *_) = parameters
    in_w, x_w, out_w, fc1_w, fc1_b, fc2_w, fc2_b = _cast(parameters, dtype)
    batch, height, width, dim = x.shape
    inner, d_state = A_logs.shape
    rank, length = dt_w.shape[1], height * width
    rows = batch * length

    def keep(*tensors):
        if kept is not None:
            kept.extend(tensors)

    y1, n = residual.forward(x, branch, scale, cpe1_w, cpe1_b, ln1_w, ln1_b, eps[0])
    n = n.view(rows, dim).to(dtype)
    xz = F.linear(n, in_w).view(batch, height, width, 2 * inner)
    keep(y1, n, xz)
    u, z = xz.chunk(2, -1)
    u = conv.forward(u, conv_w, conv_b, False, True)
    p = F.linear(u.view(rows, inner), x_w).view(batch, length, 1, -1)
    dt, B, C = p.split((rank, d_state, d_state), -1)
    h, states = scan.forward(u.view(batch, length, inner), dt, A_logs, B, None, dt_w, dt_b, None, None, chunk=CHUNK,
                             log=True)
    h = h.view(batch, height, width, d_state, inner)
    keep(u, p, h, states)
    y = fusion.forward(h, C, u, Ds, k1, k3, k5, alpha)
    del u, h, states, p, dt, B, C
    g = gate.forward(y, z, norm_w, norm_b, eps[1]).view(rows, inner)
    o = F.linear(g, out_w).view(x.shape)
    keep(y, g, o)
    del y, z, xz, g
    y, n = residual.forward(y1, o, scale2, cpe2_w, cpe2_b, ln2_w, ln2_b, eps[2])
    del y1, o
    n = n.view(rows, dim).to(dtype)
    a = F.linear(n, fc1_w, fc1_b)
    keep(n, a, in_w, x_w, out_w, fc1_w, fc2_w)
    a = F.gelu(a)
    return y, F.linear(a, fc2_w, fc2_b).view(x.shape)


_recordings = Recordings()


def _case(x, branch, scale, scale2, eps, dtype, parameters):
    """All that a recording depends on. None if there can be none: it takes dense tensors in aligned memory."""
    if not can_repeat(x.device) or not all(t is None or t.is_contiguous() for t in (scale, scale2)):
        return None
    addresses = 0
    for tensor in (x, *parameters) if branch is None else (x, branch, *parameters):
        if not tensor.is_contiguous():
            return None
        addresses |= tensor.data_ptr()
    if addresses & 15:
        return None
    return (x.shape, parameters[8].shape, parameters[10].shape, parameters[FC1].shape, x.dtype, dtype, eps, x.device,
            branch is not None and branch.dtype, scale is not None and scale.dtype, _unaligned(scale),
            scale2 is not None and scale2.dtype, _unaligned(scale2), *[p.dtype for p in parameters])


def _unaligned(scale):
    return None if scale is None else scale.data_ptr() & 15 > 0


def _saving_is_watched():
    """Whether hooks see what is saved for backward: checkpointing wants the same tensors in both of its passes."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _like(tensors):
    return [None if t is None else torch.empty_like(t, device='meta') for t in tensors]


def _recorded_forward(case, inputs, eps, dtype, keeps):
    """The recording of ``_forward`` for ``inputs``, which are x, branch, scale, scale2 and parameters; or None."""
    def forward(*inputs):
        kept = [] if keeps else None
        results = _forward(*inputs[:4], eps, inputs[4:], dtype, kept)
        return results, kept or []

    def record():
        return Recording(forward, _like(inputs), inputs[0].device, [i for i in (2, 3) if _unaligned(inputs[i])])

    return case and _recordings.get((case, keeps), record)


def _recorded_backward(case, recorded, inputs, eps, needed):
    """The recording of ``_backward`` that follows the one ``recorded``, or None. ``inputs``: the gradients, those of
    ``recorded``, and the memory that it kept."""
    def backward(grad_y2, grad_out, *inputs):
        *inputs, kept = inputs
        grads = _backward.__wrapped__(grad_y2, grad_out, eps, needed, *inputs[:4],
                                      *recorded.tensors_kept(inputs, kept), *inputs[4:])
        return grads, []

    def record():
        # Gradients of parameters come and go together.
        return Recording(backward, _like(inputs), inputs[0].device, [i for i in (4, 5) if _unaligned(inputs[i])], 2)

    if not all(grad.is_contiguous() and not grad.data_ptr() & 15 for grad in inputs[:2]):
        return None
    return _recordings.get((case, needed, inputs[0].dtype, inputs[1].dtype), record)


class _Block(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, branch, scale, scale2, eps, dtype, *parameters):
        inputs = x, branch, scale, scale2, *parameters
        ctx.case, ctx.eps, ctx.dtype = _case(x, branch, scale, scale2, eps, dtype, parameters), eps, dtype
        ctx.recorded = _recorded_forward(ctx.case, inputs, eps, dtype, True)
        if ctx.recorded:
            results, kept = ctx.recorded(inputs)
            if _saving_is_watched():
                ctx.save_for_backward(*inputs, *ctx.recorded.tensors_kept(inputs, kept))
                ctx.recorded = None
            else:
                ctx.save_for_backward(*inputs, kept)
            return tuple(results)
        kept = []
        results = _forward(x, branch, scale, scale2, eps, parameters, dtype, kept)
        ctx.save_for_backward(*inputs, *kept)
        return results

    @staticmethod
    def backward(ctx, grad_y2, grad_out):
        if requested_backend() not in (None, 'triton'):
            raise BackendError(f"backend '{requested_backend()}' is requested for the backward pass of a block of "
                               "Spatial-Mamba that ran on 'triton'; request it for both passes")
        with torch.no_grad():
            grads = _gradients(ctx, grad_y2, grad_out, ctx.needs_input_grad[6:])
        if torch.is_grad_enabled():
            grads = _Final.apply(torch.empty(0, requires_grad=True), *grads)
        return grads


def _gradients(ctx, grad_y2, grad_out, needed):
    saved = ctx.saved_tensors
    inputs, kept = saved[:4 + len(needed)], saved[4 + len(needed):]
    if ctx.recorded:
        # ``p.data = ...`` gives a parameter another dtype or layout and nobody notices.
        if _case(*inputs[:4], ctx.eps, ctx.dtype, inputs[4:]) == ctx.case:
            inputs_too = grad_y2, grad_out, *saved
            recorded = _recorded_backward(ctx.case, ctx.recorded, inputs_too, ctx.eps, needed)
            if recorded:
                return (*recorded(inputs_too)[0],)
        kept = ctx.recorded.tensors_kept(inputs, *kept)
    return _backward(grad_y2, grad_out, ctx.eps, needed, *inputs[:4], *kept, *inputs[4:])


class _Final(torch.autograd.Function):
    """Gradients that have none of their own: PyTorch would take these for zero."""

    @staticmethod
    def forward(ctx, anchor, *grads):
        return tuple(None if grad is None else grad.view_as(grad) for grad in grads)

    backward = staticmethod(no_second_derivative('SpatialMamba', 'what is built of *_reference functions'))


@without_autocast
def _backward(grad_y2, grad_out, eps, needed, x, branch, scale, scale2, y1, n1, xz, u, p, h, states, y, g, o, n2, a,
              in_w, x_w, out_w, fc1_w, fc2_w, *parameters):
    residual, conv, scan, fusion, gate, gelu, _ = _rooms()
    (cpe1_w, cpe1_b, ln1_w, ln1_b, _, conv_w, conv_b, _, dt_w, dt_b, A_logs, Ds, k1, k3, k5, alpha, norm_w, norm_b, _,
     cpe2_w, cpe2_b, ln2_w, ln2_b, *_) = parameters
    batch, height, width, dim = x.shape
    inner, d_state = A_logs.shape
    rank, length = dt_w.shape[1], height * width
    rows = batch * length
    grads = [None] * len(parameters)

    def of_weight(i, grad, inputs):
        if needed[i]:
            grads[i] = _product(grad.t(), inputs, parameters[i].dtype)

    grad_out = grad_out.reshape(rows, dim)
    if needed[FC2_BIAS]:
        grads[FC2_BIAS] = gelu.column_sums(grad_out)
    grad_a, m, grads[FC1_BIAS] = gelu.gelu_backward(torch.mm(grad_out, fc2_w), a)
    of_weight(FC2, grad_out, m)
    del m
    of_weight(FC1, grad_a, n2)
    grad_n = torch.mm(grad_a, fc1_w).view(x.shape)
    del grad_a
    shared = scale2 is None and o.dtype == y1.dtype
    grad_y1, grad_o, *grads[19:23] = residual.backward(grad_y2, grad_n, y1, o, scale2, cpe2_w, cpe2_b, ln2_w, ln2_b,
                                                       eps[2], not shared)
    grad_o = (grad_y1 if shared else grad_o).view(rows, dim)
    of_weight(OUT_PROJ, grad_o, g)
    grad_g = torch.mm(grad_o, out_w).view(y.shape)
    grad_xz = torch.empty_like(xz)
    (v, z), (grad_v, grad_z) = xz.chunk(2, -1), grad_xz.chunk(2, -1)
    grad_y, _, *grads[16:18] = gate.backward(grad_g, y, z, norm_w, norm_b, eps[1], grad_z)
    del grad_g
    dt, B, C = p.split((rank, d_state, d_state), -1)
    grad_p = torch.empty_like(p)
    grad_dt, grad_B, grad_C = grad_p.split((rank, d_state, d_state), -1)
    grad_h, _, grad_u, *grads[11:16] = fusion.backward(grad_y, h, C, u, Ds, k1, k3, k5, alpha, grad_C)
    del grad_y
    more, _, grads[10], _, _, *grads[8:10], _ = scan.backward(
        grad_h, u.view(batch, length, inner), dt, A_logs, B, None, dt_w, dt_b, None, None, states, chunk=CHUNK,
        log=True, grad_dt=grad_dt, grad_B=grad_B)
    del grad_h
    grad_p = grad_p.view(rows, -1)
    of_weight(X_PROJ, grad_p, u.view(rows, inner))
    grad_u = torch.addmm(grad_u.view(rows, inner).add_(more.view(rows, inner)), grad_p, x_w).view(u.shape)
    _, *grads[5:7] = conv.backward(grad_u, v, conv_w, conv_b, False, True, grad_v)
    del grad_u, more
    grad_xz = grad_xz.view(rows, 2 * inner)
    of_weight(IN_PROJ, grad_xz, n1)
    grad_n = torch.mm(grad_xz, in_w).view(x.shape)
    del grad_xz, grad_v, grad_z
    shared = branch is None or scale is None and branch.dtype == x.dtype
    grad_x, grad_branch, *grads[0:4] = residual.backward(grad_y1, grad_n, x, branch, scale, cpe1_w, cpe1_b, ln1_w,
                                                         ln1_b, eps[0], not shared)
    if shared:
        grad_branch = None if branch is None else grad_x
    return grad_x, grad_branch, None, None, None, None, *(
        grad if grad is None or grad.dtype == p.dtype else grad.to(p.dtype)
        for grad, p in zip(grads, parameters, strict=True))


def _precision(x):
    """That of matrix products."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _epsilons(block):
    own = block._modules
    return own['ln_1'].eps, own['self_attention']._modules['out_norm'].eps, own['ln_2'].eps


def run(block, x, branch, scale, scale2, parameters):
    """The result of ``block`` and the branch that is yet to be added to it; ``scale2`` is the stochastic depth of the
    mixer's branch."""
    eps, dtype = _epsilons(block), _precision(x)
    if torch.is_grad_enabled() and (x.requires_grad or branch is not None and branch.requires_grad
                                    or any(p.requires_grad for p in parameters)):
        return _Block.apply(x, branch, scale, scale2, eps, dtype, *parameters)
    inputs = x, branch, scale, scale2, *parameters
    recorded = _recorded_forward(_case(x, branch, scale, scale2, eps, dtype, parameters), inputs, eps, dtype, False)
    if recorded:
        return tuple(recorded(inputs)[0])
    return _forward(x, branch, scale, scale2, eps, parameters, dtype, None)


_compiled = weakref.WeakKeyDictionary()


def compile_kernels(stages, x):
    """Compile the kernels of all ``stages`` side by side, before the first pass; one after the other, as they are
    needed, would take minutes. ``x`` is the input of the first stage."""
    if INTERPRETED:
        return
    done = _compiled.setdefault(stages, set())
    case = x.device, x.dtype, _precision(x), torch.is_grad_enabled(), stages.training
    if case not in done and len(stages[0].blocks) and parameters_of(stages[0].blocks[0], x, None, None):
        done.add(case)
        with torch.cuda.device(x.device):
            launches = launches_of(stages, x, torch.is_grad_enabled())
        print_log('SpatialMamba: the GPU kernels are compiled, or read from where Triton keeps them, before the first '
                  'pass', logger='current')
        compile_launches(launches, x.device)


@torch.no_grad()
def launches_of(stages, x, backward):
    """The kernel launches of a pass over ``x``, and of its ``backward`` pass; equal blocks of a stage are left out."""
    from .spatial_mamba import Downsample
    dtype, (batch, height, width, _) = _precision(x), x.shape

    def meta(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device='meta')

    with collect_launches() as launches:
        for stage in stages:
            seen, dropped = set(), False
            for i, block in enumerate(stage.blocks):
                parameters = _parameters(block)
                if parameters is None:
                    continue
                drops = block.drop_path.training and block.drop_path.drop_prob > 0
                case, dropped = (i > 0, dropped, drops), drops
                if case in seen:
                    continue
                seen.add(case)
                parameters = [torch.empty_like(p, device='meta') for p in parameters]
                shape, factor = (batch, height, width, parameters[0].shape[0]), meta(batch, dtype=torch.float32)
                args = (meta(*shape, dtype=x.dtype), meta(*shape) if case[0] else None, factor if case[1] else None,
                        factor if drops else None)
                kept = []
                y, out = _forward(*args, _epsilons(block), parameters, dtype, kept)
                if backward:
                    _backward.__wrapped__(y, out, _epsilons(block), [True] * len(parameters), *args, *kept, *parameters)
            convs = stage.downsample.own_convs() if isinstance(stage.downsample, Downsample) else None
            if convs:
                x = meta(batch, height, width, convs[1].out_channels)
                parameters = [torch.empty_like(p, device='meta') for p in (convs[1].weight, convs[1].bias)]
                downsample = _rooms()[-1]
                y = downsample.forward(x, *parameters)
                if backward:
                    downsample.backward(y, y, x, *parameters)
            height, width = -(-height // 2), -(-width // 2)
    return launches
