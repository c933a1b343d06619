"""Cases of the selective scan that every backend must get right: shapes, inputs, tolerances."""
from dataclasses import dataclass

import torch

from .._core.cases import generator, lay_out
from .interface import selective_scan
from .reference import selective_scan_reference


@dataclass(frozen=True)
class Case:
    """Shapes and options of one call; see :func:`mmvssm.kernels.selective_scan` for the letters.

    Args:
        directions: K, or None for the form without that dimension.
        output: ``'states'``; ``'y'``, with C; ``'skip'``, with C and D.
        order: dimensions of the order, 1 (L,), 2 (K, L) or 3 (batch, K, L); None for raster order.
        sides: of a map, instead of an order; its tokens are ``length``.
        steps: ``'usual'``, or ``'large'``: before the softplus they reach far beyond +-20.
        layout: of every tensor with more than one dimension; see :func:`lay_out`.
        half_params: parameters in the precision of ``x``. They stay in float32 otherwise, as under autocast.
    """
    name: str
    batch: int = 2
    length: int = 65
    dim: int = 16
    rank: int = 4
    d_state: int = 1
    directions: int | None = None
    output: str = 'states'
    order: int | None = None
    order_dtype: torch.dtype = torch.int64
    sides: tuple | None = None
    steps: str = 'usual'
    layout: str = 'contiguous'
    half_params: bool = False


CASES = {case.name: case for case in (
    Case('tiny', length=5, dim=3, rank=2, d_state=2, directions=2, output='skip', order=2),
    Case('tiny-y', batch=1, length=4, dim=2, rank=1, d_state=2, directions=2, output='y'),
    Case('tiny-states', length=4, dim=2, rank=1, d_state=2, directions=1, order=3),
    # Chunks have 32 tokens, blocks of lanes 16 channels, or 32 in half precision where there are segments.
    Case('length_1', length=1),
    Case('length_1-skip', length=1, output='skip', directions=2, order=2),
    Case('length_63', length=63),
    Case('length_64', length=64, output='skip'),
    Case('length_65', length=65),
    Case('length_200', length=200, output='y', d_state=3),
    Case('dim_1', dim=1),
    Case('dim_5', dim=5, output='skip'),
    Case('dim_40', dim=40, output='y'),
    Case('rank_1', rank=1),
    Case('rank_6', rank=6, output='skip'),
    Case('rank_24', rank=24, dim=20, length=70, directions=4, order=2, output='skip'),
    Case('rank_33', rank=33, dim=20),
    Case('rank_48', rank=48, dim=20, layout='half'),
    Case('rank_70-order', rank=70, output='skip', directions=2, order=2, dim=5),
    Case('d_state_3', d_state=3, dim=5, directions=1),
    Case('d_state_16', d_state=16, output='skip', length=70),
    Case('no_batch', batch=0, output='skip', directions=2),
    Case('no_batch-states', batch=0),
    Case('order_L', order=1),
    Case('order_L-int32', order=1, order_dtype=torch.int32, output='y', directions=1, dim=5),
    Case('order_BKL-states', order=3, d_state=3, dim=20),
    Case('K2', directions=2, output='y'),
    Case('K2-order_KL', directions=2, order=2, output='skip', dim=20),
    Case('K2-order_KL-int32', directions=2, order=2, order_dtype=torch.int32, output='y', d_state=3),
    Case('K4-order_BKL', directions=4, order=3, output='skip', d_state=3, length=130, dim=5),
    Case('K4-order_BKL-int32', directions=4, order=3, order_dtype=torch.int32, output='y', rank=1),
    # One image and few channels: the sequence itself is split among threads, or programs if it is long.
    Case('segments', batch=1, length=530, dim=3),
    Case('segments-32', length=330, dim=32),
    Case('segments-96', batch=1, length=601, dim=96, rank=6, layout='half'),
    Case('segments-order', batch=1, length=530, dim=3, order=1, output='skip'),
    Case('segments-K2', batch=1, length=601, dim=20, d_state=2, directions=2, output='skip'),
    Case('one_row', batch=1, length=200, dim=5),
    Case('one_row-K2', batch=1, length=200, dim=20, directions=2, order=2, output='skip', d_state=3),
    Case('one_row-y', batch=1, length=130, dim=1, output='y', steps='large'),
    Case('large_steps', steps='large', dim=20),
    Case('large_steps-skip', steps='large', output='skip', d_state=3, directions=2),
    Case('tiny-sides', batch=1, length=6, dim=2, rank=1, directions=4, output='skip', sides=(2, 3)),
    Case('sides-K2', length=70, directions=2, output='skip', dim=20, sides=(7, 10)),
    Case('sides-K4', length=77, directions=4, output='skip', dim=20, sides=(7, 11)),
    Case('sides-column', length=40, directions=4, output='y', d_state=2, sides=(40, 1)),
    Case('sides-row', length=40, directions=4, output='skip', dim=5, sides=(1, 40)),
    Case('half', layout='half', output='skip', directions=2, order=3),
    Case('half-states', layout='half', dim=5, d_state=3),
    Case('channels_first', layout='channels_first', output='skip', d_state=3, order=2, directions=2),
    Case('channels_first-states', layout='channels_first', dim=20),
    Case('expanded', layout='expanded', output='skip', order=3, directions=2, dim=5),
    Case('half_params', half_params=True, output='skip', directions=2, d_state=2, length=40),
)}

#: Relative error that a backend may have against the float64 reference, by the dtype of the tensor compared:
#: internals are float32, so an output or gradient in half precision may cost one rounding and no more.
TOLERANCES = {
    dtype: {**dict.fromkeys(('output', 'x', 'dt', 'B', 'C'), elements),
            **dict.fromkeys(('A', 'dt_weight', 'dt_bias', 'D'), sums)}
    for dtype, elements, sums in ((torch.float64, 1e-14, 5e-14), (torch.float32, 2e-6, 5e-6),
                                  (torch.bfloat16, 4e-3, 4e-3), (torch.float16, 5e-4, 5e-4))}
#: What a backend may have instead, by its name and the float32 tensor compared. The terms of the gradient of ``A``
#: cancel, and a GPU's exponential is good to 2e-7. With one channel it is a single number, which in float32 on ``cpu``
#: came to 6e-6 with other random numbers.
BACKEND_TOLERANCES = {('triton', 'A'): 1e-5, ('cpu', 'A'): 1e-5}


def inputs(case, dtype, device='cpu', seed=0):
    """Fresh arguments of ``case`` by name, in the schema's order; None where it has no such argument."""
    g = generator(case.name, seed)
    K = case.directions or 1

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=g, dtype=torch.float64)

    tokens = (case.batch, case.length, K)
    bias = torch.exp(uniform(-6.9, -2.3, K, case.dim))                        # steps of 1e-3 to 1e-1
    activations = dict(
        x=normal(*tokens[:2], case.dim),
        dt=normal(*tokens, case.rank) * (30 if case.steps == 'large' else 1),
        B=normal(*tokens, case.d_state),
        C=normal(*tokens, case.d_state) if case.output != 'states' else None)
    parameters = dict(
        A=-torch.exp(0.5 * normal(K, case.dim, case.d_state)) * torch.arange(1, case.d_state + 1),
        dt_weight=uniform(-1, 1, K, case.dim, case.rank) * case.rank**-0.5,
        dt_bias=bias + torch.log(-torch.expm1(-bias)),                        # inverse softplus
        D=1 + normal(K, case.dim) if case.output == 'skip' else None)
    if case.directions is None:
        activations.update({name: t.squeeze(2) for name, t in activations.items() if name in 'dt B C'.split()
                            and t is not None})
        parameters = {name: None if t is None else t.squeeze(0) for name, t in parameters.items()}

    tensors = {}
    for name in 'x dt A B C dt_weight dt_bias D'.split():
        t = activations[name] if name in activations else parameters[name]
        if t is not None:
            keep = name in parameters and not case.half_params
            t = t.to(device, torch.promote_types(dtype, torch.float32) if keep else dtype)
            if t.dim() > 1 and not (case.layout == 'expanded' and name in parameters):
                t = lay_out(t, case.layout)
        tensors[name] = t
    tensors['order'] = None
    if case.order:
        shape = (case.batch, K, case.length)[3 - case.order:]
        order = torch.rand(shape, generator=g).argsort(-1).to(device, case.order_dtype)
        if case.layout == 'half':
            order = order.repeat_interleave(2, -1)[..., ::2]
        elif case.layout == 'channels_first':
            order = order.mT.contiguous().mT
        elif case.layout == 'expanded':
            order = order[:1].expand_as(order)
        tensors['order'] = order
    return tensors


def operator(case, tensors):
    """The public function."""
    return selective_scan(**_with_sides(case, tensors))


def reference(case, tensors):
    """What it should return."""
    return selective_scan_reference(**_with_sides(case, tensors))


def _with_sides(case, tensors):
    return dict(tensors, order=case.sides) if case.sides else tensors
