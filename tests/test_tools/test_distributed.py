"""Training on two processes, as configured: their gradients, DDP's static graph, FSDP. On CPUs, by gloo.

The checks themselves are in distributed_worker.py; they share one start of two processes.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from distributed_worker import CHECKS
from mmengine.config import Config
from mmengine.registry import MODELS, STRATEGIES
from torch import nn

from mmvssm.engine.config import UsageError
from mmvssm.engine.fsdp import wrap_blocks
from mmvssm.models import backbones

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / 'configs'


@pytest.fixture(scope='module')
def ranks(tmp_path_factory):
    """What each check found, by rank."""
    folder = tmp_path_factory.mktemp('distributed')
    run = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
         str(HERE / 'distributed_worker.py'), str(folder)],
        capture_output=True, text=True, timeout=600, env=dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES=''))
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads((folder / f'rank{rank}.json').read_text()) for rank in range(2)]


@pytest.mark.parametrize('check', [name for name in CHECKS if name.startswith('gradients-')])
def test_gradients_are_those_of_one_process_on_the_joined_batch(ranks, check):
    for results in ranks:
        assert results[check] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize('check', [name for name in CHECKS if name.startswith('trained-')])
def test_trains_with_the_configured_wrapper(ranks, check):
    """With a static graph, also where a rank has images without objects."""
    for results in ranks:
        assert results[check] == dict(equal=True, finite=True, moved=True)


class TestFSDP:

    @pytest.fixture
    def results(self, ranks):
        for rank in ranks:
            assert isinstance(rank['fsdp'], dict), rank['fsdp']
        return [rank['fsdp'] for rank in ranks]

    def test_trains_as_ddp(self, results):
        for result in results:
            assert result['moved'] > 1e-3
            assert result['like_ddp'] < 1e-3 * result['moved']

    def test_goes_on_where_it_stopped(self, results):
        assert all(result['resumed'] for result in results)

    def test_parameters_are_shared(self, results):
        assert [result['share'] for result in results] == pytest.approx([0.5, 0.5], abs=0.01)

    def test_rates_decay_by_layer(self, results):
        for result in results:
            fsdp, ddp = result['rates']
            assert fsdp == ddp
            assert len(fsdp) == 6
            assert result['base_lr'] == pytest.approx([0.1] * 3)

    @pytest.mark.parametrize('name', backbones.__all__)
    def test_wraps_blocks(self, name):
        model = MODELS.build(dict(type=name, arch=dict(embed_dims=8, depths=(1, 2, 1, 1))))
        wrapped = [m for m in model.modules() if wrap_blocks(m, recurse=False, nonwrapped_numel=0)]
        assert wrapped == [block for layer in model.layers for block in layer.blocks]

    def test_needs_a_launcher(self, tmp_path):
        cfg = Config.fromfile(CONFIGS / '_base_' / 'fsdp.py').strategy
        strategy = STRATEGIES.build(dict(cfg, work_dir=str(tmp_path)))
        strategy._setup_env(launcher='none')
        with pytest.raises(UsageError, match='FSDP needs --launcher pytorch or slurm, got none'):
            strategy._wrap_model(nn.Linear(1, 1))

    def test_config_on_top_of_a_shipped_one(self, tmp_path):
        (tmp_path / 'config.py').write_text(
            f"_base_ = ['{CONFIGS}/mask_rcnn_spatialmamba_b_1x.py', '{CONFIGS}/_base_/fsdp.py']")
        cfg = Config.fromfile(tmp_path / 'config.py')
        assert (cfg.runner_type, cfg.strategy.type) == ('FlexibleRunner', 'ResumableFSDPStrategy')


@pytest.mark.parametrize('name', ['mask_rcnn_spatialmamba_t_3x', 'upernet_quadmamba_s_160k', 'spatialmamba_b_in1k',
                                  'mask_rcnn_quadmamba_nano_digits'])
def test_configs(name):
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    assert cfg.model_wrapper_cfg == dict(
        type='MMDistributedDataParallel', find_unused_parameters=False, static_graph=True,
        gradient_as_bucket_view=True, broadcast_buffers=False)
    assert cfg.env_cfg.dist_cfg == dict(backend='nccl', timeout=600)
    # Only heads ask for SyncBN, and nothing converts other norms.
    assert 'sync_bn' not in cfg
    assert 'SyncBN' not in str({key: value for key, value in cfg.model.items() if 'head' not in key})
