"""Cases of the scan with Mamba's interface that every backend must get right: shapes, inputs, tolerances."""
from dataclasses import dataclass

import torch

from .._core.cases import generator, lay_out
from .interface import selective_scan_fn
from .reference import selective_scan_fn_reference


@dataclass(frozen=True)
class Case:
    """Shapes and options of one call; see :func:`mmvssm.kernels.selective_scan_fn` for the letters.

    Args:
        B, C: ``'constant'``, ``'varying'``, or the number of groups.
        options: which of ``D``, ``z``, ``bias`` (of the steps) and ``softplus`` there are.
        steps: ``'usual'``, or ``'large'``: before the softplus they reach far beyond +-20.
        layout: of every tensor with more than one dimension; see :func:`lay_out`. These tensors have their channels
            first, ``'channels_first'`` puts them last.
        half_params: parameters in the precision of ``u``. They stay in float32 otherwise, as under autocast.
    """
    name: str
    batch: int = 2
    dim: int = 6
    length: int = 40
    d_state: int = 3
    B: str | int = 'varying'
    C: str | int = 'varying'
    options: str = 'D z bias softplus'
    steps: str = 'usual'
    layout: str = 'contiguous'
    half_params: bool = False


CASES = {case.name: case for case in (
    Case('tiny', length=5, dim=2, d_state=2),
    Case('tiny-constant', batch=1, length=4, dim=2, d_state=2, B='constant', C='constant', options=''),
    Case('length_1', length=1),
    Case('length_64', length=64, d_state=16, B=2, C=2),
    # Chunks have 256 steps.
    Case('length_256', length=256),
    Case('length_257', length=257, d_state=1, options='D bias softplus'),
    Case('length_1000', length=1000, dim=4, d_state=2, batch=1, options='z softplus'),
    Case('d_state_64', d_state=64, length=7, batch=1, options='bias softplus'),
    Case('d_state_256', d_state=256, length=7, dim=2, batch=1, options='D softplus'),
    Case('dim_1', dim=1),
    Case('dim_37', dim=37, length=9, d_state=9),
    Case('constant_B', B='constant', C=3, length=300, batch=1),
    Case('constant_C', C='constant', B=6, length=300, batch=1),
    Case('groups_differ', B=3, C=2),
    Case('no_softplus', options='D z'),
    Case('no_batch', batch=0, C='constant'),
    Case('large_steps', steps='large'),
    Case('half', layout='half', length=264, batch=1),
    Case('channels_last', layout='channels_first', B=2, C=2),
    Case('channels_last-16', layout='channels_first', dim=16, length=25, B=2, d_state=2, batch=1),
    Case('expanded', layout='expanded'),
    Case('half_params', half_params=True, C='constant'),
)}

#: Relative error that a backend may have against the float64 reference, by the dtype of the tensor compared:
#: internals are float32, so an output or gradient in half precision may cost one rounding and no more.
TOLERANCES = {
    dtype: {**dict.fromkeys(('output', 'u', 'delta', 'B', 'C', 'z'), elements),
            **dict.fromkeys(('A', 'D', 'delta_bias'), sums)}
    for dtype, elements, sums in ((torch.float64, 1e-14, 5e-14), (torch.float32, 2e-6, 5e-6),
                                  (torch.bfloat16, 4e-3, 4e-3), (torch.float16, 5e-4, 5e-4))}
#: What a backend may have instead, by its name and the float32 tensor compared. The terms of the gradient of ``A``
#: cancel, and a GPU's exponential is good to 2e-7.
BACKEND_TOLERANCES = {('cuda', 'A'): 1e-5}


def inputs(case, dtype, device='cpu', seed=0):
    """Fresh arguments of ``case`` by name, in the schema's order; None where it has no such argument."""
    g = generator(case.name, seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    def projection(kind):
        if kind == 'constant':
            return normal(case.dim, case.d_state)
        groups = () if kind == 'varying' else (kind,)
        return normal(case.batch, *groups, case.d_state, case.length)

    bias = torch.exp(-6.9 + 4.6 * torch.rand(case.dim, generator=g, dtype=torch.float64))     # steps of 1e-3 to 1e-1
    softplus = 'softplus' in case.options
    delta = normal(case.batch, case.dim, case.length)
    if case.steps == 'large':
        delta = 30 * delta
    elif not softplus:
        delta = 0.1 * delta.abs()
    values = dict(
        u=normal(case.batch, case.dim, case.length), delta=delta,
        A=-torch.exp(0.5 * normal(case.dim, case.d_state)) * torch.arange(1, case.d_state + 1),
        B=projection(case.B), C=projection(case.C),
        D=1 + normal(case.dim) if 'D' in case.options else None,
        z=normal(case.batch, case.dim, case.length) if 'z' in case.options else None,
        delta_bias=bias + torch.log(-torch.expm1(-bias)) if 'bias' in case.options else None)
    tensors = {}
    for name, t in values.items():
        if t is not None:
            walked = t.dim() > 2
            wide = dtype if walked or case.half_params else torch.promote_types(dtype, torch.float32)
            t = t.to(device, wide)
            if t.dim() > 1 and (walked or case.layout != 'expanded'):
                t = lay_out(t, case.layout)
        tensors[name] = t
    return tensors


def operator(case, tensors):
    """The public function."""
    return selective_scan_fn(**tensors, delta_softplus='softplus' in case.options)


def reference(case, tensors):
    """What it should return."""
    return selective_scan_fn_reference(**tensors, delta_softplus='softplus' in case.options)
