"""What holds on a GPU: parity with the authors' models, precision, repeatability, and PyTorch's other features."""
import contextlib
import copy
import gc
import importlib.util
from importlib import import_module

import pytest
import torch
import torch.distributed as dist
from mmengine.registry import MODELS
from test_golden import FEATURES, GRADIENTS, NAMES, error, load, rule
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

from mmvssm.kernels import (
    BackendError,
    column_sums,
    depthwise_conv,
    downsample_conv,
    gelu_backward,
    norm_gate,
    residual_conv_norm,
    selective_scan,
    selective_scan_reference,
    state_fusion,
    use_backend,
)
from mmvssm.kernels._core.cases import relative_error
from mmvssm.kernels._core.recurrence import Recurrence
from mmvssm.kernels._core.replay import Recordings
from mmvssm.kernels.gelu_backward import gelu_backward_reference
from mmvssm.kernels.selective_scan.dispatch import BACKENDS
from mmvssm.models import backbones
from mmvssm.models.backbones import quad_mamba
from mmvssm.models.backbones.quad_mamba import QuadtreeSSM

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no CUDA device')

#: Relative. bfloat16 rounds to 2e-3 (root mean square) of a value, and a network rounds at every layer: on a CPU,
#: too, its features differ by up to 3.5e-2 from those in float32, its gradients by twice as much.
BF16_FEATURES, BF16_GRADIENTS = 5e-2, 1e-1
#: Of the golden gradients. Signs that flip before ReLUs move them by 0.11 in float32 where but the image is rounded to
#: bfloat16, by 0.18 where the weights are; with the ReLUs' signs held, autocast moves them by 0.05, else by 0.22.
BF16_BEHIND_RELUS = 3e-1
ARCH = dict(embed_dims=16, depths=(1, 1, 1, 1))
GIB = 2**30


@pytest.fixture(autouse=True)
def _full_float32():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def _deterministic(monkeypatch):
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def build(name='SpatialMamba', arch=None, **kwargs):
    torch.manual_seed(0)
    return MODELS.build(dict(type=name, arch=arch or ARCH, **kwargs)).cuda()


def image(height=96, width=64, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1)).cuda()


class Windows:
    """Those that QuadMamba's blocks select: noted in one pass, selected again in the next. Where windows score alike,
    roundings choose another, whose features are others."""

    def __init__(self, monkeypatch):
        self._noted, self._given = [], None
        in_modules = quad_mamba.select_window

        def select_window(logits, sample):
            selected = in_modules(logits, sample)
            return self._next(selected.detach()) + (selected - selected.detach())

        monkeypatch.setattr(quad_mamba, 'select_window', select_window)
        if importlib.util.find_spec('triton'):
            from mmvssm.kernels.quadtree import selection
            in_kernel = selection.select

            def select(*args):
                selected, soft = in_kernel(*args)
                return self._next(selected), soft

            monkeypatch.setattr(selection, 'select', select)
        # A recording would go on with what its kernels select.
        monkeypatch.setattr(quad_mamba.fused.function, 'recordings', Recordings(before=1000))

    def _next(self, selected):
        if self._given is None:
            self._noted.append(selected)
            return selected
        return next(self._given)

    @contextlib.contextmanager
    def again(self):
        """Blocks select what was noted, all of it."""
        self._given = iter(self._noted)
        yield
        assert next(self._given, None) is None


@pytest.fixture
def windows(monkeypatch):
    return Windows(monkeypatch)


def train_step(model, images, dtype=None):
    """Maps and gradients of one step, with the same random numbers each time."""
    torch.manual_seed(2)
    model.zero_grad(set_to_none=True)
    with torch.autocast('cuda', dtype, enabled=dtype is not None):
        features = model(images)
    sum(f.float().square().mean() for f in features).backward()
    return [f.detach() for f in features], [p.grad for p in model.parameters()]


def assert_same_bits(got, expected):
    for g, e in zip(got, expected, strict=True):
        for a, b in zip(g, e, strict=True):
            assert torch.equal(a, b)


def distance(got, expected):
    """Relative, of tensors or of lists of them taken together; on their device, for large ones."""
    got, expected = ([t] if isinstance(t, torch.Tensor) else list(t) for t in (got, expected))
    square = sum((g.float() - e.float()).square().sum(dtype=torch.float64)
                 for g, e in zip(got, expected, strict=True))
    norm = sum(e.float().square().sum(dtype=torch.float64) for e in expected)
    return (square / norm).sqrt().item() if norm else square.sqrt().item()


def assert_close(got, expected, features, gradients):
    """Of two results of :func:`train_step`."""
    for g, e in zip(got[0], expected[0], strict=True):
        assert distance(g, e) <= features
    assert distance(got[1], expected[1]) <= gradients


def test_triton_is_the_choice():
    """Nothing below asks for a backend, and these tests are about that of GPUs."""
    reason = BACKENDS[0].why_not(torch.empty(1, device='cuda'))
    assert (BACKENDS[0].name, reason) == ('triton', None)


# Parity with the authors' models and CUDA kernels


@pytest.mark.parametrize('dtype', [None, torch.bfloat16], ids=['fp32', 'bf16'])
@pytest.mark.parametrize('name', NAMES)
def test_golden_features(name, dtype, windows):
    """In bfloat16 with the windows that float32 selects."""
    model, images, expected, _ = load(name)
    model, images = model.cuda().eval(), images.cuda()
    with torch.inference_mode():
        features = model(images)
        if dtype:
            with windows.again(), torch.autocast('cuda', dtype):
                features = model(images)
    errors = [error(f.float().cpu(), expected[f'eval_feat{i}']) for i, f in enumerate(features)]
    assert max(errors) <= (BF16_FEATURES if dtype else FEATURES), errors


@pytest.mark.parametrize('dtype', [None, torch.bfloat16], ids=['fp32', 'bf16'])
@pytest.mark.parametrize('name', ['spatialmamba_micro', 'quadmamba_micro'])
def test_golden_gradients(name, dtype, windows):
    """In float32 each gradient is judged on its own. In bfloat16, with the windows that float32 selects, those that
    come through no ReLU are one vector, off by as much as ``test_gradients_in_bf16`` allows: an operator's may be by
    3 * 8e-3, and a network has many. Behind ReLUs they jump where a rounding takes a number across zero: for all
    together ``BF16_BEHIND_RELUS`` holds."""
    model, images, expected, _ = load(name, norm_eval=True, drop_path_rate=0.)
    model.cuda().train()
    images = images.cuda().requires_grad_()
    for module in model.modules():
        if isinstance(module, QuadtreeSSM):
            module.training = False  # the golden files have the best window, not a sampled one
    features = model(images)
    if dtype:
        with windows.again(), torch.autocast('cuda', dtype):
            features = model(images)
    loss = sum((f * torch.from_numpy(rule.cotangent(name, i, f.shape)).cuda()).sum() / f.numel()
               for i, f in enumerate(features))
    loss.backward()
    for i, feature in enumerate(features):
        off = error(feature.detach().float().cpu(), expected[f'train_feat{i}'])
        assert off <= (BF16_FEATURES if dtype else FEATURES)
    grads = {n: p.grad.cpu() for n, p in [*model.named_parameters(), ('image', images)]}
    if dtype:
        golden = {n: torch.from_numpy(expected[f'grad:{n}']) for n in grads}
        smooth = [n for n in grads if n.startswith(('layers.3.', 'outnorm'))]
        assert len(smooth) > 20
        assert distance([grads[n] for n in smooth], [golden[n] for n in smooth]) <= BF16_GRADIENTS
        most = BF16_BEHIND_RELUS if name.startswith('spatialmamba') else BF16_GRADIENTS  # QuadMamba has none
        assert distance(grads.values(), golden.values()) <= most
    else:
        assert loss.item() == pytest.approx(float(expected['loss']), rel=1e-4)
        errors = {n: error(grad, expected[f'grad:{n}']) for n, grad in grads.items()}
        assert {n: e for n, e in errors.items() if not e <= GRADIENTS} == {}


# Training


@pytest.mark.usefixtures('_deterministic')
@pytest.mark.parametrize('dtype', [None, torch.bfloat16], ids=['fp32', 'bf16'])
@pytest.mark.parametrize('name', backbones.__all__)
def test_deterministic_algorithms(name, dtype):
    """Every step of forward and backward has one, and two runs give equal bits."""
    first, second = (train_step(build(name, drop_path_rate=0.2), image(), dtype) for _ in range(2))
    assert_same_bits(second, first)


@pytest.mark.parametrize('name', backbones.__all__)
def test_gradients_in_bf16(name, windows):
    """With the windows that float32 selects."""
    model = build(name).eval()
    expected = train_step(model, image())
    with windows.again():
        got = train_step(model, image(), torch.bfloat16)
    assert_close(got, expected, BF16_FEATURES, BF16_GRADIENTS)


@pytest.mark.parametrize('name', backbones.__all__)
def test_fp16_with_loss_scaling(name):
    model, images = build(name), image()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    scaler = torch.amp.GradScaler('cuda', init_scale=2.**10)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast('cuda', torch.float16):
            loss = sum(f.float().square().mean() for f in model(images))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert all(p.grad.isfinite().all() for p in model.parameters())
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.**10
    still = [n for n, p in model.named_parameters() if p.grad.any() and torch.equal(p, before[n])]
    assert still == []


@pytest.mark.usefixtures('_deterministic')
@pytest.mark.parametrize('dtype', [None, torch.bfloat16], ids=['fp32', 'bf16'])
@pytest.mark.parametrize('name', backbones.__all__)
def test_checkpointing_changes_nothing(name, dtype):
    got = train_step(build(name, with_cp=True, drop_path_rate=0.5), image(), dtype)
    assert_same_bits(got, train_step(build(name, drop_path_rate=0.5), image(), dtype))


def test_checkpointing_saves_memory():
    peaks = []
    for with_cp in (False, True):
        model, images = build(arch='tiny', with_cp=with_cp), image(224, 224, 16)
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        train_step(model, images, torch.bfloat16)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del model
    assert peaks[1] < 0.85 * peaks[0]


def test_no_kernel_is_compiled_for_another_size(monkeypatch):
    """Multi-scale training compiles for the first image, not for each size."""
    knobs = pytest.importorskip('triton').knobs
    model, built = build(), []
    for height, width in [(256, 320), (272, 304), (257, 323), (304, 288), (288, 352)]:
        train_step(model, image(height, width), torch.bfloat16)
        if knobs.runtime.jit_post_compile_hook is None:
            monkeypatch.setattr(knobs.runtime, 'jit_post_compile_hook',
                                lambda *args, **kwargs: built.append(kwargs['repr']))
    assert built == []


@pytest.mark.usefixtures('_deterministic')
@pytest.mark.parametrize('communication', ['nccl', 'gloo'])
@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('name', backbones.__all__)
def test_distributed(name, communication, with_cp, tmp_path):
    if communication == 'nccl' and not dist.is_nccl_available():
        pytest.skip('this PyTorch has no NCCL')
    dist.init_process_group(communication, init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = build(name, drop_path_rate=0.2, with_cp=with_cp)
        expected = train_step(copy.deepcopy(model), image(), torch.bfloat16)
        got = train_step(DistributedDataParallel(model, device_ids=[0]), image(), torch.bfloat16)
        assert_same_bits(got, expected)
    finally:
        dist.destroy_process_group()


# CUDA graphs


def captured(function):
    """The CUDA graph of ``function`` and its static results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@pytest.mark.parametrize('name', backbones.__all__)
@pytest.mark.parametrize('dtype', [None, torch.bfloat16], ids=['fp32', 'bf16'])
def test_cuda_graph_of_inference(name, dtype):
    model, images = build(name).eval(), image()

    def infer():
        with torch.no_grad(), torch.autocast('cuda', dtype, enabled=dtype is not None):
            return model(images)

    graph, results = captured(infer)
    for seed in range(2):
        images.copy_(torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert_same_bits([results], [infer()])


@pytest.mark.usefixtures('_deterministic')
@pytest.mark.parametrize('name', backbones.__all__)
@pytest.mark.parametrize('dtype', [None, torch.bfloat16], ids=['fp32', 'bf16'])
def test_cuda_graph_of_training(name, dtype):
    model, images = build(name, norm_eval=True), image()
    if name == 'QuadMamba':
        model.eval()  # in training each replay samples other windows

    def step():
        with torch.autocast('cuda', dtype, enabled=dtype is not None):
            loss = sum(f.float().square().mean() for f in model(images))
        return torch.autograd.grad(loss, list(model.parameters()))

    graph, results = captured(step)
    for seed in range(2):
        images.copy_(torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert_same_bits([results], [step()])


# The compiler


#: Height and width one after the other; the second makes them variable. The maps of a stage have either all more
#: than 32 tokens or none: one chunk of the scan is a case of its own.
SIZES = [(96, 64), (80, 96), (72, 92), (64, 120)]


def compiled(model, **options):
    """The model without graph breaks, and the counter of its compilations."""
    counter = CompileCounterWithBackend('inductor')
    return torch.compile(model, backend=counter, fullgraph=True, **options), counter


def test_compiled_inference():
    model = build().eval()
    fast, counter = compiled(model)
    for n, size in enumerate(SIZES):
        images = image(*size, batch=2 + n)
        with torch.no_grad(), torch.autocast('cuda', torch.bfloat16):
            assert distance(fast(images), model(images)) <= BF16_FEATURES
        assert counter.frame_count == min(n + 1, 2), size


def test_compiled_training():
    model = build()
    other = copy.deepcopy(model)
    fast, counter = compiled(model)
    for n, size in enumerate(SIZES):
        images = image(*size, batch=2 + n)
        assert_close(train_step(fast, images), train_step(other, images), 1e-4, 1e-3)
        assert counter.frame_count == min(n + 1, 2), size


def test_compiled_quad_mamba():
    """In float32, where windows are the same. In training the compiler draws others than PyTorch, by the same seed."""
    model = build('QuadMamba').eval()
    other = copy.deepcopy(model)
    fast, counter = compiled(model, **model.compile_options)
    for n, size in enumerate([(96, 64), (72, 92)]):  # the second is padded
        assert_close(train_step(fast, image(*size)), train_step(other, image(*size)), 1e-4, 1e-3)
        assert counter.frame_count == n + 1, size
    model.train()
    first, second = (train_step(fast, image()) for _ in range(2))
    assert_same_bits(second[:1], first[:1])
    assert all(g.isfinite().all() for g in first[1])


def test_compiled_in_place():
    """As the one backbone of a detector; BatchNorm as in evaluation, whose statistics would magnify roundings."""
    model = build(norm_eval=True)
    names = set(model.state_dict())
    expected = train_step(model, image(), torch.bfloat16)
    counter = CompileCounterWithBackend('inductor')
    model.compile(backend=counter, fullgraph=True)
    assert_close(train_step(model, image(), torch.bfloat16), expected, BF16_FEATURES, BF16_GRADIENTS)
    assert counter.frame_count == 1
    assert set(model.state_dict()) == names


# Extreme inputs


@pytest.mark.parametrize('dtype', [None, torch.bfloat16], ids=['fp32', 'bf16'])
@pytest.mark.parametrize('scale', [0., 1e-6, 1e4])
def test_extreme_images(scale, dtype):
    model = build(norm_eval=True)
    features, grads = train_step(model, scale * image(), dtype)
    assert all(f.isfinite().all() for f in features)
    assert all(g.isfinite().all() for g in grads)


def scan_inputs(batch, length, dim, dtype, rank=4, d_state=1):
    generator = torch.Generator('cuda').manual_seed(0)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator, device='cuda', dtype=dtype)

    return dict(x=normal(batch, length, dim, dtype=dtype), dt=normal(batch, length, rank, dtype=dtype),
                A=-torch.exp(0.5 * normal(dim, d_state)), B=normal(batch, length, d_state, dtype=dtype),
                dt_weight=normal(dim, rank) * 0.5, dt_bias=normal(dim) - 4)


def gradients(function, tensors, dtype=None):
    """The output and the gradients by name, for a random cotangent, rounded to ``dtype`` if that is not the output's.
    """
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    output = function(**leaves)
    cotangent = torch.randn(output.shape, generator=torch.Generator('cuda').manual_seed(1), device='cuda')
    cotangent = cotangent.to(dtype or output.dtype).to(output.dtype)
    grads = torch.autograd.grad(output, list(leaves.values()), cotangent)
    return dict(output=output.detach(), **dict(zip(leaves, grads, strict=True)))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=['fp32', 'bf16'])
@pytest.mark.parametrize('change', [
    dict(dt=300), dict(dt=-300), dict(x=0), dict(B=0), dict(dt=0), dict(x=1e4), dict(x=1e4, B=1e4), dict(A=1e-6),
    dict(A=1e4)], ids=str)
def test_extreme_scans_are_finite(change, dtype):
    tensors = {name: t * change.get(name, 1) for name, t in scan_inputs(2, 1000, 40, dtype).items()}
    for name, result in gradients(selective_scan, tensors).items():
        assert result.isfinite().all(), name


FLOATS = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
WITHOUT_FP16 = ('fp32', 'bf16')
EXTREMES = dict(zeros=torch.zeros_like, ones=torch.ones_like, large=lambda t: 1e4 * t.sign())
#: Cases of operators, what of them becomes extreme, and the precisions that hold what comes of it.
EXTREME_CALLS = [
    ('state_fusion', '13x9', 'h x', FLOATS),
    ('state_fusion', '13x9', 'C', FLOATS),
    ('state_fusion', '13x9', 'h C x', WITHOUT_FP16),
    ('depthwise_conv', '7x7', 'x', FLOATS),
    ('depthwise_conv', '7x7', 'x bias', FLOATS),
    # SiLU; without a large bias some of the large sums would cancel before it, and float32 with them
    ('depthwise_conv', '13x9', 'x bias', FLOATS),
    ('depthwise_conv', 'silu-residual', 'x bias', FLOATS),
    ('residual_conv_norm', '7x7', 'x branch', FLOATS),
    ('residual_conv_norm', '7x7', 'branch', FLOATS),
    ('residual_conv_norm', '7x7', 'x branch conv_bias', FLOATS),
    ('downsample_conv', '13x9', 'x', FLOATS),
    ('downsample_conv', '8x6', 'x bias', FLOATS),
    ('norm_gate', 'dim_128', 'x', FLOATS),
    ('norm_gate', 'dim_128', 'z', WITHOUT_FP16),
    ('norm_gate', 'dim_128', 'x z', FLOATS),
]


@pytest.mark.parametrize('extreme', EXTREMES)
@pytest.mark.parametrize('op, case, names, dtype', [
    pytest.param(*call, FLOATS[dtype], id='-'.join((*call, dtype)).replace(' ', '_'))
    for *call, dtypes in EXTREME_CALLS for dtype in dtypes])
def test_extreme_activations(op, case, names, dtype, extreme):
    """Outputs, image by image, and gradients are those of the reference in float64. Stencils have small weights:
    float16 would not hold the sums of others."""
    cases = import_module(f'mmvssm.kernels.{op}.cases')
    case = cases.CASES[case]
    tensors = cases.inputs(case, dtype, 'cuda')
    for name, t in tensors.items():
        if name in names.split():
            tensors[name] = EXTREMES[extreme](t)
        elif t.shape[1:] == (1, 3, 3):
            tensors[name] = t / 32
    got = gradients(lambda **tensors: cases.operator(case, tensors), tensors)
    expected = gradients(lambda **tensors: cases.reference(case, tensors),
                         {name: t.double() for name, t in tensors.items()}, dtype)
    for name, result in got.items():
        assert result.isfinite().all(), name
        # of the residual convolution, the result and its norm
        parts = zip(result, expected[name], strict=True) if name == 'output' else [(result, expected[name])]
        for part, exact in parts:
            assert relative_error(part, exact) <= cases.TOLERANCES[part.dtype][name], name


@pytest.mark.parametrize('dtype', FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize('names', ['x', 'grad', 'grad x'], ids=lambda names: names.replace(' ', '_'))
@pytest.mark.parametrize('extreme', EXTREMES)
def test_extreme_gelu_backward(extreme, names, dtype):
    generator = torch.Generator('cuda').manual_seed(0)
    tensors = {name: torch.randn(300, 48, generator=generator, device='cuda').to(dtype) for name in ('grad', 'x')}
    tensors.update({name: EXTREMES[extreme](tensors[name]) for name in names.split()})
    tolerances = import_module('mmvssm.kernels.norm_gate.cases').TOLERANCES
    exact = gelu_backward_reference(**{name: t.double() for name, t in tensors.items()})
    for name, result, expected in zip(('x', 'output', 'bias'), gelu_backward(**tensors), exact, strict=True):
        assert result.isfinite().all(), name
        assert relative_error(result, expected) <= tolerances[result.dtype][name], name


def test_too_many_ranks():
    pytest.importorskip('triton')
    most = import_module('mmvssm.kernels.selective_scan.triton.blocks').MOST_RANKS
    tensors = scan_inputs(1, 40, 16, torch.float32, rank=most + 1)
    assert most == 128
    with use_backend('triton'), pytest.raises(BackendError, match='takes dt of rank 1 to 128, got 129'):
        selective_scan(**tensors)


# Large maps


def need(gib):
    gc.collect()
    torch.cuda.empty_cache()  # what PyTorch keeps of earlier tests does not count as free
    free, _ = torch.cuda.mem_get_info()
    if free < gib * GIB:
        pytest.skip(f'{gib} GiB of GPU memory are needed, {free / GIB:.0f} are free')


def test_scan_of_a_4096x4096_map():
    """Compared with the recurrence in float64 on some of its channels, which do not depend on each other."""
    need(20)
    tensors = scan_inputs(1, 4096 * 4096, 16, torch.bfloat16)
    results = gradients(selective_scan, tensors)
    assert all(result.isfinite().all() for result in results.values())
    y = results['output'][0, :, 0]
    del results
    some = [0, 5, 15]
    wide = {name: t.double() if name in ('dt', 'B') else (t[..., some] if name == 'x' else t[some]).double()
            for name, t in tensors.items()}
    with torch.no_grad():
        expected = selective_scan_reference(**wide, recurrence=Recurrence.apply)[0, :, 0]
    assert distance(y[:, some], expected) <= 8e-3


def ends_alike(operator, x, others, parameters, rows=64, margin=5):
    """Check ``operator(x, *others, *parameters)`` on a map that is 0 but for its last ``rows``, as is the
    cotangent: output and gradients are as on a map of twice these rows. Of the rows the first ``margin``
    see more and are left out."""
    results = []
    for height in (x.shape[1], 2 * rows):
        maps = [t[:, -height:].detach().requires_grad_() for t in (x, *others)]
        vectors = [t.detach().requires_grad_() for t in parameters]
        y = operator(*maps, *vectors)
        cotangent = torch.zeros_like(y)
        generator = torch.Generator('cuda').manual_seed(3)
        end = cotangent[:, -rows + margin:]
        end.copy_(torch.randn(end.shape, generator=generator, device='cuda'))
        grads = torch.autograd.grad(y, [*maps, *vectors], cotangent)
        results.append([y[:, -rows + margin:].detach().clone(),
                        *(g[:, -rows:].clone() for g in grads[:len(maps)]), *grads[len(maps):]])
        del y, cotangent, end, grads
    for full, alone in zip(*results, strict=True):
        assert full.isfinite().all()
        assert alone.float().norm() > 0
        assert distance(full, alone) <= 8e-3


@pytest.mark.parametrize('operator', ['selective_scan', 'state_fusion', 'depthwise_conv', 'norm_gate',
                                      'residual_conv_norm', 'downsample_conv'])
def test_tensors_of_2_to_the_31_elements(operator):
    """Offsets of 32 bits would overflow in the middle."""
    need(50)
    side, dim, rows = 4096, 128, 64
    assert side * side * dim == 2**31
    generator = torch.Generator('cuda').manual_seed(0)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator, device='cuda', dtype=dtype)

    x = torch.zeros(1, side, side, dim, device='cuda', dtype=torch.bfloat16)
    x[:, -rows:] = normal(1, rows, side, dim)
    tokens = [normal(1, side, side, n, dtype=torch.bfloat16) for n in (4, 1)]
    vector, kernel = [normal(dim) for _ in range(3)], [normal(dim, 1, 3, 3) for _ in range(3)]
    if operator == 'selective_scan':
        def scan(x, dt, B, A, weight, bias):
            return selective_scan(x.flatten(1, 2), dt.flatten(1, 2), -A.exp(), B.flatten(1, 2), dt_weight=weight,
                                  dt_bias=bias).view(x.shape)

        ends_alike(scan, x, tokens, [normal(dim, 1), normal(dim, 4), vector[0]], rows, margin=0)
    elif operator == 'state_fusion':
        def fusion(x, C, D, alpha, *kernels):
            return state_fusion(x.unsqueeze(3), C, x, D, kernels, alpha)

        ends_alike(fusion, x, tokens[1:], [vector[0], normal(3), *kernel], rows)
    elif operator == 'depthwise_conv':
        ends_alike(lambda x, w, b: depthwise_conv(x, w, b, activation='silu'), x, [], [kernel[0], vector[0]], rows)
    elif operator == 'norm_gate':
        ends_alike(norm_gate, x, [x], vector[:2], rows)
    elif operator == 'downsample_conv':
        # As large a map again: the rows of the result that are compared are those of the map.
        ends_alike(lambda x, w, b: downsample_conv(x, w, b).repeat_interleave(2, 1), x, [], [kernel[0], vector[0]],
                   rows)
    else:
        ends_alike(lambda x, branch, *args: residual_conv_norm(x, *args, branch)[1], x, [x],
                   [kernel[0], *vector], rows)


def test_gelu_backward_of_2_to_the_31_elements():
    """Both ends are as without the zeros between them, the sums as well."""
    need(20)
    dim, end = 128, 64
    rows = 2**31 // dim + end
    generator = torch.Generator('cuda').manual_seed(0)
    tensors = []
    for _ in range(2):
        full = torch.zeros(rows, dim, device='cuda', dtype=torch.bfloat16)
        for part in (full[:end], full[-end:]):
            part.normal_(generator=generator)
        tensors.append(full)
    assert tensors[0].numel() > 2**31
    both = [torch.cat([t[:end], t[-end:]]) for t in tensors]
    *results, sums = gelu_backward(*tensors)
    *expected, expected_sums = gelu_backward(*both)
    for full, alone in zip(results, expected, strict=True):
        assert not full[end:-end].any()
        for part, other in zip((full[:end], full[-end:]), alone.split(end), strict=True):
            assert other.float().norm() > 0
            assert distance(part, other) <= 8e-3
    assert distance(sums, expected_sums) <= 1e-5
    assert distance(column_sums(tensors[1]), column_sums(both[1])) <= 1e-5


def test_batches_beyond_2_to_the_31_elements():
    need(30)
    batch, length, dim = 40, 2**19, 128
    assert batch * length * dim > 2**31
    tensors = scan_inputs(2, length, dim, torch.bfloat16)
    parameters = {name: t for name, t in tensors.items() if name in ('A', 'dt_weight', 'dt_bias')}
    activations = {name: t for name, t in tensors.items() if name not in parameters}
    with torch.inference_mode():
        expected = selective_scan(**activations, **parameters)
        h = selective_scan(**{name: t.repeat(batch // 2, 1, 1) for name, t in activations.items()}, **parameters)
        for pair in h.split(2):
            assert distance(pair, expected) <= 8e-3
