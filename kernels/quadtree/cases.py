"""Cases of the quadtree re-orderings that every backend must get right: shapes, inputs, tolerances."""
from dataclasses import dataclass

import torch

from .._core.cases import generator, lay_out
from .interface import from_quadtree, to_quadtree
from .reference import quadtree_reference


@dataclass(frozen=True)
class Case:
    """Shapes and options of one call; see :func:`mmvssm.kernels.to_quadtree`.

    Args:
        inverse: :func:`from_quadtree` instead; ``x`` is then the sequence.
        one_hot: the selection is 0 and 1, as in a network; else it is any numbers.
        layout: of ``x``; see :func:`lay_out`.
        half_params: the selection in the precision of ``x``. It stays in float32 otherwise, as under autocast.
    """
    name: str
    batch: int = 2
    height: int = 8
    width: int = 8
    dim: int = 16
    shift: tuple = (0, 0)
    token_order: str = 'released'
    inverse: bool = False
    one_hot: bool = False
    layout: str = 'contiguous'
    half_params: bool = False


CASES = {case.name: case for case in (
    Case('tiny', height=4, width=4, dim=2),
    Case('tiny-quadtree-inverse', height=4, width=8, dim=1, shift=(1, -1), token_order='quadtree', inverse=True),
    Case('4x4', batch=1, height=4, width=4, inverse=True),
    Case('8x12-shift', width=12, shift=(1, 1), dim=5, one_hot=True),
    Case('8x12-shift-inverse', width=12, shift=(-1, 1), dim=20, inverse=True),
    Case('16x8-quadtree', height=16, shift=(2, -2), token_order='quadtree', one_hot=True),
    Case('16x8-quadtree-inverse', height=16, shift=(2, 2), token_order='quadtree', inverse=True, one_hot=True),
    Case('one_hot', one_hot=True, dim=40),
    Case('one_hot-inverse', batch=3, one_hot=True, inverse=True, dim=5),
    Case('dim_1', dim=1, inverse=True),
    Case('dim_0', dim=0),
    Case('20x12-quadtree', height=20, width=12, shift=(-2, 3), token_order='quadtree', one_hot=True, dim=5),
    Case('12x20-inverse', height=12, width=20, shift=(1, -1), inverse=True, one_hot=True, dim=5),
    Case('no_batch', batch=0),
    Case('no_batch-inverse', batch=0, inverse=True),
    Case('half', layout='half', dim=20),
    Case('channels_first', layout='channels_first', inverse=True, shift=(1, 1)),
    Case('expanded', layout='expanded', dim=5, token_order='quadtree'),
    Case('half_params', half_params=True),
)}

#: Relative error that a backend may have against the float64 reference, by the dtype of the tensor compared:
#: internals are float32, so an output or gradient in half precision may cost one rounding and no more.
TOLERANCES = {
    dtype: dict(output=elements, x=elements, selected=sums)
    for dtype, elements, sums in ((torch.float64, 1e-14, 5e-14), (torch.float32, 2e-6, 5e-6),
                                  (torch.bfloat16, 4e-3, 4e-3), (torch.float16, 5e-4, 5e-4))}


def inputs(case, dtype, device='cpu', seed=0):
    """Fresh arguments of ``case`` by name, in the schema's order."""
    g = generator(case.name, seed)
    shape = (case.height * case.width,) if case.inverse else (case.height, case.width)
    x = torch.randn((case.batch, *shape, case.dim), generator=g, dtype=torch.float64).to(device, dtype)
    selected = torch.randn(case.batch, 4, generator=g, dtype=torch.float64)
    if case.one_hot:
        selected = (selected == selected.amax(1, keepdim=True)).to(selected)
    wide = dtype if case.half_params else torch.promote_types(dtype, torch.float32)
    return dict(x=lay_out(x, case.layout), selected=selected.to(device, wide))


def operator(case, tensors):
    """The public function."""
    options = dict(shift=case.shift, token_order=case.token_order)
    if case.inverse:
        return from_quadtree(*tensors.values(), case.height, case.width, **options)
    return to_quadtree(*tensors.values(), **options)


def reference(case, tensors):
    """What it should return."""
    x, selected = tensors.values()
    y = quadtree_reference(x if case.inverse else x.flatten(1, 2), selected, case.height, case.width, case.shift,
                           case.token_order, case.inverse)
    return y.unflatten(1, (case.height, case.width)) if case.inverse else y
