"""Cases of the gated LayerNorm that every backend must get right: shapes, inputs, tolerances."""
from dataclasses import dataclass

import torch

from .._core.cases import generator, lay_out
from .interface import norm_gate
from .reference import norm_gate_reference


@dataclass(frozen=True)
class Case:
    """Shapes and options of one call; see :func:`mmvssm.kernels.norm_gate`.

    Args:
        rows: of an image; ``x`` is (batch, rows, dim).
        offset: mean of ``x``; variances must not suffer from it.
        layout: of ``x`` and ``z``; see :func:`lay_out`.
        half_params: parameters in the precision of ``x``. They stay in float32 otherwise, as under autocast.
    """
    name: str
    batch: int = 2
    rows: int = 20
    dim: int = 16
    offset: float = 0.0
    layout: str = 'contiguous'
    half_params: bool = False


CASES = {case.name: case for case in (
    Case('tiny', rows=3, dim=4),
    Case('one_row', batch=1, rows=1, dim=40),
    Case('dim_5', dim=5),
    Case('dim_16'),
    Case('dim_40', dim=40),
    Case('dim_128', dim=128),
    Case('rows_130', batch=1, rows=130, dim=20),  # three blocks of rows in backward
    Case('offset', offset=10.0, dim=40),
    Case('no_batch', batch=0),
    Case('half', layout='half', dim=20),
    Case('channels_first', layout='channels_first', dim=20),
    Case('expanded', layout='expanded', dim=5),
    Case('half_params', half_params=True),
)}

#: Relative error that a backend may have against the float64 reference, by the dtype of the tensor compared:
#: internals are float32, so an output or gradient in half precision may cost one rounding and no more.
TOLERANCES = {
    dtype: {**dict.fromkeys(('output', 'x', 'z'), elements), **dict.fromkeys(('weight', 'bias'), sums)}
    for dtype, elements, sums in ((torch.float64, 1e-14, 5e-14), (torch.float32, 2e-6, 5e-6),
                                  (torch.bfloat16, 4e-3, 4e-3), (torch.float16, 5e-4, 5e-4))}


def inputs(case, dtype, device='cpu', seed=0):
    """Fresh arguments of ``case`` by name, in the schema's order."""
    g = generator(case.name, seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    x, z = (normal(case.batch, case.rows, case.dim) for _ in 'xz')
    wide = dtype if case.half_params else torch.promote_types(dtype, torch.float32)
    tensors = {name: lay_out(t.to(device, dtype), case.layout) for name, t in dict(x=x + case.offset, z=z).items()}
    return dict(**tensors, weight=(1 + normal(case.dim)).to(device, wide), bias=normal(case.dim).to(device, wide))


def operator(case, tensors):
    """The public function."""
    return norm_gate(**tensors)


def reference(case, tensors):
    """What it should return."""
    return norm_gate_reference(**tensors)
