"""Under FSDP, where a block's parameters are parts of one flat tensor, blocks run as one function all the same."""
import copy
from importlib import import_module

import pytest
import torch
import torch.distributed as dist
from mmengine.registry import MODELS
from torch.distributed.fsdp import FullyShardedDataParallel

from mmvssm.engine.fsdp import wrap_blocks
from mmvssm.kernels import use_backend
from mmvssm.kernels.norm_gate.dispatch import BACKENDS

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
MODULES = dict(SpatialMamba='spatial_mamba_block', QuadMamba='quad_mamba_block')


def _why_not():
    with use_backend('triton'):
        return BACKENDS[0].why_not(torch.empty(1, device=DEVICE))


pytestmark = pytest.mark.skipif(_why_not() is not None, reason=f'Triton: {_why_not()}')


@pytest.fixture(autouse=True)
def _process_group(tmp_path):
    communication = 'nccl' if DEVICE == 'cuda' else 'gloo'
    dist.init_process_group(communication, init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def runs(monkeypatch):
    """How often the functions ran."""
    calls = []
    for name in MODULES.values():
        fused = import_module(f'mmvssm.models.backbones.{name}')
        monkeypatch.setattr(fused, 'run', lambda *args, run=fused.run: calls.append(1) or run(*args))
    return calls


def step(model, backend):
    """The map of a step of training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    torch.manual_seed(2)
    with use_backend(backend):
        y, = model(images)
        y[:, ::2].square().mean().backward()
    optimizer.step()
    return y.detach()


# Triton's interpreter takes its time.
@pytest.mark.parametrize('name, use_orig_params', [('SpatialMamba', True)] + (DEVICE == 'cuda') * [
    ('SpatialMamba', False), ('QuadMamba', True), ('QuadMamba', False)], ids=str)
def test_trains_as_without(name, use_orig_params, runs):
    torch.manual_seed(0)
    model = MODELS.build(dict(type=name, arch=dict(embed_dims=8, depths=(1, 1, 1, 1)), out_indices=0)).to(DEVICE)
    before = [p.detach().clone() for p in model.parameters()]
    wrapped = FullyShardedDataParallel(
        copy.deepcopy(model), auto_wrap_policy=wrap_blocks, use_orig_params=use_orig_params,
        device_id=torch.device('cuda', 0) if DEVICE == 'cuda' else torch.device('cpu'))
    torch.testing.assert_close(step(wrapped, 'triton'), step(model, 'torch'), rtol=1e-4, atol=1e-4)
    # Parameters that are flat and nothing else are not to be found in the modules, which are called one by one then.
    assert len(runs) == use_orig_params
    if use_orig_params:
        with FullyShardedDataParallel.summon_full_params(wrapped):
            for first, expected, got in zip(before, model.parameters(), wrapped.parameters(), strict=True):
                torch.testing.assert_close(got - first, expected - first, rtol=1e-3, atol=1e-5)
