"""Cases of the state fusion that every backend must get right: shapes, inputs, tolerances."""
from dataclasses import dataclass

import torch

from .._core.cases import generator, lay_out
from .interface import state_fusion
from .reference import state_fusion_reference


@dataclass(frozen=True)
class Case:
    """Shapes and options of one call; see :func:`mmvssm.kernels.state_fusion` for the letters.

    Args:
        layout: of every tensor with more than one dimension; see :func:`lay_out`.
        half_params: parameters in the precision of ``h``. They stay in float32 otherwise, as under autocast.
    """
    name: str
    batch: int = 2
    height: int = 7
    width: int = 7
    d_state: int = 1
    dim: int = 16
    layout: str = 'contiguous'
    half_params: bool = False


CASES = {case.name: case for case in (
    Case('tiny', height=2, width=3, d_state=2, dim=2),
    # Dilations reach 5 pixels: on small maps every tap is outside.
    Case('1x1', height=1, width=1),
    Case('1x7', height=1, width=7, dim=5),
    Case('7x1', height=7, width=1, d_state=3),
    Case('2x3', height=2, width=3, dim=40),
    Case('7x7'),
    Case('13x9', height=13, width=9, d_state=3, dim=20),
    Case('dim_1', height=6, width=5, dim=1),
    Case('d_state_16', height=4, width=5, d_state=16, dim=5),
    Case('5x16', height=5, width=16, dim=20),
    Case('two_blocks', batch=1, height=6, width=2, dim=72),
    Case('two_strips', batch=1, height=30, width=6, dim=3),
    Case('one_image', batch=1, height=12, width=12, dim=5),
    Case('no_batch', batch=0, d_state=3),
    Case('half', layout='half', d_state=3, dim=20),
    Case('channels_first', layout='channels_first', d_state=3, height=4),
    Case('expanded', layout='expanded', d_state=3, dim=5),
    Case('half_params', half_params=True, d_state=2),
)}

#: Relative error that a backend may have against the float64 reference, by the dtype of the tensor compared:
#: internals are float32, so an output or gradient in half precision may cost one rounding and no more.
TOLERANCES = {
    dtype: {**dict.fromkeys(('output', 'h', 'C', 'x'), elements),
            **dict.fromkeys(('D', 'kernel1', 'kernel3', 'kernel5', 'alpha'), sums)}
    for dtype, elements, sums in ((torch.float64, 1e-14, 5e-14), (torch.float32, 2e-6, 5e-6),
                                  (torch.bfloat16, 4e-3, 4e-3), (torch.float16, 5e-4, 5e-4))}


def inputs(case, dtype, device='cpu', seed=0):
    """Fresh arguments of ``case`` by name, in the schema's order."""
    g = generator(case.name, seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    place = (case.batch, case.height, case.width)
    activations = dict(h=normal(*place, case.d_state, case.dim), C=normal(*place, case.d_state),
                       x=normal(*place, case.dim))
    kernels = {f'kernel{dilation}': 1 + normal(case.dim, 1, 3, 3) for dilation in (1, 3, 5)}
    parameters = dict(D=1 + normal(case.dim), **kernels, alpha=1 + normal(3))
    if case.layout != 'expanded':
        parameters.update({name: lay_out(parameters[name], case.layout) for name in kernels})
    wide = dtype if case.half_params else torch.promote_types(dtype, torch.float32)
    tensors = {name: lay_out(t.to(device, dtype), case.layout) for name, t in activations.items()}
    tensors.update({name: t.to(device, wide) for name, t in parameters.items()})
    return tensors


def operator(case, tensors):
    """The public function."""
    h, C, x, D, *kernels, alpha = tensors.values()
    return state_fusion(h, C, x, D, kernels, alpha)


def reference(case, tensors):
    """What it should return."""
    return state_fusion_reference(**tensors)
