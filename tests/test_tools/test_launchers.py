"""The start scripts: what they refuse, what they call, and a training and an evaluation in two processes."""
import os
import pickle
import subprocess
import sys

import pytest
import torch
from tool_testing import ROOT, TINY_DETECTOR, load_tool, make_coco, run_log

from mmvssm.engine.checkpointing import stopped_checkpoint

CONFIG = 'configs/mask_rcnn_spatialmamba_t_1x.py'
# On CPUs DDP has no device to choose.
TWO_PROCESSES = TINY_DETECTOR + '''
custom_imports = dict(imports=['mmvssm', 'gloo_on_cpu'])
model_wrapper_cfg = dict(device_ids=None)
'''


def start(script, *arguments, **environment):
    known = {key: value for key, value in os.environ.items()
             if key not in ('GPUS', 'GPUS_PER_NODE', 'CPUS_PER_TASK', 'SRUN_ARGS', 'NNODES', 'NODE_RANK', 'MASTER_ADDR',
                            'PORT', 'MASTER_PORT')}
    environment = dict(dict(known, PYTHON=sys.executable), **{key: str(value) for key, value in environment.items()})
    return subprocess.run([f'tools/{script}', *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True,
                          text=True, timeout=300)


@pytest.fixture
def called(tmp_path):
    """Run a script with stand-ins for Python and srun; returns what they were given, a line each."""
    for name in ('python', 'srun'):
        (tmp_path / name).write_text('#!/bin/sh\nprintf "%s\\n" "$(basename "$0")" "$@" "MASTER_PORT=$MASTER_PORT"\n')
        (tmp_path / name).chmod(0o755)

    def call(script, *arguments, **environment):
        run = start(script, *arguments, PATH=f'{tmp_path}:{os.environ["PATH"]}', PYTHON='python', **environment)
        assert run.returncode == 0, run.stderr
        return run.stdout.splitlines()
    return call


@pytest.mark.parametrize('script, fewest', [
    ('dist_train.sh', 2), ('dist_test.sh', 3), ('slurm_train.sh', 3), ('slurm_test.sh', 4)])
class TestEveryScript:

    def test_too_few_arguments(self, script, fewest):
        run = start(script, *['x'] * (fewest - 1))
        assert run.returncode == 1
        assert run.stderr.startswith(f'usage: {script} ')
        assert run.stderr.endswith(f'\nerror: {script} takes at least {fewest} arguments, got {fewest - 1}\n')

    def test_help(self, script, fewest):
        run = start(script, '--help')
        assert (run.returncode, run.stderr) == (0, '')
        assert run.stdout.startswith(f'usage: {script} ')

    def test_is_valid(self, script, fewest):
        assert subprocess.run(['bash', '-n', f'tools/{script}'], cwd=ROOT).returncode == 0
        assert os.access(ROOT / 'tools' / script, os.X_OK)


@pytest.mark.parametrize('script, arguments, environment, message', [
    ('dist_train.sh', ['gone.py', 2], {}, 'CONFIG: no such file: gone.py'),
    ('dist_train.sh', [CONFIG, 0], {}, "GPUS must be a positive number, got '0'"),
    ('dist_train.sh', [CONFIG, 'two'], {}, "GPUS must be a positive number, got 'two'"),
    ('dist_train.sh', [CONFIG, 2], dict(NNODES='x'), "NNODES must be a positive number, got 'x'"),
    ('dist_train.sh', [CONFIG, 2], dict(NNODES=2), 'MASTER_ADDR must be the address of node 0, as NNODES=2'),
    ('dist_train.sh', [CONFIG, 2], dict(NNODES=2, MASTER_ADDR='a', NODE_RANK=2),
     "NODE_RANK must be a number from 0 to 1, as NNODES=2, got '2'"),
    ('dist_train.sh', [CONFIG, 2], dict(NNODES=2, MASTER_ADDR='a', NODE_RANK=0, PORT='p'),
     "PORT must be a positive number, got 'p'"),
    ('dist_test.sh', [CONFIG, 'gone.pth', 2], {}, 'CHECKPOINT: no such file: gone.pth'),
    ('dist_test.sh', [CONFIG, CONFIG, -1], {}, "GPUS must be a positive number, got '-1'"),
    ('slurm_train.sh', ['part', 'job', 'gone.py'], {}, 'CONFIG: no such file: gone.py'),
    ('slurm_train.sh', ['part', 'job', CONFIG], dict(GPUS='all'), "GPUS must be a positive number, got 'all'"),
    ('slurm_train.sh', ['part', 'job', CONFIG], dict(GPUS_PER_NODE='0'),
     "GPUS_PER_NODE must be a positive number, got '0'"),
    ('slurm_test.sh', ['part', 'job', CONFIG, 'gone.pth'], {}, 'CHECKPOINT: no such file: gone.pth'),
], ids=lambda value: '' if isinstance(value, (list, dict)) else value)
def test_bad_arguments_are_named(script, arguments, environment, message):
    run = start(script, *arguments, **environment)
    assert (run.returncode, run.stdout, run.stderr) == (1, '', f'error: {message}\n')


class TestCommands:

    def test_one_node(self, called):
        assert called('dist_train.sh', CONFIG, 4, '--amp', 'bf16', '--cfg-options', 'a=b c')[:-1] == [
            'python', '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=4', 'tools/train.py', CONFIG,
            '--launcher', 'pytorch', '--amp', 'bf16', '--cfg-options', 'a=b c']

    @pytest.mark.parametrize('port', [29500, 1234])
    def test_several_nodes(self, called, port):
        environment = dict(NNODES=2, NODE_RANK=1, MASTER_ADDR='first')
        if port != 29500:
            environment['PORT'] = port
        assert called('dist_test.sh', CONFIG, CONFIG, 8, **environment)[:-1] == [
            'python', '-m', 'torch.distributed.run', '--nnodes=2', '--node_rank=1', '--master_addr=first',
            f'--master_port={port}', '--nproc_per_node=8', 'tools/test.py', CONFIG, CONFIG, '--launcher', 'pytorch']

    def test_slurm_train(self, called):
        *command, port = called('slurm_train.sh', 'part', 'my job', CONFIG, '--amp', 'bf16')
        assert command == [
            'srun', '--partition=part', '--job-name=my job', '--gres=gpu:8', '--ntasks=8', '--ntasks-per-node=8',
            '--cpus-per-task=8', '--kill-on-bad-exit=1', 'python', '-u', 'tools/train.py', CONFIG,
            '--launcher', 'slurm', '--resume', '--amp', 'bf16']
        assert 20000 <= int(port.removeprefix('MASTER_PORT=')) < 30000

    def test_slurm_test(self, called):
        assert called('slurm_test.sh', 'part', 'job', CONFIG, CONFIG, '--tta', GPUS=4, CPUS_PER_TASK=3, PORT=1234,
                      SRUN_ARGS='--quotatype=auto --exclusive') == [
            'srun', '--partition=part', '--job-name=job', '--gres=gpu:4', '--ntasks=4', '--ntasks-per-node=4',
            '--cpus-per-task=3', '--kill-on-bad-exit=1', '--quotatype=auto', '--exclusive', 'python', '-u',
            'tools/test.py', CONFIG, CONFIG, '--launcher', 'slurm', '--tta', 'MASTER_PORT=1234']

    def test_slurm_on_several_nodes(self, called):
        command = called('slurm_train.sh', 'part', 'job', CONFIG, GPUS=32, GPUS_PER_NODE=4)
        assert command[3:6] == ['--gres=gpu:4', '--ntasks=32', '--ntasks-per-node=4']


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The folder of a training in two processes, with config.py and coco/."""
    folder = tmp_path_factory.mktemp('two_processes')
    make_coco(folder / 'coco', images=9)
    (folder / 'config.py').write_text(TWO_PROCESSES)
    started = train(folder, 'run')
    assert started.returncode == 0, started.stderr[-2000:]
    return folder


def train(folder, work_dir, *options):
    """Two epochs of three iterations."""
    return start(
        'dist_train.sh', folder / 'config.py', 2, '--work-dir', folder / work_dir, '--seed', 1, '--auto-scale-lr',
        '--deterministic', '--cfg-options', f'data_root={folder / "coco"}', 'train_cfg.max_epochs=2', *options,
        **on_cpus())


def on_cpus():
    path = f'{ROOT / "tests" / "test_tools"}:{os.environ.get("PYTHONPATH", "")}'
    return dict(PYTHONPATH=path, OMP_NUM_THREADS=1, CUDA_VISIBLE_DEVICES='')


class TestTwoProcesses:

    def test_training(self, run):
        log = run_log(run / 'run')
        assert 'Scaling the original LR by 0.25.' in log  # 2 processes x 2 images, of 16
        checkpoint = torch.load(run / 'run' / 'epoch_2.pth', weights_only=False)
        assert checkpoint['meta']['iter'] == 6  # 9 images are 5 for each
        assert {group['initial_lr'] for group in checkpoint['optimizer']['param_groups']} == {0.25e-4}

    def test_stops_and_goes_on(self, run):
        """Within an epoch, if one of the processes is told to."""
        stopped = train(run, 'stopped', 'custom_imports.imports=[mmvssm,gloo_on_cpu,terminate_hook]',
                        'default_hooks.terminate.type=TerminateHook')
        assert stopped.returncode != 0
        path = stopped_checkpoint(str(run / 'stopped'))
        # The processes agree in the background, which takes an iteration.
        assert path == str(run / 'stopped' / 'stopped_iter_4.pth'), stopped.stderr[-2000:]
        assert not (run / 'stopped' / 'left_early').exists()
        resumed = train(run, 'stopped')
        assert resumed.returncode == 0, resumed.stderr[-2000:]
        weights, whole = (torch.load(run / name / 'epoch_2.pth', weights_only=False)['state_dict']
                          for name in ('stopped', 'run'))
        assert all(torch.equal(weights[name], value) for name, value in whole.items())

    def test_evaluation_equals_that_of_one_process(self, run, tmp_path):
        arguments = [run / 'config.py', run / 'run' / 'epoch_2.pth']
        options = ['--cfg-options', f'data_root={run / "coco"}']
        two = start('dist_test.sh', *arguments, 2, '--work-dir', tmp_path / 'two', '--out', tmp_path / 'two.pkl',
                    *options, **on_cpus())
        assert two.returncode == 0, two.stderr[-2000:]
        load_tool('test').main([*map(str, arguments), '--work-dir', str(tmp_path / 'one'), '--out',
                                str(tmp_path / 'one.pkl'), *options, 'custom_imports.imports=[mmvssm]'])
        found = []
        for name in ('one', 'two'):
            with open(tmp_path / f'{name}.pkl', 'rb') as file:
                found.append({sample['img_id']: sample['pred_instances'] for sample in pickle.load(file)})
        assert list(found[0]) == list(found[1]) == list(range(1, 10))
        for one, two in zip(*(predictions.values() for predictions in found)):
            assert len(one['scores']) > 0
            assert all(torch.equal(one[key], two[key]) for key in ('bboxes', 'scores', 'labels'))
            assert one['masks'] == two['masks']  # run lengths
