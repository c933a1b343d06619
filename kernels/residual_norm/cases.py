"""Cases of the residual LayerNorm that every backend must get right: shapes, inputs, tolerances."""
from dataclasses import dataclass

import torch

from .._core.cases import generator, lay_out
from .interface import residual_norm
from .reference import residual_norm_reference


@dataclass(frozen=True)
class Case:
    """Shapes and options of one call; see :func:`mmvssm.kernels.residual_norm`.

    Args:
        rows: of an image; ``x`` is (batch, rows, dim).
        scale: scale the branch by 0, 0.75, 1.5, 0, ... from image to image.
        offset: mean of ``x``; variances must not suffer from it.
        layout: of ``x`` and ``branch``; see :func:`lay_out`.
        half_params: parameters in the precision of ``x``. They stay in float32 otherwise, as under autocast.
    """
    name: str
    batch: int = 2
    rows: int = 20
    dim: int = 16
    branch: bool = True
    scale: bool = False
    offset: float = 0.0
    layout: str = 'contiguous'
    half_params: bool = False


CASES = {case.name: case for case in (
    Case('tiny', rows=3, dim=4),
    Case('tiny-scale', rows=2, dim=3, scale=True),
    Case('tiny-no_branch', rows=3, dim=4, branch=False),
    Case('one_row', batch=1, rows=1, dim=40),
    Case('dim_5', dim=5, scale=True),
    Case('dim_16', scale=True),
    Case('dim_40', dim=40, branch=False),
    Case('dim_128', batch=3, rows=7, dim=128, scale=True),
    Case('rows_130', rows=130, dim=20, scale=True),  # some blocks of rows in backward, one of them of two images
    Case('offset', offset=10.0, dim=40, branch=False),
    Case('no_batch', batch=0, scale=True),
    Case('half', layout='half', dim=20, scale=True),
    Case('channels_first', layout='channels_first', dim=20),
    Case('expanded', layout='expanded', dim=5, scale=True),
    Case('half_params', half_params=True, scale=True),
)}

#: Relative error that a backend may have against the float64 reference, by the dtype of the tensor compared:
#: internals are float32, so an output or gradient in half precision may cost one rounding and no more.
TOLERANCES = {
    dtype: {**dict.fromkeys(('output', 'x', 'branch'), elements), **dict.fromkeys(('weight', 'bias'), sums)}
    for dtype, elements, sums in ((torch.float64, 1e-14, 5e-14), (torch.float32, 2e-6, 5e-6),
                                  (torch.bfloat16, 4e-3, 4e-3), (torch.float16, 5e-4, 5e-4))}


def inputs(case, dtype, device='cpu', seed=0):
    """Fresh arguments of ``case`` by name, in the schema's order; None where it has no such argument. ``scale``,
    which has no gradient, belongs to the case: see :func:`scale`."""
    g = generator(case.name, seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    x, branch = (normal(case.batch, case.rows, case.dim) for _ in range(2))
    wide = dtype if case.half_params else torch.promote_types(dtype, torch.float32)
    x, branch = (lay_out(t.to(device, dtype), case.layout) for t in (x + case.offset, branch))
    return dict(x=x, branch=branch if case.branch else None, weight=(1 + normal(case.dim)).to(device, wide),
                bias=normal(case.dim).to(device, wide))


def scale(case, x):
    """By image, exact in every precision; or None."""
    if not case.scale:
        return None
    return 0.75 * (torch.arange(case.batch, device=x.device) % 3).to(torch.promote_types(x.dtype, torch.float32))


def _together(case, results):
    """The results in one tensor; of the norm alone where the other is ``x`` itself. Autocast has no rule for a stack of
    float16 on a CPU."""
    with torch.autocast('cpu', enabled=False):
        return torch.stack(results if case.branch else results[1:])


def operator(case, tensors):
    """The public function."""
    return _together(case, residual_norm(**tensors, scale=scale(case, tensors['x'])))


def reference(case, tensors):
    """What it should return."""
    return _together(case, residual_norm_reference(**tensors, scale=scale(case, tensors['x'])))
