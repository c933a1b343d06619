"""What belongs to the quadtree alone: orders, selection, bad input."""
import itertools

import pytest
import torch
from kernel_testing import DEVICES, room
from mmengine.analysis import FlopAnalyzer

from mmvssm.kernels import from_quadtree, select_window, to_quadtree, use_backend, window_scores
from mmvssm.kernels._core.triton_support import why_not_triton
from mmvssm.kernels.quadtree.orders import tables

SIZES = [(4, 4), (8, 12), (12, 8), (56, 56)]
SHIFTS = [(0, 0), (1, 1), (-1, 2)]


def one_hot(window):
    return torch.nn.functional.one_hot(torch.tensor(window).reshape(-1), 4).double()


def numbered(height, width):
    """A map (1, H, W, 1) whose tokens hold their number, from 1."""
    return torch.arange(1., height * width + 1, dtype=torch.float64).view(1, height, width, 1)


def walk_by_scalars(height, width, parts):
    """Tokens of a grid of ``parts`` x ``parts`` windows, window by window, in loops."""
    tall, wide = height // parts, width // parts
    return [(top * tall + y) * width + left * wide + x for top in range(parts) for left in range(parts)
            for y in range(tall) for x in range(wide)]


def sequence_by_scalars(height, width, window, token_order):
    """The docstring's sequence, a token's number at a time; the sum where tokens meet."""
    coarse = walk_by_scalars(height, width, 2)
    inside = set(coarse[window * height * width // 4:(window + 1) * height * width // 4])
    fine = walk_by_scalars(height, width, 4)
    if token_order == 'quadtree':  # in the quarter of its window, by sub-windows
        start = window * height * width // 4
        rank = {token: i for i, token in enumerate(t for t in fine if t in inside)}
        place = {token: start + rank[token] for token in inside}
    else:
        place = {token: fine.index(token) for token in inside}
    sequence = [0] * (height * width)
    for position, token in enumerate(coarse):
        if token not in inside:
            sequence[position] += token + 1
    for token in inside:
        sequence[place[token]] += token + 1
    return sequence


@pytest.mark.parametrize('token_order', ['released', 'quadtree'])
@pytest.mark.parametrize('window', range(4))
@pytest.mark.parametrize('height, width', [(4, 4), (8, 12)])
def test_sequence_is_the_docstrings(height, width, window, token_order):
    sequence = to_quadtree(numbered(height, width), one_hot(window), token_order=token_order)
    assert sequence.flatten().tolist() == sequence_by_scalars(height, width, window, token_order)


@pytest.mark.parametrize('shift', SHIFTS, ids=str)
@pytest.mark.parametrize('height, width', SIZES)
@pytest.mark.parametrize('window', range(4))
def test_quadtree_order_is_a_bijection(height, width, window, shift):
    """Every token has a position of its own, and reads back what it put there."""
    x, selected, options = numbered(height, width), one_hot(window), dict(shift=shift, token_order='quadtree')
    sequence = to_quadtree(x, selected, **options)
    assert sequence.flatten().sort()[0].equal(x.flatten())
    assert from_quadtree(sequence, selected, height, width, **options).equal(x)


@pytest.mark.parametrize('window', range(4))
def test_quadtree_order_refines_within_the_windows_quarter(window):
    x, quarter = numbered(16, 8), slice(window * 32, window * 32 + 32)
    coarse = to_quadtree(x, torch.zeros(1, 4, dtype=torch.float64), token_order='quadtree').flatten()
    refined = to_quadtree(x, one_hot(window), token_order='quadtree').flatten()
    moved = (coarse != refined).nonzero().flatten().tolist()
    assert moved
    assert set(moved) <= set(range(128)[quarter])
    assert coarse[quarter].sort()[0].equal(refined[quarter].sort()[0])


def test_released_order_is_none():
    """The fact for which the other order exists."""
    sequence = to_quadtree(numbered(8, 8), one_hot(0)).flatten()
    assert (sequence == 0).any()
    assert sequence.sum() == numbered(8, 8).sum()


@pytest.mark.parametrize('token_order', ['released', 'quadtree'])
@pytest.mark.parametrize('shift', [(1, 1), (-2, 1)], ids=str)
def test_shift_rolls_the_map(shift, token_order):
    x, selected = numbered(8, 12), one_hot(2)
    rolled = to_quadtree(x.roll(shift, (1, 2)), selected, token_order=token_order)
    sequence = to_quadtree(x, selected, shift=shift, token_order=token_order)
    assert sequence.equal(rolled)
    back = from_quadtree(sequence, selected, 8, 12, shift=shift, token_order=token_order)
    expected = from_quadtree(rolled, selected, 8, 12, token_order=token_order).roll((-shift[0], -shift[1]), (1, 2))
    assert back.equal(expected)


@pytest.mark.parametrize('token_order, shift', itertools.product(['released', 'quadtree'], SHIFTS), ids=str)
def test_tables_are_permutations_and_their_inverses(token_order, shift):
    t = tables(8, 12, shift, token_order, torch.device('cpu'))
    for walk, position in ((t.coarse, t.coarse_position), (t.fine, t.fine_position)):
        assert walk[position].equal(torch.arange(96))
    assert t.window.bincount().tolist() == [24] * 4


def test_each_image_has_its_own_selection():
    x = numbered(8, 8).repeat(4, 1, 1, 1)
    together = to_quadtree(x, one_hot([0, 1, 2, 3]))
    assert together.equal(torch.cat([to_quadtree(x[:1], one_hot(window)) for window in range(4)]))


def test_window_scores():
    scores = torch.arange(32.).view(1, 4, 8)
    means = [scores[0, y:y + 2, x:x + 4].mean() for y in (0, 2) for x in (0, 4)]
    assert window_scores(scores).equal(torch.stack(means).view(1, 4))
    assert window_scores(scores, (1, -1)).equal(window_scores(scores.roll((1, -1), (1, 2))))


class TestSelectWindow:

    logits = torch.tensor([[0.1, 2., -1., 0.5], [3., 0., 0., 2.9]])

    def test_highest_wins(self):
        assert select_window(self.logits, sample=False).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]

    def test_samples_have_the_probabilities_of_the_softmax(self):
        torch.manual_seed(0)
        drawn = select_window(self.logits[:1].expand(20000, 4), sample=True)
        assert set(drawn.unique().tolist()) == {0., 1.}
        torch.testing.assert_close(drawn.mean(0), self.logits[0].softmax(0), atol=0.015, rtol=0)

    def test_samples_follow_the_seed(self):
        draws = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            draws.append(select_window(torch.zeros(64, 4), sample=True))
        assert draws[0].equal(draws[1])
        assert not draws[0].equal(draws[2])

    def test_gradient_is_that_of_the_softmax(self):
        logits = self.logits.clone().requires_grad_()
        cotangent = torch.tensor([[1., -2., 3., 0.5], [0., 1., 2., 3.]])
        got, = torch.autograd.grad(select_window(logits, sample=False), logits, cotangent)
        expected, = torch.autograd.grad(logits.softmax(-1), logits, cotangent)
        torch.testing.assert_close(got, expected)

    @pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
    def test_exactly_one_hot(self, dtype):
        torch.manual_seed(0)
        selected = select_window(torch.randn(1000, 4).to(dtype), sample=True)
        assert selected.dtype == dtype
        assert set(selected.unique().tolist()) == {0., 1.}
        assert (selected.sum(1) == 1).all()


def good():
    return torch.zeros(2, 8, 8, 3), torch.zeros(2, 4)


BAD_INPUTS = {
    'x-dims': (lambda x, s: to_quadtree(x[0], s), ValueError, r'to_quadtree: x has shape \(8, 8, 3\)'),
    'x-sides': (lambda x, s: to_quadtree(x[:, :6], s), ValueError, 'to_quadtree: x: a map of 6 x 8.*of 4; pad it'),
    'x-dtype': (lambda x, s: to_quadtree(x.int(), s), TypeError, 'to_quadtree: x has dtype torch.int32'),
    'selected-shape': (lambda x, s: to_quadtree(x, s[:1]), ValueError, r'selected has shape \(1, 4\).*\(2, 4\)'),
    'selected-device': (lambda x, s: to_quadtree(x, s.to('meta')), ValueError, 'one device.*selected on meta'),
    'shift': (lambda x, s: to_quadtree(x, s, shift=(1,)), ValueError, r'shift is \(1,\), expected two integers'),
    'shift-type': (lambda x, s: to_quadtree(x, s, shift=(.5, 1)), ValueError, 'expected two integers'),
    'token_order': (lambda x, s: to_quadtree(x, s, token_order='zigzag'), ValueError,
                    "token_order='zigzag', expected one of released, quadtree"),
    'y-dims': (lambda x, s: from_quadtree(x, s, 8, 8), ValueError, r'from_quadtree: y has shape \(2, 8, 8, 3\)'),
    'y-length': (lambda x, s: from_quadtree(x.flatten(1, 2), s, 8, 4), ValueError, r'\(batch, 8 \* 4, D\)'),
    'height-type': (lambda x, s: from_quadtree(x.flatten(1, 2), s, 8., 8), ValueError,
                    r'from_quadtree: height is 8\.0, expected an integer of at least 1'),
    'width-sign': (lambda x, s: from_quadtree(x.flatten(1, 2), s, 8, -8), ValueError, 'width is -8.*at least 1'),
    'sides': (lambda x, s: from_quadtree(x.flatten(1, 2), s, 32, 2), ValueError, 'height, width: a map of 32 x 2'),
    'scores-dims': (lambda x, s: window_scores(x), ValueError, r'scores has shape \(2, 8, 8, 3\), expected.*even H'),
    'scores-sides': (lambda x, s: window_scores(x[:, :5, :, 0]), ValueError, r'shape \(2, 5, 8\)'),
    'scores-empty': (lambda x, s: window_scores(x[:, :0, :, 0]), ValueError, r'shape \(2, 0, 8\)'),
    'scores-dtype': (lambda x, s: window_scores(x[..., 0].int()), TypeError, 'window_scores: scores has dtype'),
    'scores-shift': (lambda x, s: window_scores(x[..., 0], (.5, 1)), ValueError, 'window_scores: shift is'),
    'logits-dims': (lambda x, s: select_window(s[0], False), ValueError, r'logits has shape \(4,\).*\(batch, windows'),
    'logits-empty': (lambda x, s: select_window(s[:, :0], True), ValueError, r'logits has shape \(2, 0\)'),
    'logits-dtype': (lambda x, s: select_window(s.long(), False), TypeError, 'select_window: logits has dtype'),
    'logits-type': (lambda x, s: select_window(None, False), TypeError, 'logits is a NoneType'),
}


@pytest.mark.parametrize('call, error, message', BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(*good())


def test_flops():
    tensors = room('quadtree', 'cases').inputs(room('quadtree', 'cases').CASES['tiny'], torch.float32)

    class Model(torch.nn.Module):

        def forward(self, x, selected):
            return to_quadtree(x, selected)

    flops = FlopAnalyzer(Model(), tuple(tensors.values())).by_operator()
    assert flops == {'quadtree': 2 * tensors['x'].numel()}


@pytest.mark.parametrize('sample', [False, True], ids=['highest', 'sampled'])
@pytest.mark.parametrize('height, width, shift', [(4, 4, (0, 0)), (8, 12, (1, -2)), (48, 48, (-6, 6))], ids=str)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('device', DEVICES)
def test_selection_in_one_kernel(device, dtype, height, width, shift, sample):
    """The same windows as by PyTorch's operations in float64, and the same gradient."""
    with use_backend('triton'):
        reason = why_not_triton(torch.empty(1, device=device))
    if reason:
        pytest.skip(reason)
    from mmvssm.kernels.quadtree import selection
    g = torch.Generator().manual_seed(height)
    z = (3 * torch.randn(3, height * width, 2, generator=g)).to(dtype)
    z[2] *= 30  # probabilities of 0 and 1
    noise = torch.empty(3, 4).exponential_(generator=g) if sample else None
    gains = torch.randn(3, 4, height * width // 4, generator=g)

    exact = z.double().requires_grad_()
    scores = exact.log_softmax(-1)[..., 0].unflatten(1, (height, width))
    logits = window_scores(scores, shift)
    logits = logits if noise is None else logits - noise.double().log()
    expected = select_window(logits, sample=False)
    expected.backward(gains.sum(2).double())

    args = z.to(device), None if noise is None else noise.to(device), height, width, shift
    selected, soft = selection.select(*args, True)
    assert torch.equal(selected.cpu().double(), expected.detach())
    torch.testing.assert_close(soft.cpu().double(), logits.detach().softmax(-1), rtol=1e-5, atol=1e-7)
    grad = selection.select_backward(args[0], soft, gains.to(device), height, width, shift)
    error = (grad.cpu().double() - exact.grad).norm() / exact.grad.norm()
    assert error <= (4e-3 if dtype == torch.bfloat16 else 1e-5)
    assert selection.select(*args, False)[1] is None


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('place', [0, 1])
@pytest.mark.parametrize('device', DEVICES)
def test_selection_hides_no_overflow(device, place, value):
    with use_backend('triton'):
        reason = why_not_triton(torch.empty(1, device=device))
    if reason:
        pytest.skip(reason)
    from mmvssm.kernels.quadtree import selection
    z = torch.zeros(2, 16, 2, device=device)
    z[0, 5, place] = value
    selected, soft = selection.select(z, None, 4, 4, (0, 0), True)
    for t in (selected, soft):
        assert t[0].isnan().all()
        assert t[1].isfinite().all()
