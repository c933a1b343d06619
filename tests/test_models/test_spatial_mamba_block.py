"""A block of Spatial-Mamba as one autograd function does what its modules do one by one."""
import importlib
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmvssm.kernels import BackendError, use_backend
from mmvssm.kernels._core import triton_support
from mmvssm.kernels._core.replay import Recording, Recordings
from mmvssm.kernels.norm_gate.dispatch import BACKENDS
from mmvssm.models.backbones import SpatialMamba
from mmvssm.models.backbones import spatial_mamba_block as fused
from mmvssm.models.backbones.spatial_mamba import Block, Downsample

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def _why_not():
    with use_backend('triton'):
        return BACKENDS[0].why_not(torch.empty(1, device=DEVICE))


pytestmark = pytest.mark.skipif(_why_not() is not None, reason=f'Triton: {_why_not()}')


@pytest.fixture(autouse=True)
def _triton():
    with use_backend('triton'):
        yield


def on_gpu(*values, **options):
    """A case for a GPU alone: in Triton's interpreter a pass takes seconds, and others show the same of it."""
    return pytest.param(*values, marks=pytest.mark.skipif(DEVICE == 'cpu', reason='slow without a GPU'), **options)


@pytest.fixture
def runs(monkeypatch):
    """How often the function ran."""
    calls, run = [], fused.run
    monkeypatch.setattr(fused, 'run', lambda *args: calls.append(1) or run(*args))
    return calls


def build(dtype=torch.float32, d_state=1, drop_path=0.):
    torch.manual_seed(0)
    block = Block(16, d_state, 2., drop_path)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return block.to(DEVICE, dtype)


def inputs(dtype, autocast=False, branch=True, scale=None, size=(3, 4)):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, *size, 16, generator=g).to(DEVICE, dtype).requires_grad_()
    if not branch:
        return x, None, None
    branch = torch.randn(2, *size, 16, generator=g).to(DEVICE, torch.bfloat16 if autocast else dtype)
    return x, branch.requires_grad_(), None if scale is None else torch.tensor(scale, device=DEVICE)


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
    for name, e in expected.items():
        if e is None:
            assert got[name] is None, name
            continue
        assert got[name].dtype == e.dtype, name
        error = (got[name].double() - e.double()).norm() / e.double().norm().clamp(min=1e-30)
        assert error <= tolerance, (name, error)


@pytest.mark.parametrize(('dtype', 'autocast', 'options', 'drop_path', 'd_state'), [
    (torch.float32, False, dict(), 0., 1),
    on_gpu(torch.float32, False, dict(branch=False), 0., 1),
    on_gpu(torch.float32, False, dict(scale=[0., 2.]), 0.5, 1),
    (torch.float32, False, dict(size=(1, 1)), 0., 2),
    (torch.float32, True, dict(scale=[0., 2.]), 0.5, 1),
    (torch.bfloat16, False, dict(), 0., 1),
    (torch.bfloat16, True, dict(branch=False), 0.5, 1),
], ids=['fp32', 'first', 'drop_path', '1x1_states', 'autocast', 'bf16', 'first_autocast'])
def test_same_as_modules(monkeypatch, runs, dtype, autocast, options, drop_path, d_state):
    block = build(torch.float32 if autocast else dtype, d_state, drop_path)
    args = inputs(dtype, autocast, **options)
    expected = one_by_one(monkeypatch, block, args, autocast)
    assert not runs
    got = outcome(block, args, autocast)
    assert runs
    # In half precision the gradients of weights are rounded once instead of twice.
    assert_same(got, expected, 1e-2 if autocast or dtype == torch.bfloat16 else 1e-5)


def test_inference(monkeypatch, runs):
    block, (x, branch, scale) = build().eval(), inputs(torch.float32)
    with torch.inference_mode():
        got = block(x, branch, scale)
        assert runs
        monkeypatch.setattr(fused, 'parameters_of', lambda *_: None)
        expected = block(x, branch, scale)
    for g, e in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(g, e)


def test_checkpointing_changes_nothing(runs):
    block, args = build(drop_path=0.5), inputs(torch.float32)
    expected = outcome(block, args)
    got = outcome(block, args, call=lambda *a: checkpoint(block, *a, use_reentrant=False))
    assert len(runs) == 3
    assert_same(got, expected, 0)


def test_frozen_parameters_get_no_gradient(monkeypatch, runs):
    block, args = build(), inputs(torch.float32)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_('alpha' in name or 'fc1' in name)
    expected = one_by_one(monkeypatch, block, args)
    assert_same(outcome(block, args), expected, 1e-5)
    assert runs


@pytest.mark.parametrize('change', ['forward_hook', 'pre_hook', 'norm_hook', 'conv_replaced', 'backward_hook',
                                    'replaced', 'approximate_gelu', 'lora', 'subclass', 'parametrized', 'patched',
                                    'bias'])
def test_modules_run_where_that_could_be_told(runs, launches, change):
    block, args, seen = build(), inputs(torch.float32, size=(2, 2)), []
    mixer = block.self_attention
    block(*args)
    assert len(runs) == 1  # what is found out about a block does not outlast a change
    if change == 'forward_hook':
        mixer.out_proj.register_forward_hook(lambda *_: seen.append(1))
    elif change == 'pre_hook':
        mixer.register_forward_pre_hook(lambda *_: seen.append(1))
    elif change == 'norm_hook':
        block.ln_2.register_forward_hook(lambda *_: seen.append(1))
    elif change == 'conv_replaced':
        block.cpe1 = Seen(block.cpe1, seen)
    elif change == 'backward_hook':
        block.mlp.fc2.register_full_backward_hook(lambda *_: seen.append(1))
    elif change == 'replaced':
        mixer.conv2d = Seen(mixer.conv2d, seen)
    elif change == 'approximate_gelu':
        block.mlp.act = nn.GELU(approximate='tanh')
        seen.append(1)
    elif change == 'lora':
        block.mlp.fc1 = Seen(block.mlp.fc1, seen)
    elif change == 'subclass':
        block.__class__ = type('Other', (Block,), dict(convolve=lambda self, *a: seen.append(1) or Block.convolve(*a)))
    elif change == 'patched':
        forward = mixer.out_proj.forward
        mixer.out_proj.forward = lambda x: seen.append(1) or forward(x)
    elif change == 'bias':
        mixer.out_proj.bias = nn.Parameter(torch.zeros(16, device=DEVICE))
        seen.append(1)
    elif change == 'parametrized':
        nn.utils.parametrizations.weight_norm(mixer.in_proj)
        seen.append(1)
    outcome(block, args)
    assert seen
    assert len(runs) == 1


class Seen(nn.Module):
    """Another module in place of one of ours."""

    def __init__(self, module, seen):
        super().__init__()
        self.module, self.seen = module, seen

    def forward(self, *args, **kwargs):
        self.seen.append(1)
        return self.module(*args, **kwargs)


@pytest.fixture
def launches(monkeypatch):
    """The launches of kernels that ran: kernel, grid, constants, and the dtypes of tensors."""
    for room in fused._rooms():
        importlib.import_module(room.__name__)
    seen, launch = [], triton_support.launch

    def spy(kernel, grid, *args, **options):
        if triton_support._local.collected is None:
            seen.append((kernel, grid, args, options))
        if DEVICE != 'cpu' or triton_support._local.collected is not None:  # what they compute is not looked at
            launch(kernel, grid, *args, **options)

    for name, module in list(sys.modules.items()):
        if name.startswith('mmvssm.kernels.') and getattr(module, 'launch', None) is launch:
            monkeypatch.setattr(module, 'launch', spy)
    return seen


def small(drop_path=0.5):
    torch.manual_seed(0)
    return SpatialMamba(dict(embed_dims=16, depths=(3, 1, 1, 1)), drop_path_rate=drop_path).to(DEVICE).train()


@pytest.mark.parametrize('training', [False, True])
def test_launches_are_known_beforehand(launches, training):
    model = small().train(training)
    images = torch.randn(1, 3, 40, 36, device=DEVICE)
    with torch.set_grad_enabled(training):
        x = model.patch_embed(images).permute(0, 2, 3, 1)
        expected = fused.launches_of(model.layers, x, training)
        assert not launches
        loss = sum(output.mean() for output in model(images))
    if training:
        loss.backward()

    def essence(launch):
        kernel, grid, args, options = launch
        return (id(kernel), tuple(grid), tuple(a.dtype if isinstance(a, torch.Tensor) else a for a in args),
                tuple(options.items()))

    assert set(map(essence, launches)) == set(map(essence, expected))


@pytest.mark.skipif(DEVICE == 'cpu', reason='there is no CUDA device, and nothing to compile')
def test_all_is_compiled_before_the_first_pass():
    from triton import knobs
    model, compiled = small(), []
    images = torch.randn(2, 3, 96, 64, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        fused.compile_kernels(model.layers, model.patch_embed(images).permute(0, 2, 3, 1))
        before, knobs.compilation.listener = knobs.compilation.listener, lambda **kwargs: compiled.append(kwargs['src'])
        try:
            sum(output.mean() for output in model(images)).backward()
        finally:
            knobs.compilation.listener = before
    assert not [source.name for source in compiled]


@pytest.mark.parametrize(('change', 'error', 'message'), [
    (dict(branch=lambda t: t[:, :1]), ValueError, 'branch has shape'),
    (dict(branch=lambda t: t.long()), TypeError, 'branch has dtype torch.int64'),
    (dict(scale=lambda t: torch.ones(1, device=DEVICE)), ValueError, 'scale has shape'),
    (dict(x=lambda t: t.repeat(1, 1, 1, 2), branch=lambda t: t.repeat(1, 1, 1, 2)), ValueError,
     'conv_weight has shape'),
], ids=['branch', 'branch_dtype', 'scale', 'channels'])
def test_bad_arguments_are_named(runs, change, error, message):
    block, args = build(), dict(zip(('x', 'branch', 'scale'), inputs(torch.float32, size=(2, 3)), strict=True))
    args.update({name: make(args[name]) for name, make in change.items()})
    with pytest.raises(error, match=message):
        block(**args)
    assert not runs


def test_only_the_branch_needs_a_gradient(monkeypatch, runs):
    block, (x, branch, scale) = build().requires_grad_(False), inputs(torch.float32)
    args = x.detach(), branch, scale
    expected = one_by_one(monkeypatch, block, args)
    got = outcome(block, args)
    assert runs
    assert got['grad_branch'] is not None
    assert_same(got, expected, 1e-5)


def test_another_backend_for_backward_is_refused():
    x, branch, _ = build()(*inputs(torch.float32, size=(2, 2)))
    with use_backend('torch'), pytest.raises(BackendError, match="'torch' is requested for the backward pass"):
        (x.sum() + branch.sum()).backward()


def test_no_second_derivative(runs):
    x, branch, _ = inputs(torch.float32, size=(2, 2))
    y, _, _ = build()(x, branch)
    assert runs
    grad, = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match='second derivatives'):
        grad.square().sum().backward()


def test_other_blocks_are_left_out_of_what_is_compiled_beforehand():
    model = small()
    expected = len(launches_for(model))
    model.layers[1].blocks[0] = nn.Identity()
    del model.layers[2].blocks[0]._modules['mlp']
    nn.utils.parametrizations.weight_norm(model.layers[3].blocks[0].mlp.fc1)
    assert 0 < len(launches_for(model)) < expected


def launches_for(model):
    return fused.launches_of(model.layers, torch.empty(1, 5, 5, 16, device=DEVICE), True)


def test_other_backends_run_modules(runs):
    block, args = build().cpu(), [a if a is None else a.cpu() for a in inputs(torch.float32)]
    with use_backend('torch'):
        block(*args)
    assert not runs


#: Passes until one is repeated from a recording.
TIMES = 1 if DEVICE == 'cpu' else 3


@pytest.fixture
def repeats(monkeypatch):
    """Recordings are made as soon as all kernels have run; how often they ran, by what they compute."""
    calls, run = [], Recording.__call__
    monkeypatch.setattr(fused.function, 'recordings', Recordings(before=0 if DEVICE == 'cpu' else 1))
    monkeypatch.setattr(Recording, '__call__', lambda self, inputs: calls.append(len(inputs)) or run(self, inputs))
    return calls


@pytest.mark.parametrize(('dtype', 'autocast', 'options', 'drop_path'), [
    on_gpu(torch.float32, False, dict(), 0.),
    on_gpu(torch.float32, False, dict(scale=[0., 2.]), 0.5),
    (torch.bfloat16, False, dict(size=(1, 1)), 0.),
    on_gpu(torch.float32, True, dict(branch=False), 0.5),
    (torch.float32, True, dict(scale=[0., 2.]), 0.5),
], ids=['fp32', 'drop_path', 'bf16-1x1', 'first-autocast', 'autocast'])
def test_repeated_is_the_same(monkeypatch, repeats, dtype, autocast, options, drop_path):
    block = build(torch.float32 if autocast else dtype, 1, drop_path)
    args = inputs(dtype, autocast, **options)
    with monkeypatch.context() as patch:
        patch.setattr(fused.function, 'recordings', Recordings(before=1000))
        expected = outcome(block, args, autocast)
        assert not repeats
    for _ in range(TIMES):
        assert_same(outcome(block, args, autocast), expected, 0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # what is read before it is written is NaN
    try:
        assert_same(outcome(block, args, autocast), expected, 0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(repeats) >= 4  # forward and backward, twice
    with torch.inference_mode(), torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        repeats.clear()
        for _ in range(2):
            x, branch, _ = block.eval()(*args)
        assert repeats
    if not drop_path:
        assert torch.equal(x, expected['x'])
        assert torch.equal(branch, expected['branch'])


def eager(block, args, **kwargs):
    """As :func:`outcome`, without recordings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused.function, 'recordings', Recordings(before=1000))
        return outcome(block, args, **kwargs)


def strided(t):
    return torch.stack([t, t], 1)[:, 0]


@pytest.mark.parametrize('change', [
    lambda x, b, s: (x, b, s.bfloat16()), lambda x, b, s: (x.mT.contiguous().mT, b, s), lambda x, b, s: (x, None, None),
    *map(on_gpu, [
        lambda x, b, s: (x, b, strided(s)), lambda x, b, s: (x, b, s[:1].expand(2)),
        lambda x, b, s: (x, b.mT.contiguous().mT, s), lambda x, b, s: (x, b.bfloat16(), s),
        lambda x, b, s: (x, b, torch.cat([s, s, s])[1:3])])],
    ids=['scale_dtype', 'x_strides', 'no_branch', 'scale_strided', 'scale_expanded', 'branch_strides', 'branch_dtype',
         'scale_alignment'])
def test_other_arguments_are_not_repeated_alike(repeats, change):
    block, args = build(), inputs(torch.float32, scale=[0.5, 2.])
    for _ in range(TIMES):
        outcome(block, args)
    assert repeats
    args = change(*args)
    for _ in range(TIMES):
        assert_same(outcome(block, args), eager(block, args), 0)


def other_eps(block):
    block.ln_2.eps = 1e-2


def other_hidden(block):
    torch.manual_seed(5)
    block.mlp = type(block.mlp)(16, 48).to(DEVICE)


def frozen(block):
    block.mlp.fc1.weight.requires_grad_(False)


def transposed(block):
    weight = block.self_attention.in_proj.weight
    weight.data = weight.data.t().contiguous().t()


@pytest.mark.parametrize('change', [other_eps, frozen, on_gpu(other_hidden), on_gpu(transposed)])
def test_other_blocks_are_not_repeated_alike(repeats, change):
    block, args = build(), inputs(torch.float32)
    for _ in range(TIMES):
        outcome(block, args)
    assert repeats
    change(block)
    for _ in range(TIMES):
        assert_same(outcome(block, args), eager(block, args), 0)


@pytest.mark.parametrize('change', [transposed, lambda block: block.half()], ids=['transposed', 'half'])
def test_parameters_that_change_before_backward(repeats, change):
    """They are not read as what they were."""
    block, (x, branch, _) = build(), inputs(torch.float32)

    def late(changed):
        torch.manual_seed(0)
        block.zero_grad()
        y, out, _ = block(x, branch)
        if changed:
            change(block)
        (y.sum() + out.sum()).backward()
        return {name: p.grad for name, p in block.named_parameters()}

    for _ in range(TIMES):
        late(False)
    assert repeats
    expected = late(False)
    if change is transposed:
        assert_same(late(True), expected, 1e-6)
    else:
        with pytest.raises(RuntimeError, match='dtype'):
            late(True)


def test_gradients_of_any_layout_and_again(repeats):
    block, (x, branch, _) = build(), inputs(torch.float32)

    def twice():
        y, out, _ = block(x, branch)
        loss = y.sum() + out.sum()  # expanded gradients
        return [torch.autograd.grad(loss, [x, *block.parameters()], retain_graph=True) for _ in range(2)]

    expected, _ = twice()
    for _ in range(TIMES):
        for grads in twice():
            assert all(map(torch.equal, grads, expected))
    assert repeats


def test_repeated_under_checkpointing_and_hooks(repeats):
    block, args = build(drop_path=0.5), inputs(torch.float32)
    expected = eager(block, args)
    for call in (lambda *a: checkpoint(block, *a, use_reentrant=False), lambda *a: checkpoint(
            block, *a, use_reentrant=True)):
        for _ in range(TIMES):
            assert_same(outcome(block, args, call=call), expected, 0)
    repeats.clear()
    for _ in range(TIMES):
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
            assert_same(outcome(block, args), expected, 0)
    assert repeats


@pytest.mark.parametrize('change', [
    lambda d: d.conv[1].act.register_forward_hook(lambda m, args, y: 2 * y), lambda d: setattr(
        d.conv[0], 'act', nn.GELU()), lambda d: setattr(d.conv[1].conv, 'stride', (1, 1)),
    lambda d: nn.utils.parametrizations.weight_norm(d.conv[0].conv), lambda d: setattr(
        d.conv[2].conv, 'forward', lambda x: x[:, :32]), lambda d: setattr(d.conv[2], 'norm', nn.GroupNorm(2, 32))],
    ids=['hook', 'activation', 'stride', 'parametrized', 'forward', 'norm'])
def test_downsampling_runs_modules_where_that_could_be_told(change, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    torch.manual_seed(0)
    downsample, x = Downsample(16).to(DEVICE), torch.randn(2, 16, 5, 7, device=DEVICE)
    torch.testing.assert_close(downsample(x), downsample.conv(x), rtol=1e-4, atol=1e-5)
    change(downsample)
    torch.testing.assert_close(downsample(x), downsample.conv(x), rtol=1e-4, atol=1e-5)
