"""``torch.compile``, distributed training and gradient checkpointing on the CPU; test_gpu.py has the GPU's part."""
import copy

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

from mmvssm.models.backbones import QuadMamba, SpatialMamba

ARCH = dict(embed_dims=16, depths=(1, 1, 1, 1))
FAMILIES = [SpatialMamba, QuadMamba]
#: Batch, height and width of images one after the other. All differ between the first and the second, so that none
#: is taken for constant. The maps of a stage have either all more than 32 tokens or none: one chunk of the scan is
#: a case of its own.
SHAPES = [(2, 64, 96), (3, 96, 64), (4, 65, 84), (5, 72, 88)]
#: Graphs after each of them: the second makes the sizes variable. QuadMamba pads the third, which is another case.
GRAPHS = {SpatialMamba: [1, 2, 2, 2], QuadMamba: [1, 2, 3, 3]}


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(family=SpatialMamba, **kwargs):
    torch.manual_seed(0)
    return family(ARCH, **kwargs)


def image(batch, height, width):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def step(model, images):
    """Maps and gradients, with the same random numbers each time."""
    torch.manual_seed(2)
    model.zero_grad()
    features = model(images)
    sum(f.square().mean() for f in features).backward()
    return [f.detach() for f in features], [p.grad for p in model.parameters()]


def assert_equal(got, expected, **tolerance):
    for g, e in zip(got, expected, strict=True):
        for a, b in zip(g, e, strict=True):
            torch.testing.assert_close(a, b, **tolerance)


def compiled(model):
    """The model compiled without graph breaks, and the counter of its compilations."""
    counter = CompileCounterWithBackend('aot_eager')
    return torch.compile(model, backend=counter, fullgraph=True), counter


@pytest.mark.parametrize('family', FAMILIES)
def test_no_graph_break(family):
    model = build(family).eval()
    fast, counter = compiled(model)
    with torch.no_grad():
        assert_equal([fast(image(2, 64, 64))], [model(image(2, 64, 64))])
    assert counter.frame_count == 1


@pytest.mark.parametrize('family', FAMILIES)
def test_inference_has_one_graph_for_all_sizes(family):
    model = build(family).eval()
    fast, counter = compiled(model)
    for shape, graphs in zip(SHAPES, GRAPHS[family], strict=True):
        with torch.no_grad():
            assert_equal([fast(image(*shape))], [model(image(*shape))])
        assert counter.frame_count == graphs, shape


def test_sizes_are_compiled_once_more_when_they_first_change():
    """Those that change together, once."""
    fast, counter = compiled(build().eval())
    for shape, graphs in (((2, 256, 256), 1), ((2, 320, 256), 2), ((3, 288, 352), 3), ((4, 416, 384), 3)):
        with torch.no_grad():
            fast(image(*shape))
        assert counter.frame_count == graphs, shape


@pytest.mark.parametrize('family', FAMILIES)
def test_training_has_one_graph_for_all_sizes(family):
    model = build(family, drop_path_rate=0.2)
    other = copy.deepcopy(model)
    fast, counter = compiled(model)
    for shape, graphs in zip(SHAPES, GRAPHS[family], strict=True):
        assert_equal(step(fast, image(*shape)), step(other, image(*shape)), rtol=1e-4, atol=1e-6)
        assert counter.frame_count == graphs, shape


def test_autocast():
    model = build().eval()
    fast, counter = compiled(model)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert_equal([fast(image(2, 64, 64))], [model(image(2, 64, 64))])
    assert counter.frame_count == 1


def test_compiled_in_place():
    """A backbone inside of a larger model, its parameters keeping their names."""
    model = torch.nn.ModuleDict(dict(backbone=build()))
    names = set(model.state_dict())
    expected = step(copy.deepcopy(model.backbone), image(2, 64, 64))
    counter = CompileCounterWithBackend('aot_eager')
    model.backbone.compile(backend=counter, fullgraph=True)
    assert set(model.state_dict()) == names
    assert_equal(step(model.backbone, image(2, 64, 64)), expected, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 1


def test_with_checkpointing():
    model = build(with_cp=True, drop_path_rate=0.2)
    expected = step(copy.deepcopy(model), image(2, 64, 64))
    images = image(2, 64, 64)
    assert_equal(step(build(drop_path_rate=0.2), images), expected)
    fast, counter = compiled(model)
    assert_equal(step(fast, images), expected, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 1


@pytest.fixture
def _process_group(tmp_path):
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures('_process_group')
@pytest.mark.parametrize('with_cp', [False, True])
@pytest.mark.parametrize('family', FAMILIES)
def test_distributed(family, with_cp):
    model = build(family, with_cp=with_cp, drop_path_rate=0.2)
    expected = step(copy.deepcopy(model), image(2, 64, 64))
    got = step(DistributedDataParallel(model), image(2, 64, 64))
    assert_equal(got, expected)


@pytest.mark.usefixtures('_process_group')
def test_distributed_and_compiled():
    model = build()
    expected = step(copy.deepcopy(model), image(2, 64, 64))
    model.compile(backend='aot_eager', fullgraph=True)
    assert_equal(step(DistributedDataParallel(model), image(2, 64, 64)), expected, rtol=1e-4, atol=1e-6)
