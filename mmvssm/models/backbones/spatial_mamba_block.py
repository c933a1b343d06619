"""A block of Spatial-Mamba as one autograd function, for GPUs: what ``Block.forward`` in spatial_mamba.py computes, by
the same kernels. See block_function.py."""
import functools
import operator

import torch
import torch.nn.functional as F
from torch import nn

from mmvssm.kernels._core.triton_support import collect_launches
from mmvssm.kernels.selective_scan.dispatch import MOST_RANKS
from mmvssm.kernels.selective_scan.ops import CHUNK

from ..layers.depthwise import DepthwiseConv
from ..layers.mlp import MLP
from . import block_function
from .block_function import BlockFunction, are_plain, cast, fits, precision, product, untouched


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


#: Names of modules and of parameters by where they are found; the order of the parameters is that of :func:`_forward`.
_OF_BLOCK = operator.itemgetter('cpe1', 'ln_1', 'self_attention', 'cpe2', 'ln_2', 'mlp')
_OF_MIXER = operator.itemgetter('in_proj', 'conv2d', 'state_fusion', 'out_norm', 'out_proj')
_OF_MLP = operator.itemgetter('fc1', 'act', 'fc2')
_SCAN = operator.itemgetter('x_proj_weight', 'dt_projs_weight', 'dt_projs_bias', 'A_logs', 'Ds')
_FUSION = operator.itemgetter('kernel_3', 'kernel_3_1', 'kernel_3_2', 'alpha')
_BOTH = operator.itemgetter('weight', 'bias')
#: Places of the parameters that matrix products take, in the precision of autocast.
_CAST = IN_PROJ, X_PROJ, OUT_PROJ, FC1, FC1_BIAS, FC2, FC2_BIAS = 4, 7, 18, 23, 24, 25, 26


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


def _parameters(block):
    """The block's parameters in the order in which :func:`_forward` takes them. None if there is something else in it
    than its own modules and parameters, or a hook, that would go unnoticed."""
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
        if not are_plain(parameters):
            return None
        (dim,), (inner, rank), (_, d_state), (hidden, _) = (parameters[i].shape for i in (1, 8, 10, FC1))
    except (AttributeError, KeyError, ValueError):
        return None
    if rank > MOST_RANKS or tuple([p.shape for p in parameters]) != _shapes_of(dim, inner, rank, d_state, hidden):
        return None
    return parameters


def parameters_of(block, x, branch, scale):
    """The parameters for :func:`run`. None if the modules must be called one by one: there are other modules or hooks
    than the block's own, or see :func:`fits`."""
    parameters = _parameters(block)
    if parameters is None or not fits(x, branch, scale, parameters, parameters[1].shape[0], _CAST):
        return None
    return parameters


def _forward(inputs, eps, dtype, kept):
    x, branch, scale, scale2, *parameters = inputs
    residual, conv, scan, fusion, gate, *_ = _rooms()
    (cpe1_w, cpe1_b, ln1_w, ln1_b, _, conv_w, conv_b, _, dt_w, dt_b, A_logs, Ds, k1, k3, k5, alpha, norm_w, norm_b, _,
     cpe2_w, cpe2_b, ln2_w, ln2_b, *_) = parameters
    in_w, x_w, out_w, fc1_w, fc1_b, fc2_w, fc2_b = cast([parameters[i] for i in _CAST], dtype)
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


def _backward(grad_y2, grad_out, eps, needed, inputs, kept):
    x, branch, scale, scale2, *parameters = inputs
    y1, n1, xz, u, p, h, states, y, g, o, n2, a, in_w, x_w, out_w, fc1_w, fc2_w = kept
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
            grads[i] = product(grad.t(), inputs, parameters[i].dtype)

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
    return grad_x, grad_branch, grads


#: Blocks by their tensors x, branch, scale, scale2 and parameters, and the norms' epsilons.
function = BlockFunction('SpatialMamba', 4, (8, 10, FC1), _forward, _backward)


def _epsilons(block):
    own = block._modules
    return own['ln_1'].eps, own['self_attention']._modules['out_norm'].eps, own['ln_2'].eps


def run(block, x, branch, scale, scale2, parameters):
    """The result of ``block`` and the branch that is yet to be added to it; ``scale2`` is the stochastic depth of the
    mixer's branch."""
    return function((x, branch, scale, scale2, *parameters), _epsilons(block))


def compile_kernels(stages, x):
    """See :func:`block_function.compile_kernels`."""
    block_function.compile_kernels(
        function.name, stages, x,
        lambda x: len(stages[0].blocks) and parameters_of(stages[0].blocks[0], x, None, None), launches_of)


def launches_of(stages, x, backward):
    """The kernel launches of a pass over ``x``, and of its ``backward`` pass; equal blocks of a stage are left out."""
    from .spatial_mamba import Downsample

    def case_of(block, batch, height, width):
        parameters = _parameters(block)
        return parameters and (_epsilons(block), (), parameters)

    launches = block_function.block_launches(function, stages, x, backward, case_of)
    batch, height, width, _ = x.shape
    downsample = _rooms()[-1]
    with torch.no_grad(), collect_launches() as more:
        for stage in stages:
            convs = stage.downsample.own_convs() if isinstance(stage.downsample, Downsample) else None
            if convs:
                wide = torch.empty((batch, height, width, convs[1].out_channels), dtype=precision(x), device='meta')
                parameters = [torch.empty_like(p, device='meta') for p in (convs[1].weight, convs[1].bias)]
                y = downsample.forward(wide, *parameters)
                if backward:
                    downsample.backward(y, y, wide, *parameters)
            height, width = -(-height // 2), -(-width // 2)
    return launches + more
