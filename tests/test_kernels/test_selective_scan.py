"""What belongs to the selective scan alone."""
import math

import pytest
import torch
from kernel_testing import DEVICES, Call, calls, room
from mmengine.analysis import FlopAnalyzer

from mmvssm.kernels import cross_scan_order, selective_scan, selective_scan_reference, two_way_order, use_backend
from mmvssm.kernels._core.cases import relative_error
from mmvssm.kernels._core.triton_support import why_not_triton
from mmvssm.kernels.quadtree import quadtree_reference
from mmvssm.kernels.selective_scan.orders import order_of_map

CASES = room('selective_scan', 'cases').CASES


def inputs(name, dtype=torch.float64):
    return room('selective_scan', 'cases').inputs(CASES[name], dtype)


def scan_by_scalars(x, dt, A, B, C, dt_weight, dt_bias, D, order):
    """The docstring's equations for (K, ...) arguments and order (K, L), one number at a time."""
    x, dt, A, B, C, dt_weight, dt_bias, D, order = (
        t.tolist() for t in (x, dt, A, B, C, dt_weight, dt_bias, D, order))
    y = [[[0.0] * len(x[0][0]) for _ in x[0]] for _ in x]
    for b in range(len(x)):
        for k in range(len(A)):
            for d in range(len(A[0])):
                h = [0.0] * len(A[0][0])
                for token in order[k]:
                    raw = dt_bias[k][d]
                    for r, low in enumerate(dt[b][token][k]):
                        raw += low * dt_weight[k][d][r]
                    delta = math.log(1 + math.exp(raw))
                    for n in range(len(h)):
                        h[n] = math.exp(delta * A[k][d][n]) * h[n] + delta * B[b][token][k][n] * x[b][token][d]
                        y[b][token][d] += C[b][token][k][n] * h[n]
                    y[b][token][d] += D[k][d] * x[b][token][d]
    return torch.tensor(y, dtype=torch.float64)


def test_reference_computes_the_equations():
    tensors = inputs('tiny')
    assert tensors['x'].shape == (2, 5, 3)
    assert tensors['order'].tolist() != [list(range(5))] * 2
    torch.testing.assert_close(selective_scan_reference(**tensors), scan_by_scalars(**tensors))


def test_states_are_what_the_output_sums():
    tensors = inputs('d_state_16')
    output, C = selective_scan_reference(**{**tensors, 'D': None}), tensors['C']
    states = selective_scan_reference(**{**tensors, 'C': None, 'D': None})
    torch.testing.assert_close((states * C.unsqueeze(-1)).sum(2), output)


def one_ordered_direction(name, case):
    return case.order and case.directions in (None, 1)


@pytest.mark.parametrize('call', calls(one_ordered_direction, ['selective_scan']), ids=str)
def test_order_is_a_permutation_of_tokens(call):
    """Scanning in an order equals permuting the tokens, scanning, and permuting back."""
    tensors = call.inputs(torch.float64)
    batch, length, _ = tensors['x'].shape
    order = tensors['order'].expand(batch, 1, length)[:, 0].long()

    def permuted(t):
        return t.gather(1, order.view(order.shape + (1,) * (t.dim() - 2)).expand_as(t))

    walked = {name: permuted(t) if t is not None and name in 'x dt B C'.split() else t
              for name, t in tensors.items()}
    torch.testing.assert_close(permuted(call.forward(tensors)), call.forward({**walked, 'order': None}))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('call', [Call('selective_scan', name, backend) for backend in ('cpu', 'torch')
                                  for name in ('K2-order_KL', 'length_65', 'one_row')], ids=str)
@pytest.mark.parametrize('threads', [1, 4], indirect=True)
def test_extreme_steps_and_activations(call, dtype, threads):
    """Steps of -1e4 to 1e4 before the softplus, activations of +-1e4, a token of zeros: finite and right."""
    tensors = call.inputs(dtype)
    sign = torch.ones_like(tensors['dt_bias'])
    sign[..., ::2] = -1
    tensors['dt_bias'] = 1e4 * sign
    tensors['x'] = 1e4 * tensors['x'].sign()
    tensors['x'][:, 1] = 0
    tensors['dt'][:, 1] = 0
    got = call.evaluate(tensors)
    assert all(t.isfinite().all() for t in got.values())
    call.check(got, call.expected(tensors))


@pytest.mark.parametrize('backend', ['cpu', 'torch'])
def test_zeros(backend):
    call = Call('selective_scan', 'tiny', backend)
    tensors = {name: t * 0 if t is not None and t.is_floating_point() else t
               for name, t in call.inputs(torch.float32).items()}
    got = call.evaluate(tensors)
    assert got['output'].eq(0).all()
    assert all(t.isfinite().all() for t in got.values())


BAD_INPUTS = {
    'x-dims': (dict(x=lambda t: t[0]), ValueError, r'x has shape \(5, 3\), expected \(batch, L, D\)'),
    'x-dtype': (dict(x=lambda t: t.long()), TypeError, 'x has dtype torch.int64'),
    'x-float8': (dict(x=lambda t: t.to(torch.float8_e4m3fn)), TypeError, 'x has dtype torch.float8_e4m3fn'),
    'x-complex': (dict(x=lambda t: t.to(torch.complex64)), TypeError, 'x has dtype torch.complex64'),
    'dt-dims': (dict(dt=lambda t: t[0, 0]), ValueError, r'dt has shape \(2, 2\), expected \(batch, L, R\)'),
    'dt-length': (dict(dt=lambda t: t[:, 1:]), ValueError, r'dt has shape \(2, 4, 2, 2\).*\(2, 5, 2, 2\)'),
    'dt-batch': (dict(dt=lambda t: t[1:]), ValueError, r'dt has shape \(1, 5, 2, 2\)'),
    'dt-no_direction': (dict(dt=lambda t: t[:, :, :0]), ValueError, 'dt has no direction'),
    'A-shape': (dict(A=lambda t: t.mT), ValueError, r'A has shape \(2, 2, 3\), expected.* \(2, 3, 2\)'),
    'A-dims': (dict(A=lambda t: t[0]), ValueError, r'A has shape \(3, 2\), expected.* \(2, 3, 2\)'),
    'B-dims': (dict(B=lambda t: t[:, :, 0]), ValueError, r'B has shape \(2, 5, 2\)'),
    'B-scalar': (dict(B=lambda t: t[0, 0, 0, 0]), ValueError, r'B has shape \(\)'),
    'B-directions': (dict(B=lambda t: t[:, :, :1]), ValueError, r'B has shape \(2, 5, 1, 2\)'),
    'B-no_state': (dict(B=lambda t: t[..., :0]), ValueError, 'B has 0 states, expected 1 to 256'),
    'B-states': (dict(B=lambda t: t.expand(257, 2, 5, 2, 2).permute(1, 2, 3, 4, 0).flatten(3)), ValueError,
                 'B has 514 states, expected 1 to 256'),
    'C-shape': (dict(C=lambda t: t[..., :1]), ValueError, r'C has shape \(2, 5, 2, 1\)'),
    'C-missing': (dict(C=lambda t: None, D=lambda t: None), ValueError, '2 directions need C'),
    'D-without_C': (dict(C=lambda t: None), ValueError, 'D is given without C'),
    'D-shape': (dict(D=lambda t: t[0]), ValueError, r'D has shape \(3,\), expected.* \(2, 3\)'),
    'dt_weight-shape': (dict(dt_weight=lambda t: t.mT), ValueError, r'dt_weight has shape \(2, 2, 3\)'),
    'dt_bias-shape': (dict(dt_bias=lambda t: t[:, 1:]), ValueError, r'dt_bias has shape \(2, 2\)'),
    'dt_bias-device': (dict(dt_bias=lambda t: t.to('meta')), ValueError,
                       'one device, got x on cpu.*dt_bias on meta'),
    'order-list': (dict(order=lambda t: t.tolist()), TypeError, 'order is a list, expected a Tensor'),
    'order-dtype': (dict(order=lambda t: t.float()), TypeError, 'order has dtype torch.float32'),
    'order-uint16': (dict(order=lambda t: t.to(torch.uint16)), TypeError, 'order has dtype torch.uint16'),
    'order-bool': (dict(order=lambda t: t.bool()), TypeError, 'order has dtype torch.bool'),
    'order-length': (dict(order=lambda t: t[:, 1:]), ValueError, r'order has shape \(2, 4\).*\(2, 2, 5\)'),
    'order-directions': (dict(order=lambda t: t[:1]), ValueError, r'order has shape \(1, 5\)'),
    'order-scalar': (dict(order=lambda t: t[0, 0]), ValueError, r'order has shape \(\)'),
    'order-twice': (dict(order=lambda t: t.clamp(min=1)), ValueError,
                    'order has tokens from 1 to 4, expected each of 0 to 4 once in a row'),
    'order-beyond': (dict(order=lambda t: t + 1), ValueError, 'order has tokens from 1 to 5'),
    'order-negative': (dict(order=lambda t: t - 1), ValueError, 'order has tokens from -1 to 3'),
    'order-sides': (dict(order=lambda t: (3, 2)), ValueError, 'order is a map of 3 x 2 tokens, but x has 5'),
    'order-three_sides': (dict(order=lambda t: (1, 5, 1)), ValueError,
                          r'order is \(1, 5, 1\), expected a tensor, or the height and width of a map'),
    'order-side': (dict(order=lambda t: (5., 1)), ValueError, r'order\[0\] is 5.0, expected an integer'),
    'order-no_side': (dict(order=lambda t: (-1, -5)), ValueError, r'order\[0\] is -1, expected .* at least 1'),
    'order-device': (dict(order=lambda t: t.to('meta')), ValueError, 'x on cpu, order on meta'),
}


@pytest.mark.parametrize('name', ['x', 'dt', 'A', 'B', 'dt_weight', 'dt_bias'])
def test_no_argument_that_must_be_there(name):
    with pytest.raises(TypeError, match=f'^selective_scan: {name} is a NoneType, expected a Tensor'):
        selective_scan(**{**inputs('tiny'), name: None})


@pytest.mark.parametrize('changes, error, message', BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input(changes, error, message):
    tensors = inputs('tiny')
    tensors.update({name: change(tensors[name]) for name, change in changes.items()})
    with pytest.raises(error, match='^selective_scan: .*' + message):
        selective_scan(**tensors)


def test_orders():
    assert two_way_order(4).tolist() == [[0, 1, 2, 3], [3, 2, 1, 0]]
    assert cross_scan_order(2, 3).tolist() == [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5],
                                               [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]]


@pytest.mark.parametrize('directions', [(), (1,), (3,)], ids=['none', '1', '3'])
def test_directions_of_a_map(directions):
    x, dt, A = torch.zeros(1, 4, 2), torch.zeros(1, 4, *directions, 1), torch.zeros(*directions, 2, 1)
    with pytest.raises(ValueError, match='walked in 2 or 4 directions, got ' + str(*directions or (1,))):
        selective_scan(x, dt, A, dt, dt, dt_weight=A, dt_bias=A[..., 0], order=(2, 2))


@pytest.mark.parametrize('divisor', [1, 2, 3, 7, 14, 200, 255, 1000, 1023, 1024])
def test_division_by_product(divisor):
    blocks = room('selective_scan', 'triton.blocks')
    end = 2**blocks.DIVISION.value // divisor
    numbers = torch.cat([torch.arange(min(end, 10**5)), torch.arange(max(end - 10**5, 0), end)])
    assert torch.equal(numbers * blocks.magic_of(divisor) >> blocks.DIVISION.value, numbers // divisor)


@pytest.mark.parametrize('device', DEVICES)
def test_map_too_large_to_divide_has_a_table(monkeypatch, device):
    call = Call('selective_scan', 'sides-K4', 'triton', device)
    tables, blocks = [], room('selective_scan', 'triton.blocks')
    monkeypatch.setattr(blocks, 'DIVISION', blocks.tl.constexpr(9))  # 7 * 77 are more
    monkeypatch.setattr(blocks, 'order_of_map', lambda *a: tables.append(a) or order_of_map(*a))
    call.check(call.evaluate(call.inputs(torch.float32)), call.expected(call.inputs(torch.float32)))
    assert [a[:2] for a in tables] == [((7, 11), 4)] * 2


@pytest.mark.parametrize('in_turn', [False, True], ids=['apart', 'in_turn'])
@pytest.mark.parametrize('token_order', ['released', 'quadtree'])
@pytest.mark.parametrize('windows, height, width, dim, rank, d_state, shift', [
    ((0, 1, 2, 3), 8, 12, 5, 2, 1, (1, -2)), ((3, 1), 12, 4, 20, 3, 2, (-1, 1)), ((2,), 24, 20, 16, 2, 1, (-3, 3)),
    ((1,), 8, 8, 5, 70, 1, (0, 0))], ids=['windows', 'states', 'segments', 'rank_70'])
@pytest.mark.parametrize('device', DEVICES)
def test_quadtree_in_the_kernels(monkeypatch, device, windows, height, width, dim, rank, d_state, shift, token_order,
                                 in_turn):
    """As re-ordered before and after the scan; and what the selection of windows adds to the loss."""
    with use_backend('triton'):
        reason = why_not_triton(torch.empty(1, device=device))
    if reason:
        pytest.skip(reason)
    triton, blocks = room('selective_scan', 'triton'), room('selective_scan', 'triton.blocks')
    monkeypatch.setattr(blocks, '_FEW_BYTES', 0 if in_turn else 2**60)
    g, batch, length = torch.Generator().manual_seed(height), len(windows), height * width
    selected = torch.nn.functional.one_hot(torch.tensor(windows), 4).double().requires_grad_()
    x, dt, B, C, dt_weight, dt_bias, D = (torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()
                                          for shape in (
        (batch, length, dim), (batch, length, 2, rank), *[(batch, length, 2, d_state)] * 2, (2, dim, rank), (2, dim),
        (2, dim)))
    A = (-torch.rand(2, dim, d_state, generator=g, dtype=torch.float64)).requires_grad_()

    def reorder(t, inverse=False):
        return quadtree_reference(t.flatten(2), selected, height, width, shift, token_order, inverse).view(t.shape)

    y = reorder(selective_scan_reference(reorder(x), reorder(dt), A, reorder(B), reorder(C), dt_weight=dt_weight,
                                         dt_bias=dt_bias, D=D, order=(height, width)), True)
    grad_y = torch.randn(y.shape, generator=g, dtype=torch.float64)
    tensors = x, dt, A, B, C, dt_weight, dt_bias, D
    expected = torch.autograd.grad(y, (*tensors, selected), grad_y)

    args = [t.detach().to(device, torch.float32) for t in tensors]
    order = triton.Quadtree(selected.detach().to(device, torch.float32), height, width, shift, token_order)
    got, states = triton.forward(*args, order, chunk=32)
    assert relative_error(got, y.detach()) <= 2e-6
    grad_y = grad_y.to(device, torch.float32)
    *grads, rest = (*triton.backward(grad_y, *args, order, states, chunk=32), None)[:9]
    for t, grad, exact in zip('x dt A B C dt_weight dt_bias D'.split(), grads, expected):
        assert relative_error(grad, exact) <= 5e-6, t
    p, grad_p = (torch.cat([t[i] for i in (1, 3, 4)], -1) for t in (args, grads))
    gains = triton.gains_of(grad_y, got, args[0], grads[0], p, grad_p, rest, order).sum(2)
    assert relative_error(gains, expected[8]) <= 5e-6
    order = order._replace(selected=torch.full_like(order.selected, float('nan')))
    assert triton.forward(*args, order, chunk=32)[0].isnan().all()


@pytest.mark.parametrize('make, sizes, message', [
    (two_way_order, (-1,), 'two_way_order: length is -1, expected an integer of at least 0'),
    (two_way_order, (3.,), 'length is 3.0'), (cross_scan_order, (-2, -3), 'cross_scan_order: height is -2'),
    (cross_scan_order, (2, '3'), "width is '3'")], ids=['negative', 'float', 'height', 'width'])
def test_sizes_of_orders(make, sizes, message):
    with pytest.raises(ValueError, match=message):
        make(*sizes)


@pytest.mark.parametrize('name, per_state, skip', [
    ('order_BKL-states', 7, 0), ('dim_40', 9, 0), ('d_state_16', 9, 1), ('K2-order_KL', 9, 1)])
def test_flops(name, per_state, skip):
    tensors = {key: t for key, t in inputs(name).items() if t is not None}

    class Model(torch.nn.Module):

        def forward(self, *args):
            return selective_scan(**dict(zip(tensors, args)))

    case = CASES[name]
    elements = case.batch * case.length * case.dim * (case.directions or 1)
    flops = FlopAnalyzer(Model(), tuple(tensors.values())).by_operator()
    assert flops == {'selective_scan': elements * (per_state * case.d_state + case.rank + skip)}


@pytest.mark.parametrize('warps, blocks, longest, segments, each', [
    (500, 1050, 10**6, 1, 1050), (16, 7, 10**6, 1, 7), (16, 1050, 10**6, 132, 8), (16, 1050, 4, 263, 4),
    (499, 10**6, 10**5, 10, 10**5)], ids=['warps', 'short', 'few_warps', 'limited', 'large'])
def test_segments(warps, blocks, longest, segments, each):
    pytest.importorskip('triton')
    assert room('selective_scan', 'triton.blocks')._segments(warps, blocks, longest) == (segments, each)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('case, settings, steps, segments, each', [
    ('length_200', dict(_FEW_WARPS=1), 8, 1, 4), ('length_65', dict(_FEW_WARPS=1), 8, 1, 2),
    ('segments', dict(_ENOUGH_WARPS={16: 5}), 4, 5, 4), ('segments', dict(_ENOUGH_WARPS={16: 3}), 4, 3, 6),
    ('segments-order', dict(_ENOUGH_WARPS={16: 6}), 4, 6, 3)],
    ids=['steps_8', 'steps_8-65', 'each_4', 'each_6', 'each_3-order'])
def test_cut_as_for_larger_sizes(monkeypatch, case, settings, steps, segments, each, device):
    call = Call('selective_scan', case, 'triton', device)
    tensors = call.inputs(torch.float32)
    blocks, forward = (room('selective_scan', f'triton.{part}') for part in ('blocks', 'forward'))
    seen = []

    class Launch(forward.Launch):

        def __call__(self, *args, **kwargs):
            seen.append((self.numbers[-6], self.segments, self.each))
            super().__call__(*args, **kwargs)

    monkeypatch.setattr(forward, 'Launch', Launch)
    for name, value in settings.items():
        monkeypatch.setattr(blocks, name, value)
    call.check(call.evaluate(tensors), call.expected(call.inputs(torch.float32)))
    assert set(seen) == {(steps, segments, each)}


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('case', ['length_1-skip', 'K2', 'K2-order_KL', 'rank_24', 'half', 'rank_70-order',
                                  'K4-order_BKL', 'segments-K2', 'sides-K4'])
def test_directions_in_turn_as_of_large_maps(monkeypatch, case, dtype, device):
    call = Call('selective_scan', case, 'triton', device)
    blocks, backward = (room('selective_scan', f'triton.{part}') for part in ('blocks', 'backward'))
    monkeypatch.setattr(blocks, '_FEW_BYTES', 0)
    monkeypatch.setattr(backward, '_WARPS_IN_TURN', 1)  # so that there is more than one group of programs
    for part in ('forward', 'backward'):
        monkeypatch.setattr(room('selective_scan', f'triton.{part}'), 'add_directions',
                            lambda *_: pytest.fail('the directions were not taken in turn'))
    call.check(call.evaluate(call.inputs(dtype)), call.expected(call.inputs(dtype)))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('begin', [0, 1])
@pytest.mark.parametrize('case', ['rank_24', 'rank_48'])
def test_dt_in_pairs_where_memory_allows(case, begin, device):
    call = Call('selective_scan', case, 'triton', device)
    tensors = call.inputs(torch.bfloat16)
    dt = tensors['dt'].detach()
    wider = dt.new_full((*dt.shape[:-1], dt.shape[-1] + 4), torch.nan)
    tensors['dt'] = wider[..., begin:begin + dt.shape[-1]].copy_(dt).requires_grad_()
    assert room('selective_scan', 'triton.blocks')._in_pairs(tensors['dt']) == (begin == 0)
    call.check(call.evaluate(tensors), call.expected(tensors))


@pytest.mark.parametrize('asked, ranks, stays', [(None, 128, True), (None, 129, False), ('triton', 129, True)],
                         ids=['128', '129', '129-asked'])
def test_triton_stands_back_from_too_many_ranks(asked, ranks, stays):
    dispatch = room('selective_scan', 'dispatch')
    with use_backend(asked):
        names = [b.name for b in dispatch.within_ranks(dispatch.BACKENDS, torch.empty(1, 1, 1, ranks))]
    assert names == ['triton', 'cpu', 'torch'] if stays else names == ['cpu', 'torch']


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name, dtype', [('dt', torch.float64), ('order', torch.uint8), ('order', torch.int16)],
                         ids=['dt-float64', 'order-uint8', 'order-int16'])
def test_triton_reads_other_dtypes(name, dtype, device):
    call = Call('selective_scan', 'order_L', 'triton', device)
    tensors = call.inputs(torch.float32)
    changed = {k: t if k != name else t.detach().to(dtype).requires_grad_(t.requires_grad) for k, t in tensors.items()}
    got, expected = call.evaluate(changed), call.evaluate(tensors)
    for key in expected:
        assert torch.equal(got[key].to(expected[key].dtype), expected[key]), key
    assert got['dt'].dtype == changed['dt'].dtype
