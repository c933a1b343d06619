"""A block of QuadMamba as one autograd function, for GPUs: what ``Block.forward`` in quad_mamba.py computes, by the
same kernels. See block_function.py."""
import functools
import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from mmvssm.kernels.selective_scan.dispatch import MOST_RANKS
from mmvssm.kernels.selective_scan.ops import CHUNK

from ..layers.depthwise import DepthwiseConv
from ..layers.mlp import MLP
from . import block_function
from .block_function import BlockFunction, are_plain, cast, fits, product, untouched


@functools.cache
def _rooms():
    """The kernels, which need Triton."""
    from mmvssm.kernels.depthwise_conv import triton as conv
    from mmvssm.kernels.gelu_backward import triton as gelu
    from mmvssm.kernels.quadtree import selection
    from mmvssm.kernels.residual_norm import triton as norm
    from mmvssm.kernels.selective_scan import triton as scan
    return norm, conv, scan, gelu, selection


#: Names of modules and of parameters by where they are found; the order of the parameters is that of :func:`_forward`.
_OF_BLOCK = operator.itemgetter('norm', 'op', 'norm2', 'mlp')
_OF_MIXER = operator.itemgetter('in_proj', 'conv2d', 'out_norm', 'out_proj')
_OF_MLP = operator.itemgetter('fc1', 'act', 'fc2')
_OF_PREDICTOR = operator.itemgetter('in_conv', 'out_conv')
_SCAN = operator.itemgetter('x_proj_weight', 'dt_projs_weight', 'dt_projs_bias', 'A_logs', 'Ds')
_BOTH = operator.itemgetter('weight', 'bias')
#: Places of the parameters that matrix products take, in the precision of autocast; the last eight are a quadtree's.
_CAST = IN_PROJ, X_PROJ, OUT_PROJ, FC1, FC1_BIAS, FC2, FC2_BIAS = 2, 4, 11, 14, 15, 16, 17
#: Those of the score predictor: its norm, and weight and bias of its linear layers.
_PREDICTOR = 18
_LINEARS = tuple(range(_PREDICTOR + 2, _PREDICTOR + 10))


class _Constants(NamedTuple):
    """What a block is, beside its parameters. ``shift`` is the map's roll, None without a quadtree; ``rolled``: the
    roll of the windows whose scores are compared."""
    eps: tuple
    shift: tuple | None = None
    rolled: tuple | None = None
    token_order: str | None = None


@functools.cache
def _kinds():
    """Types of a block, and of what is in it; by type of its mixer."""
    from .quad_mamba import Block, MultiDirectionSSM, Norm, QuadtreeSSM, ScorePredictor
    common = (nn.Linear, DepthwiseConv, Norm, nn.Linear, nn.Linear, nn.GELU, nn.Linear)
    predictor = (ScorePredictor, nn.Sequential, nn.Sequential, Norm, nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear,
                 nn.GELU, nn.Linear)
    kinds = {mixer: (Norm, mixer, Norm, MLP, *common) for mixer in (MultiDirectionSSM, QuadtreeSSM)}
    kinds[QuadtreeSSM] += predictor
    return Block, QuadtreeSSM, kinds


@functools.lru_cache
def _shapes_of(dim, K, inner, rank, d_state, hidden, quadtree):
    """Of the parameters, in order."""
    norm, wide = ((dim,), (dim,)), ((inner,), (inner,))
    shapes = (*norm, (inner, dim), (inner, 1, 3, 3), (K, rank + 2 * d_state, inner), (K, inner, rank), (K, inner),
              (K * inner, d_state), (K * inner,), *wide, (dim, inner), *norm, (hidden, dim), (hidden,), (dim, hidden),
              (dim,))
    if quadtree:
        shapes += wide
        for before, after in ((inner, inner), (inner, inner // 2), (inner // 2, inner // 4), (inner // 4, 2)):
            shapes += (after, before), (after,)
    return shapes


def _parameters(block):
    """The block's parameters in the order in which :func:`_forward` takes them. None if there is something else in it
    than its own modules and parameters, or a hook, that would go unnoticed."""
    own_type, quadtree, kinds = _kinds()
    if type(block) is not own_type:
        return None
    try:
        norm, mixer, norm2, mlp = own = _OF_BLOCK(block._modules)
        modules = own + _OF_MIXER(mixer._modules) + _OF_MLP(mlp._modules)
        predicts = type(mixer) is quadtree
        if predicts:
            predictor = mixer._modules['score_predictor']
            parts = _OF_PREDICTOR(predictor._modules)
            layers = (*parts[0]._modules.values(), *parts[1]._modules.values())
            modules += (predictor, *parts, *layers)
        if tuple(map(type, modules)) != kinds.get(type(mixer)):
            return None
        in_proj, conv, out_norm, out_proj, fc1, act, fc2 = modules[4:11]
        activations = [act, *[layer for layer in modules[14:] if type(layer) is nn.GELU]]
        if any(a.approximate != 'none' for a in activations) or not untouched(modules) \
                or not all(m.bias is None for m in (in_proj, conv, out_proj)):
            return None
        parameters = (*_BOTH(norm._parameters), in_proj._parameters['weight'], conv._parameters['weight'],
                      *_SCAN(mixer._parameters), *_BOTH(out_norm._parameters), out_proj._parameters['weight'],
                      *_BOTH(norm2._parameters), *_BOTH(fc1._parameters), *_BOTH(fc2._parameters))
        if predicts:
            for layer in layers:
                if type(layer) is not nn.GELU:
                    parameters += _BOTH(layer._parameters)
        if not are_plain(parameters):
            return None
        (dim,), (K, inner, rank), (_, d_state), (hidden, _) = (parameters[i].shape for i in (0, 5, 7, FC1))
    except (AttributeError, KeyError, ValueError):
        return None
    if rank > MOST_RANKS or tuple([p.shape for p in parameters]) != _shapes_of(dim, K, inner, rank, d_state, hidden,
                                                                              predicts):
        return None
    return parameters


def parameters_of(block, x, branch, scale):
    """The parameters for :func:`run`. None if the modules must be called one by one: there are other modules or hooks
    than the block's own, a map that a quadtree has to pad, or whose tokens its kernels cannot number, or see
    :func:`fits`."""
    parameters = _parameters(block)
    if parameters is None:
        return None
    if len(parameters) > _PREDICTOR and (x.dim() != 4 or x.shape[1] % 4 or x.shape[2] % 4
                                         or x.shape[1] * x.shape[2] * max(x.shape[1:3]) >= 2**32):
        return None
    takes = _CAST + _LINEARS if len(parameters) > _PREDICTOR else _CAST
    return parameters if fits(x, branch, scale, parameters, parameters[0].shape[0], takes) else None


def _forward(inputs, constants, dtype, kept):
    x, branch, scale, scale2, noise, *parameters = inputs
    norm, conv, scan, _, selection = _rooms()
    (norm_w, norm_b, _, conv_w, _, dt_w, dt_b, A_logs, Ds, out_norm_w, out_norm_b, _, norm2_w, norm2_b,
     *_) = parameters[:_PREDICTOR]
    takes = _CAST + _LINEARS if constants.shift else _CAST
    in_w, x_w, out_w, fc1_w, fc1_b, fc2_w, fc2_b, *linears = cast([parameters[i] for i in takes], dtype)
    eps = constants.eps
    batch, height, width, dim = x.shape
    (K, inner, rank), d_state, length = dt_w.shape, A_logs.shape[1], height * width
    rows = batch * length

    def keep(*tensors):
        if kept is not None:
            kept.extend(tensors)

    y1, n = norm.forward(x, branch, scale, norm_w, norm_b, eps[0], dtype)
    y1 = x if branch is None else y1
    v = F.linear(n.view(rows, dim), in_w).view(batch, height, width, inner)
    keep(y1, n, v)
    u = conv.forward(v, conv_w, None, False, True)
    del n, v
    s = u.view(batch, length, inner)
    keep(s)
    order = height, width
    if constants.shift:
        _, a = norm.forward(s, None, None, *parameters[_PREDICTOR:_PREDICTOR + 2], eps[3], dtype)
        a = a.view(rows, inner)
        keep(a)
        for i in range(0, 8, 2):
            a = F.linear(F.gelu(a) if i else a, *linears[i:i + 2])
            keep(a)
        selected, soft = selection.select(a.view(batch, length, 2), noise, height, width, constants.rolled,
                                          kept is not None)
        order = scan.Quadtree(selected, height, width, constants.shift, constants.token_order)
        keep(selected, soft)
    p = F.linear(s.view(rows, inner), x_w.reshape(-1, inner)).view(batch, length, K, -1)
    dt, B, C = p.split((rank, d_state, d_state), -1)
    y, states = scan.forward(s, dt, A_logs.view(K, inner, d_state), B, C, dt_w, dt_b, Ds.view(K, inner),
                             order, chunk=CHUNK, log=True)
    del u, s, dt, B, C
    keep(p, states, y)
    del p, states
    _, n = norm.forward(y, None, None, out_norm_w, out_norm_b, eps[1], dtype)
    del y
    o = F.linear(n.view(rows, inner), out_w).view(x.shape)
    keep(n, o)
    y, n = norm.forward(y1, o, scale2, norm2_w, norm2_b, eps[2], dtype)
    del y1, o
    n = n.view(rows, dim)
    a = F.linear(n, fc1_w, fc1_b)
    keep(n, a, in_w, x_w, out_w, fc1_w, fc2_w, *linears[::2])
    return y, F.linear(F.gelu(a), fc2_w, fc2_b).view(x.shape)


def _backward(grad_y2, grad_out, constants, needed, inputs, kept):
    x, branch, scale, scale2, _, *parameters = inputs
    norm, conv, scan, gelu, selection = _rooms()
    (norm_w, norm_b, _, conv_w, _, dt_w, dt_b, A_logs, Ds, out_norm_w, out_norm_b, _, norm2_w, norm2_b,
     *_) = parameters[:_PREDICTOR]
    y1, n1, v, u, *kept = kept
    if constants.shift:
        *layers, selected, soft = kept[:7]
        kept = kept[7:]
    p, states, y, *kept = kept
    n2, o, n3, a, in_w, x_w, out_w, fc1_w, fc2_w, *linears = kept
    eps = constants.eps
    batch, height, width, dim = x.shape
    (K, inner, rank), d_state, length = dt_w.shape, A_logs.shape[1], height * width
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
    of_weight(FC1, grad_a, n3)
    grad_n = torch.mm(grad_a, fc1_w).view(x.shape)
    del grad_a
    shared = scale2 is None and o.dtype == y1.dtype
    grad_y1, grad_o, *grads[12:14] = norm.backward(grad_y2, grad_n, y1, o, scale2, norm2_w, norm2_b, eps[2], not shared)
    grad_o = (grad_y1 if shared else grad_o).view(rows, dim)
    of_weight(OUT_PROJ, grad_o, n2.view(rows, inner))
    grad_n = torch.mm(grad_o, out_w).view(y.shape)
    grad_y, _, *grads[9:11] = norm.backward(None, grad_n, y, None, None, out_norm_w, out_norm_b, eps[1], False)
    del grad_n, grad_o
    order = height, width
    if constants.shift:
        order = scan.Quadtree(selected, height, width, constants.shift, constants.token_order)
    dt, B, C = p.split((rank, d_state, d_state), -1)
    grad_p = torch.empty_like(p)
    grad_dt, grad_B, grad_C = grad_p.split((rank, d_state, d_state), -1)
    grad_s, _, grads[7], _, _, *grads[5:7], grads[8], rest = (*scan.backward(
        grad_y, u, dt, A_logs.view(K, inner, d_state), B, C, dt_w, dt_b, Ds.view(K, inner), order, states,
        chunk=CHUNK, log=True, grad_dt=grad_dt, grad_B=grad_B, grad_C=grad_C), None)[:9]
    grads[7], grads[8] = grads[7].view(A_logs.shape), grads[8].view(Ds.shape)
    if constants.shift:
        gains = scan.gains_of(grad_y, y, u, grad_s, p, grad_p, rest, order)
    del grad_y
    grad_p = grad_p.view(rows, -1)
    of_weight(X_PROJ, grad_p, u.view(rows, inner))
    if grads[X_PROJ] is not None:
        grads[X_PROJ] = grads[X_PROJ].view(parameters[X_PROJ].shape)
    grad_s = torch.addmm(grad_s.view(rows, inner), grad_p, x_w.reshape(-1, inner)).view(u.shape)
    if constants.shift:
        grad_z = selection.select_backward(layers[4].view(batch, length, 2), soft, gains, height, width,
                                           constants.rolled)
        grad_a = grad_z.view(rows, 2)
        if needed[_LINEARS[7]]:
            grads[_LINEARS[7]] = gelu.column_sums(grad_a)
        for i in (3, 2, 1):
            before, m, grads[_LINEARS[2 * i - 1]] = gelu.gelu_backward(torch.mm(grad_a, linears[i]), layers[i])
            of_weight(_LINEARS[2 * i], grad_a, m)
            grad_a = before
        of_weight(_LINEARS[0], grad_a, layers[0])
        of_scores, _, *grads[_PREDICTOR:_PREDICTOR + 2] = norm.backward(
            None, torch.mm(grad_a, linears[0]).view(u.shape), u, None, None, *parameters[_PREDICTOR:_PREDICTOR + 2],
            eps[3], False)
        del grad_z, grad_a, before, m
        grad_s.add_(of_scores)
    grad_v, grads[3], _ = conv.backward(grad_s.view(v.shape), v, conv_w, None, False, True)
    del grad_s
    grad_v = grad_v.view(rows, inner)
    of_weight(IN_PROJ, grad_v, n1.view(rows, dim))
    grad_n = torch.mm(grad_v, in_w).view(x.shape)
    del grad_v
    if branch is None:
        grad_x, grad_branch, *grads[0:2] = norm.backward(None, grad_n, x, None, None, norm_w, norm_b, eps[0], False)
        return grad_x.add_(grad_y1), None, grads
    shared = scale is None and branch.dtype == x.dtype
    grad_x, grad_branch, *grads[0:2] = norm.backward(grad_y1, grad_n, x, branch, scale, norm_w, norm_b, eps[0],
                                                     not shared)
    return grad_x, grad_x if shared else grad_branch, grads


#: Blocks by x, branch, scale, scale2, the noise of the selection, and parameters.
function = BlockFunction('QuadMamba', 5, (5, 7, FC1), _forward, _backward)


def _constants(block, height):
    """Those of ``block`` for maps of so many rows."""
    own = block._modules
    mixer = own['op']
    eps = own['norm'].eps, mixer._modules['out_norm'].eps, own['norm2'].eps
    if 'score_predictor' not in mixer._modules:
        return _Constants(eps)
    shift = mixer.shift(height)
    return _Constants((*eps, mixer.score_predictor.in_conv[0].eps), shift, mixer.scored_shift(shift), mixer.token_order)


def run(block, x, branch, scale, scale2, parameters):
    """The result of ``block`` and the branch that is yet to be added to it; ``scale2`` is the stochastic depth of the
    mixer's branch."""
    batch, height, _, _ = x.shape
    noise = None
    if len(parameters) > _PREDICTOR and block.op.training:
        noise = torch.empty((batch, 4), dtype=torch.float32, device=x.device).exponential_()
    return function((x, branch, scale, scale2, noise, *parameters), _constants(block, height))


def compile_kernels(stages, x):
    """See :func:`block_function.compile_kernels`."""
    block_function.compile_kernels(
        function.name, stages, x,
        lambda x: len(stages[0].blocks) and parameters_of(stages[0].blocks[0], x, None, None), launches_of)


def launches_of(stages, x, backward):
    """The kernel launches of the blocks in a pass over ``x``, and of its ``backward`` pass; equal blocks of a stage are
    left out."""

    def case_of(block, batch, height, width):
        parameters = _parameters(block)
        if parameters is None:
            return None
        quadtree = len(parameters) > _PREDICTOR
        if quadtree and (height % 4 or width % 4):
            return None
        noise = torch.empty((batch, 4), dtype=torch.float32, device='meta') if quadtree and block.op.training else None
        return _constants(block, height), (noise,), parameters

    return block_function.block_launches(function, stages, x, backward, case_of)
