"""A block of QuadMamba as one autograd function does what its modules do one by one."""
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmvssm.kernels import BackendError, use_backend
from mmvssm.kernels._core.replay import Recording, Recordings
from mmvssm.kernels.quadtree.dispatch import BACKENDS
from mmvssm.models.backbones import QuadMamba
from mmvssm.models.backbones import quad_mamba_block as fused
from mmvssm.models.backbones.quad_mamba import Block, MultiDirectionSSM, QuadtreeSSM

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
#: Passes until one is repeated from a recording.
TIMES = 1 if DEVICE == 'cpu' else 3


def _why_not():
    with use_backend('triton'):
        return BACKENDS[0].why_not(torch.empty(1, device=DEVICE))


pytestmark = pytest.mark.skipif(_why_not() is not None, reason=f'Triton: {_why_not()}')


@pytest.fixture(autouse=True)
def _triton():
    with use_backend('triton'):
        yield


@pytest.fixture
def runs(monkeypatch):
    """How often the function ran."""
    calls, run = [], fused.run
    monkeypatch.setattr(fused, 'run', lambda *args: calls.append(1) or run(*args))
    return calls


@pytest.fixture
def repeats(monkeypatch):
    """Recordings are made as soon as all kernels have run; how often they ran."""
    calls, run = [], Recording.__call__
    monkeypatch.setattr(fused.function, 'recordings', Recordings(before=0 if DEVICE == 'cpu' else 1))
    monkeypatch.setattr(Recording, '__call__', lambda self, inputs: calls.append(1) or run(self, inputs))
    return calls


MIXERS = dict(cross=lambda: MultiDirectionSSM(8), cross_states=lambda: MultiDirectionSSM(8, 2),
              released=lambda: QuadtreeSSM(8, 1, (1, -1)),
              quadtree=lambda: QuadtreeSSM(8, 1, (-1, 1), 'quadtree'), unshifted=lambda: QuadtreeSSM(8, 2))


def build(mixer, dtype=torch.float32, training=True, drop_path=0.5):
    torch.manual_seed(0)
    block = Block(8, MIXERS[mixer](), 2., drop_path)
    block.op.reset_ssm_parameters()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return block.to(DEVICE, dtype).train(training)


def inputs(dtype=torch.float32, branch=True, autocast=False, size=(8, 4)):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, *size, 8, generator=g).to(DEVICE, dtype).requires_grad_()
    if not branch:
        return x, None, None
    branch = torch.randn(2, *size, 8, generator=g).to(DEVICE, torch.bfloat16 if autocast else dtype)
    return x, branch.requires_grad_(), torch.tensor([0.5, 2.], device=DEVICE)


def outcome(block, args, autocast=False, call=None):
    """Results and gradients, with the same random numbers each time."""
    torch.manual_seed(2)
    block.zero_grad()
    args = [None if a is None else a.detach().requires_grad_(a.requires_grad) for a in args]
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        x, branch, _ = (call or block)(*args)
    g = torch.Generator().manual_seed(3)
    torch.autograd.backward((x, branch), [torch.randn(t.shape, generator=g).to(t) for t in (x, branch)])
    named = dict(x=x, branch=branch, grad_x=args[0].grad, grad_branch=None if args[1] is None else args[1].grad)
    return {**named, **{name: p.grad for name, p in block.named_parameters()}}


def one_by_one(monkeypatch, *args, **kwargs):
    with monkeypatch.context() as patch:
        patch.setattr(fused, 'parameters_of', lambda *_: None)
        return outcome(*args, **kwargs)


def assert_same(got, expected, tolerance):
    """Five times ``tolerance`` for a score predictor: its gradient is made of differences of what two walks find."""
    for name, e in expected.items():
        if e is None:
            assert got[name] is None, name
            continue
        assert (got[name].dtype, got[name].shape) == (e.dtype, e.shape), name
        # The two numbers that a predictor gives each token have opposite gradients, which nearly add up to 0.
        scale = expected[name.replace('bias', 'weight')] if name.endswith('out_conv.4.bias') else e
        error = (got[name].double() - e.double()).norm() / scale.double().norm().clamp(min=1e-30)
        assert error <= tolerance * (5 if 'score_predictor' in name else 1), (name, error)


def joined(named):
    """The gradients of a score predictor as one vector, which half precision gives as a whole: those of its last layer
    are what is left of terms that cancel."""
    grads = [named.pop(name).double().flatten() for name in list(named) if 'score_predictor' in name]
    return {**named, **({'score_predictor': torch.cat(grads)} if grads else {})}


@pytest.mark.parametrize('mixer', MIXERS)
@pytest.mark.parametrize(('branch', 'training', 'autocast', 'dtype'), [
    (True, True, False, torch.float32), (False, False, False, torch.float32), (True, True, True, torch.float32),
    (True, False, False, torch.bfloat16)], ids=['training', 'eval-first', 'autocast', 'bf16'])
def test_same_as_modules_and_repeated(monkeypatch, runs, repeats, mixer, branch, training, autocast, dtype):
    if DEVICE == 'cpu' and not autocast and mixer not in ('cross_states', 'released'):
        pytest.skip("slow in Triton's interpreter, which runs this mixer under autocast")
    block, args = build(mixer, dtype, training), inputs(dtype, branch, autocast)
    expected = one_by_one(monkeypatch, block, args, autocast)
    half = autocast or dtype == torch.bfloat16
    if half:
        exact = one_by_one(monkeypatch, deepcopy(block).float(), [None if a is None else a.float() for a in args])
        expected = joined({**expected, **{name: e for name, e in exact.items() if 'score_predictor' in name}})
    assert not runs
    with monkeypatch.context() as patch:
        patch.setattr(fused.function, 'recordings', Recordings(before=1000))
        eager = outcome(block, args, autocast)
        assert not repeats
    # In half precision the gradients of weights are rounded once instead of twice. Those of a score predictor are
    # compared with full precision: the modules are as far from it, in another direction.
    assert_same(joined(dict(eager)) if half else eager, expected, 2e-2 if half else 2e-5)
    for _ in range(TIMES):
        assert_same(outcome(block, args, autocast), eager, 0)
    assert len(repeats) >= 2


@pytest.mark.parametrize('mixer', ['cross', 'released'])
def test_inference(monkeypatch, repeats, mixer):
    block, args = build(mixer, training=False), inputs()
    with torch.inference_mode():
        got = [block(*args)[:2] for _ in range(TIMES + 1)]
        assert repeats
        monkeypatch.setattr(fused, 'parameters_of', lambda *_: None)
        expected = block(*args)[:2]
    for results in got:
        for g, e in zip(results, expected, strict=True):
            torch.testing.assert_close(g, e)


def test_checkpointing_changes_nothing(runs):
    """The window is sampled as before when the block runs again."""
    block, args = build('released'), inputs()
    expected = outcome(block, args)
    got = outcome(block, args, call=lambda *a: checkpoint(block, *a, use_reentrant=False))
    assert len(runs) == 3
    assert_same(got, expected, 0)


def test_frozen_parameters_get_no_gradient(monkeypatch, runs):
    block, args = build('released'), inputs()
    for name, parameter in block.named_parameters():
        parameter.requires_grad_('in_conv' in name or 'fc1' in name)
    expected = one_by_one(monkeypatch, block, args)
    assert_same(outcome(block, args), expected, 2e-5)
    assert runs


class Seen(nn.Module):
    """Another module in place of one of ours."""

    def __init__(self, module, seen):
        super().__init__()
        self.module, self.seen = module, seen

    def forward(self, *args, **kwargs):
        self.seen.append(1)
        return self.module(*args, **kwargs)


@pytest.mark.parametrize('change', ['hook', 'norm_hook', 'norm_replaced', 'predictor_hook', 'replaced',
                                    'approximate_gelu', 'subclass', 'bias'])
def test_modules_run_where_that_could_be_told(runs, change):
    block, args, seen = build('released'), inputs(size=(4, 4)), []
    block(*args)
    assert len(runs) == 1  # what is found out about a block does not outlast a change
    if change == 'hook':
        block.op.register_forward_pre_hook(lambda *_: seen.append(1))
    elif change == 'norm_hook':
        block.norm2.register_forward_hook(lambda *_: seen.append(1))
    elif change == 'norm_replaced':
        block.norm = Seen(block.norm, seen)
    elif change == 'predictor_hook':
        block.op.score_predictor.out_conv[2].register_forward_hook(lambda *_: seen.append(1))
    elif change == 'replaced':
        block.op.score_predictor.in_conv[1] = Seen(block.op.score_predictor.in_conv[1], seen)
    elif change == 'approximate_gelu':
        block.op.score_predictor.out_conv[1] = nn.GELU(approximate='tanh')
        seen.append(1)
    elif change == 'subclass':
        mixer = block.op
        mixer.__class__ = type('Other', (QuadtreeSSM,), dict(mix=lambda self, x: seen.append(1) or x.flatten(1, 2)
                                                             .unflatten(1, x.shape[1:3])))
    elif change == 'bias':
        block.op.in_proj.bias = nn.Parameter(torch.zeros(16, device=DEVICE))
        seen.append(1)
    outcome(block, args)
    assert seen
    assert len(runs) == 1


def test_maps_that_a_quadtree_pads_run_by_modules(runs):
    args = inputs(size=(6, 5))
    build('released')(*args)
    assert not runs
    build('cross')(*args)
    assert runs


def test_another_backend_for_backward_is_refused():
    x, branch, _ = build('cross')(*inputs(size=(2, 2)))
    with use_backend('torch'), pytest.raises(BackendError, match='block of QuadMamba'):
        (x.sum() + branch.sum()).backward()


def test_no_second_derivative(runs):
    args = inputs(size=(2, 2))
    y, _, _ = build('cross')(*args)
    assert runs
    grad, = torch.autograd.grad(y.sum(), args[0], create_graph=True)
    with pytest.raises(NotImplementedError, match='QuadMamba: second derivatives'):
        grad.square().sum().backward()


def test_launches_are_known_beforehand():
    """Of all stages, and none of blocks that are others' or are padded."""
    torch.manual_seed(0)
    model = QuadMamba(dict(embed_dims=8, depths=(3, 1, 1, 1)), drop_path_rate=0.5).to(DEVICE).train()
    names = {kernel.__name__ for kernel, *_ in fused.launches_of(
        model.layers, torch.empty(1, 16, 16, 8, device=DEVICE), True)}
    assert {'_scan', '_scan_backward', '_gains', '_select', '_select_backward', '_gelu_backward'} <= names
    assert '_reorder' not in names
    padded = {kernel.__name__ for kernel, *_ in fused.launches_of(
        model.layers, torch.empty(1, 13, 13, 8, device=DEVICE), True)}
    assert '_scan' in padded
    assert '_select' not in padded
    model.layers[0].blocks[0] = nn.Identity()
    del model.layers[2].blocks[0]._modules['mlp']
    fused.launches_of(model.layers, torch.empty(1, 16, 16, 8, device=DEVICE), True)


def test_too_many_ranks_run_by_modules():
    """The scan's kernels take 128; nothing is launched for those blocks, either."""
    block = Block(8, MIXERS['cross'](), 2., 0.).to(DEVICE)
    assert fused.parameters_of(block, *inputs()) is not None
    block.op.dt_projs_weight = nn.Parameter(torch.zeros(4, 16, 129, device=DEVICE))
    block.op.x_proj_weight = nn.Parameter(torch.zeros(4, 131, 16, device=DEVICE))
    assert fused.parameters_of(block, *inputs()) is None


def test_parts_of_larger_parameters():
    block, args = build('cross'), inputs(size=(2, 2))
    expected = outcome(block, args)
    weight = block.op.x_proj_weight
    weight.data = torch.cat([weight.data, weight.data], 1)[:, :weight.shape[1]]
    assert_same(outcome(block, args), expected, 0)
