"""Cases of the residual convolution with norm that every backend must get right: shapes, inputs, tolerances."""
from dataclasses import dataclass

import torch

from .._core.cases import generator, lay_out
from .interface import residual_conv_norm
from .reference import residual_conv_norm_reference


@dataclass(frozen=True)
class Case:
    """Shapes and options of one call; see :func:`mmvssm.kernels.residual_conv_norm`.

    Args:
        scale: scale the branch by 0, 0.75, 1.5, 0, ... from image to image.
        layout: of every tensor with more than one dimension; see :func:`lay_out`.
        half_params: parameters in the precision of ``x``. They stay in float32 otherwise, as under autocast.
    """
    name: str
    batch: int = 2
    height: int = 7
    width: int = 7
    dim: int = 16
    branch: bool = True
    scale: bool = False
    bias: bool = True
    layout: str = 'contiguous'
    half_params: bool = False


CASES = {case.name: case for case in (
    Case('tiny', height=2, width=3, dim=4),
    Case('tiny-scale', height=3, width=2, dim=3, scale=True, bias=False),
    Case('tiny-no_branch', height=3, width=2, dim=3, branch=False),
    Case('1x1', height=1, width=1),
    Case('1x7', height=1, width=7, dim=5, scale=True),
    Case('7x1', height=7, width=1, branch=False),
    Case('2x3', height=2, width=3, dim=40),
    Case('7x7', scale=True),
    Case('13x9', height=13, width=9, dim=20, branch=False),
    Case('18x4', batch=1, height=18, width=4, dim=6, scale=True),
    Case('dim_64', batch=3, height=6, width=5, dim=64, scale=True),
    Case('dim_130', batch=1, height=4, width=5, dim=130),
    Case('no_bias', bias=False),
    Case('no_batch', batch=0, scale=True),
    Case('half', layout='half', dim=20),
    Case('channels_first', layout='channels_first', height=4, scale=True),
    Case('expanded', layout='expanded', dim=5, scale=True),
    Case('half_params', half_params=True, scale=True),
)}

#: Relative error that a backend may have against the float64 reference, by the dtype of the tensor compared:
#: internals are float32, so an output or gradient in half precision may cost one rounding and no more.
TOLERANCES = {
    dtype: {**dict.fromkeys(('output', 'x', 'branch'), elements),
            **dict.fromkeys(('conv_weight', 'conv_bias', 'norm_weight', 'norm_bias'), sums)}
    for dtype, elements, sums in ((torch.float64, 1e-14, 5e-14), (torch.float32, 2e-6, 5e-6),
                                  (torch.bfloat16, 4e-3, 4e-3), (torch.float16, 5e-4, 5e-4))}


def inputs(case, dtype, device='cpu', seed=0):
    """Fresh arguments of ``case`` by name, in the schema's order; None where it has no such argument. ``scale``,
    which has no gradient, belongs to the case: see :func:`scale`."""
    g = generator(case.name, seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    maps = {name: normal(case.batch, case.height, case.width, case.dim) for name in ('x', 'branch')}
    wide = dtype if case.half_params else torch.promote_types(dtype, torch.float32)
    conv_weight = normal(case.dim, 1, 3, 3).to(device, wide)
    vectors = {name: (one + normal(case.dim)).to(device, wide)
               for name, one in dict(conv_bias=0, norm_weight=1, norm_bias=0).items()}
    if case.layout != 'expanded':
        conv_weight = lay_out(conv_weight, case.layout)
    tensors = {name: lay_out(t.to(device, dtype), case.layout) for name, t in maps.items()}
    tensors.update(conv_weight=conv_weight, **vectors)
    return {name: None if (name == 'branch' and not case.branch) or (name == 'conv_bias' and not case.bias) else t
            for name, t in tensors.items()}


def scale(case, x):
    """By image, exact in every precision; or None."""
    if not case.scale:
        return None
    return 0.75 * (torch.arange(case.batch, device=x.device) % 3).to(torch.promote_types(x.dtype, torch.float32))


def _both(results):
    """Both results in one tensor. Autocast has no rule for a stack of float16 on a CPU."""
    with torch.autocast('cpu', enabled=False):
        return torch.stack(results)


def operator(case, tensors):
    """The public function."""
    return _both(residual_conv_norm(**tensors, scale=scale(case, tensors['x'])))


def reference(case, tensors):
    """What it should return."""
    return _both(residual_conv_norm_reference(**tensors, scale=scale(case, tensors['x'])))
