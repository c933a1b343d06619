"""Cases of the convolution of a downsampling that every backend must get right: shapes, inputs, tolerances."""
from dataclasses import dataclass

import torch

from .._core.cases import generator, lay_out
from .interface import downsample_conv
from .reference import downsample_conv_reference


@dataclass(frozen=True)
class Case:
    """Shapes of one call; see :func:`mmvssm.kernels.downsample_conv`.

    Args:
        layout: of every tensor with more than one dimension; see :func:`lay_out`.
        half_params: parameters in the precision of ``x``. They stay in float32 otherwise, as under autocast.
    """
    name: str
    batch: int = 2
    height: int = 7
    width: int = 7
    dim: int = 16
    layout: str = 'contiguous'
    half_params: bool = False


CASES = {case.name: case for case in (
    Case('tiny', height=2, width=3, dim=2),
    Case('1x1', height=1, width=1),
    Case('1x8', height=1, width=8, dim=5),
    Case('7x1', height=7, width=1),
    Case('2x3', height=2, width=3, dim=40),
    Case('7x7'),
    Case('8x6', height=8, width=6),
    Case('13x9', height=13, width=9, dim=20),
    Case('one_image', batch=1, height=18, width=5, dim=5),
    Case('dim_1', height=6, width=5, dim=1),
    Case('no_batch', batch=0),
    Case('half', layout='half', dim=20),
    Case('channels_first', layout='channels_first', height=4),
    Case('expanded', layout='expanded', dim=5),
    Case('half_params', half_params=True),
)}

#: Relative error that a backend may have against the float64 reference, by the dtype of the tensor compared:
#: internals are float32, so an output or gradient in half precision may cost one rounding and no more.
TOLERANCES = {
    dtype: {**dict.fromkeys(('output', 'x'), elements), **dict.fromkeys(('weight', 'bias'), sums)}
    for dtype, elements, sums in ((torch.float64, 1e-14, 5e-14), (torch.float32, 2e-6, 5e-6),
                                  (torch.bfloat16, 4e-3, 4e-3), (torch.float16, 5e-4, 5e-4))}


def inputs(case, dtype, device='cpu', seed=0):
    """Fresh arguments of ``case`` by name, in the schema's order."""
    g = generator(case.name, seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    x = normal(case.batch, case.height, case.width, case.dim).to(device, dtype)
    wide = dtype if case.half_params else torch.promote_types(dtype, torch.float32)
    weight = normal(case.dim, 1, 3, 3).to(device, wide)
    bias = normal(case.dim).to(device, wide)
    if case.layout != 'expanded':
        weight = lay_out(weight, case.layout)
    return dict(x=lay_out(x, case.layout), weight=weight, bias=bias)


def operator(case, tensors):
    """The public function."""
    return downsample_conv(**tensors)


def reference(case, tensors):
    """What it should return."""
    return downsample_conv_reference(**tensors)
