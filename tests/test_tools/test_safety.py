"""What training does when something goes wrong: nothing is lost, and it says what happened."""
import errno
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kill_and_resume import survive, wait_for_all
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from test_repeatable import Case, differing
from tool_testing import ROOT, load_tool, run_log
from torch import nn

from mmvssm.engine import checkpointing
from mmvssm.engine.checkpointing import (
    check_work_dir,
    newest_checkpoint,
    stopped_checkpoint,
    write_files_whole,
    write_whole,
)
from mmvssm.engine.config import TrainingError, UsageError
from mmvssm.engine.data_check import resume_checkpoint
from mmvssm.engine.finite_hook import FiniteHook

train = load_tool('train')


@pytest.fixture
def whole_files():
    write_files_whole()
    yield
    register_backend('local', LocalBackend, force=True, prefixes='')


class Weight(BaseModel):
    """One weight, whose loss and gradients a test can spoil in an iteration."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.spoiled, self.passes = {}, 0

    def forward(self, inputs, mode='loss'):
        if mode == 'predict':
            return [self.weight.mean().item()] * len(inputs)
        self.passes += 1
        losses = dict(loss_a=self.weight.square().mean(), loss_b=self.weight.mean())
        spoil = self.spoiled.get(self.passes)
        return spoil(losses) if spoil else losses


class Mean(BaseMetric):
    """Less is better, and training makes it less."""

    def process(self, data_batch, data_samples):
        self.results += data_samples

    def compute_metrics(self, results):
        return dict(loss=sum(results) / len(results))


def runner_of(folder, model=None, spoiled=None, hooks=(), clip_grad=None, **checkpoint):
    """A Runner of six iterations, with a checkpoint and a validation after every second."""
    model = model or Weight()
    model.spoiled = spoiled or {}
    data = dict(dataset=list(range(4)), num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False))
    runner = Runner(
        model, str(folder), experiment_name=folder.name,
        train_dataloader=dict(data, batch_size=1, sampler=dict(type='InfiniteSampler', shuffle=False),
                              collate_fn=lambda batch: dict(inputs=batch)),
        train_cfg=dict(by_epoch=False, max_iters=6, val_interval=2),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1), clip_grad=clip_grad),
        val_dataloader=dict(data, batch_size=2, collate_fn=lambda batch: dict(inputs=batch)), val_cfg=dict(),
        val_evaluator=[Mean()], default_hooks=dict(checkpoint=dict(
            type='SafeCheckpointHook', by_epoch=False, interval=2, **checkpoint)))
    for hook in hooks:
        runner.register_hook(hook)
    return runner


def checkpoints(folder):
    return sorted(path.name for path in folder.glob('*.pth*'))


class TestCheckpoints:

    @pytest.mark.parametrize('options, at_writes, at_end', [
        (dict(max_keep_ckpts=1), [[], ['iter_2.pth'], ['iter_4.pth']], ['iter_6.pth']),
        (dict(max_keep_ckpts=2), [[], ['iter_2.pth'], ['iter_2.pth', 'iter_4.pth']], ['iter_4.pth', 'iter_6.pth']),
    ], ids=['one', 'two'])
    def test_older_is_deleted_after_the_newer_is_written(
            self, tmp_path, monkeypatch, whole_files, options, at_writes, at_end):
        seen = []

        def write(path, data):
            seen.append(checkpoints(tmp_path))
            write_whole(path, data)

        monkeypatch.setattr(checkpointing, 'write_whole', write)
        runner_of(tmp_path, **options).train()
        assert seen == at_writes
        assert checkpoints(tmp_path) == at_end

    def test_best_is_deleted_after_the_better_is_written(self, tmp_path, monkeypatch, whole_files):
        seen = []

        def write(path, data):
            seen.append([name for name in checkpoints(tmp_path) if name.startswith('best')])
            write_whole(path, data)

        monkeypatch.setattr(checkpointing, 'write_whole', write)
        runner_of(tmp_path, save_best='loss', rule='less', max_keep_ckpts=1).train()
        # Written in turn: a checkpoint, the best, the checkpoint again that knows of the best.
        best = [f'best_loss_iter_{i}.pth' for i in (2, 4, 6)]
        assert seen == [[], [], best[:1], best[:1], best[:1], best[:2], best[1:2], best[1:2], best[1:]]
        assert checkpoints(tmp_path) == [best[2], 'iter_6.pth']

    @pytest.mark.parametrize('content, expected', [
        (None, 'iter_20.pth'), ('', 'iter_20.pth'), ('{}/iter_3.pth', 'iter_3.pth'), ('{}/gone.pth', 'iter_20.pth'),
    ], ids=['none', 'empty', 'named', 'gone'])
    def test_newest(self, tmp_path, content, expected):
        for age, name in enumerate(('iter_20.pth', 'iter_3.pth', 'epoch_9.pth')):
            (tmp_path / name).touch()
            os.utime(tmp_path / name, (1000 - age, 1000 - age))
        (tmp_path / 'best_a_iter_30.pth').touch()
        if content is not None:
            (tmp_path / 'last_checkpoint').write_text(content.format(tmp_path))
        assert newest_checkpoint(str(tmp_path)) == str(tmp_path / expected)

    def test_newest_of_none(self, tmp_path):
        assert newest_checkpoint(str(tmp_path)) is None
        assert stopped_checkpoint(str(tmp_path)) is None
        (tmp_path / 'last_checkpoint').write_text('gone.pth')
        assert newest_checkpoint(str(tmp_path)) == 'gone.pth'  # whoever reads it says that it is gone

    def test_folder_that_was_moved(self, tmp_path):
        """Its markers hold the old path, where there may be other files."""
        for folder in ('old', 'new'):
            (tmp_path / folder).mkdir()
            for name, marker in (('iter_2.pth', 'last_checkpoint'), ('stopped_iter_3.pth', 'stopped')):
                (tmp_path / folder / name).touch()
                (tmp_path / folder / marker).write_text(str(tmp_path / 'old' / name))
        assert newest_checkpoint(str(tmp_path / 'new')) == str(tmp_path / 'new' / 'iter_2.pth')
        assert stopped_checkpoint(str(tmp_path / 'new')) == str(tmp_path / 'new' / 'stopped_iter_3.pth')

    def test_best_of_another_run_is_kept(self, tmp_path, whole_files):
        """That from which this one goes on, in a folder of its own."""
        options = dict(save_best='loss', rule='less', max_keep_ckpts=1)
        runner_of(tmp_path / 'first', **options).train()
        before = checkpoints(tmp_path / 'first')
        runner = runner_of(tmp_path / 'second', **options)
        runner._resume, runner._load_from = True, str(tmp_path / 'first' / 'iter_6.pth')
        runner.train_loop._max_iters = 8
        runner.train()
        assert checkpoints(tmp_path / 'first') == before
        assert checkpoints(tmp_path / 'second') == ['best_loss_iter_8.pth', 'iter_8.pth']

    def test_what_cannot_be_removed_stays(self, tmp_path, monkeypatch, whole_files):
        def remove(backend, path):
            raise PermissionError(13, 'Permission denied')

        monkeypatch.setattr(checkpointing.WholeFileBackend, 'remove', remove)
        runner_of(tmp_path, max_keep_ckpts=1).train()
        assert checkpoints(tmp_path) == ['iter_2.pth', 'iter_4.pth', 'iter_6.pth']
        assert 'iter_2.pth cannot be removed: PermissionError' in run_log(tmp_path)

    def test_counts_of_a_runner_that_counts_again(self, tmp_path, whole_files):
        """FlexibleRunner writes its own into what it saves: too many where that is saved again with the best."""
        class CountHook(Hook):
            priority = 'HIGHEST'

            def before_save_checkpoint(self, runner, checkpoint):
                checkpoint['meta'].update(iter=100, epoch=100)

        runner_of(tmp_path, hooks=[CountHook()], save_best='loss', rule='less').train()
        for iteration in (2, 4, 6):
            meta = torch.load(tmp_path / f'iter_{iteration}.pth', weights_only=False)['meta']
            assert (meta['iter'], meta['epoch']) == (iteration, 0)

    def test_full_disk(self, tmp_path):
        """What was there stays, without the piece that could be written."""
        (tmp_path / 'file').write_bytes(b'old')
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            with pytest.raises(OSError, match='File too large'):
                write_whole(tmp_path / 'file', b'new' * 1000)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [('file', b'old')]

    def test_full_disk_in_training(self, tmp_path, monkeypatch, whole_files):
        def write(path, data):
            if 'iter_4' in str(path):
                raise OSError(28, 'No space left on device')
            write_whole(path, data)

        monkeypatch.setattr(checkpointing, 'write_whole', write)
        with pytest.raises(TrainingError, match='checkpoint cannot be written: OSError: .*No space left on device.*'
                                                '--resume goes on from .*/iter_2.pth'):
            runner_of(tmp_path, max_keep_ckpts=1).train()
        assert checkpoints(tmp_path) == ['iter_2.pth']

    def test_pieces_of_a_killed_run_are_removed(self, tmp_path, whole_files):
        for name in ('iter_9.pth.unfinished', 'mine.unfinished'):
            (tmp_path / name).touch()
        runner_of(tmp_path, max_keep_ckpts=1).train()
        assert checkpoints(tmp_path) == ['iter_6.pth']
        assert (tmp_path / 'mine.unfinished').exists()

    @pytest.mark.parametrize('folder, error', [('/proc/gone', 'FileNotFoundError'), ('file/run', 'NotADirectoryError')])
    def test_work_dir_that_cannot_be_written(self, tmp_path, folder, error):
        (tmp_path / 'file').touch()
        with pytest.raises(UsageError, match=f'--work-dir: cannot write to .*{folder}: {error}'):
            check_work_dir(str(tmp_path / folder))

    def test_work_dir_is_left_empty(self, tmp_path):
        check_work_dir(str(tmp_path / 'a' / 'b'))
        assert not list((tmp_path / 'a' / 'b').iterdir())


def nan(name):
    def spoil(losses):
        losses[name] = losses[name] * float('nan')
        return losses
    return spoil


def infinite_gradient(losses):
    losses['loss_a'] = losses['loss_a'] + (losses['loss_a'] - losses['loss_a'].detach()).abs().sqrt()
    return losses


class TestFinite:

    @pytest.mark.parametrize('spoiled, message', [
        ({3: nan('loss_b')}, r'iteration 3: loss=nan, loss_b=nan; 1 weights are not finite either, the first of them '
                             r'weight\. .* --resume goes on from .*/iter_2\.pth'),
        ({5: infinite_gradient}, 'iteration 6: loss=nan, loss_a=nan, loss_b=nan; 1 weights'),
        ({1: nan('loss_a')}, 'iteration 1: loss=nan, loss_a=nan.*fp16 take bf16$'),
    ], ids=['loss', 'gradient', 'first'])
    def test_stops_at_once(self, tmp_path, whole_files, spoiled, message):
        with pytest.raises(TrainingError, match=message):
            runner_of(tmp_path, spoiled=spoiled, hooks=[FiniteHook()]).train()
        assert checkpoints(tmp_path) == [f'iter_{i}.pth' for i in (2, 4) if i < min(spoiled)]

    def test_norm_of_gradients(self, tmp_path, whole_files):
        with pytest.raises(TrainingError, match='iteration 3: grad_norm=nan; 1 weights'):
            runner_of(tmp_path, spoiled={3: infinite_gradient}, hooks=[FiniteHook()],
                      clip_grad=dict(max_norm=1.0)).train()

    def test_weights_that_are_not_finite_are_not_saved(self, tmp_path, whole_files):
        """The gradient is wrong in the iteration that ends with a checkpoint, before any loss is."""
        with pytest.raises(TrainingError, match='not finite any more, the first of them weight; not saved. '
                                                '--resume goes on from .*/iter_2.pth'):
            runner_of(tmp_path, spoiled={4: infinite_gradient}, hooks=[FiniteHook()]).train()
        assert checkpoints(tmp_path) == ['iter_2.pth']

    def test_finite(self, tmp_path, whole_files):
        runner_of(tmp_path, hooks=[FiniteHook()], clip_grad=dict(max_norm=1.0)).train()
        assert checkpoints(tmp_path) == ['iter_2.pth', 'iter_4.pth', 'iter_6.pth']


class TestResumableConfig:

    @pytest.mark.parametrize('loop', [dict(type='EpochBasedTrainLoop'), dict(by_epoch=True)], ids=['type', 'by_epoch'])
    def test_epochs(self, loop):
        cfg = Config(dict(train_cfg=dict(loop, max_epochs=1),
                          train_dataloader=dict(sampler=dict(type='DefaultSampler')),
                          default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=3))))
        train.make_resumable(cfg)
        assert cfg.train_cfg == dict(type='ResumableEpochLoop', max_epochs=1)
        assert cfg.train_dataloader.sampler == dict(type='SeededSampler', sampler=dict(type='DefaultSampler'))
        assert cfg.default_hooks.checkpoint == dict(type='SafeCheckpointHook', interval=3)

    def test_others_are_kept(self):
        own = dict(train_cfg=dict(type='MyLoop'), train_dataloader=dict(), default_hooks=dict(checkpoint=None))
        cfg = Config(own)
        train.make_resumable(cfg)
        assert cfg.to_dict() == own

    def test_hooks_by_default(self):
        cfg = Config(dict(train_cfg=dict(type='MyLoop'), train_dataloader=dict()))
        train.make_resumable(cfg)
        assert cfg.default_hooks == dict(checkpoint=dict(type='SafeCheckpointHook'))


class LogHook(Hook):
    """Write a log, which fails after the third iteration."""

    def __init__(self, number):
        self.number = number

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 2:
            raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EROFS, errno.EACCES], ids=errno.errorcode.get)
def test_log_cannot_be_written(tmp_path, number):
    runner = runner_of(tmp_path, hooks=[LogHook(number)])
    with pytest.raises(TrainingError) as caught:
        train.train(runner)
    assert os.strerror(number) in str(caught.value)
    assert str(caught.value).endswith(f'--resume goes on from {tmp_path}/iter_2.pth')


def test_other_failures_of_the_system_are_not_explained(tmp_path):
    with pytest.raises(ConnectionResetError):
        train.train(runner_of(tmp_path, hooks=[LogHook(errno.ECONNRESET)]))


@pytest.fixture(scope='module')
def case(tmp_path_factory):
    """A :class:`Case` with one run, in the work dir ``whole``."""
    case = Case(tmp_path_factory.mktemp('safety'), 'det', 'SpatialMamba')
    case.train('whole')
    return case


@pytest.mark.parametrize('moment', ['Iter(train)', 'Iter(val)'], ids=['in_training', 'in_validation'])
def test_sigterm(moment, case):
    """To all processes, as Slurm sends it: the run saves, exits with 143, and the next goes on by itself."""
    work_dir = case.folder / f'stopped_{moment[5:-1]}'
    command = [
        sys.executable, 'tools/train.py', str(case.config), '--work-dir', str(work_dir), '--seed', '3', '--cfg-options',
        f'data_root={case.folder / "data"}/', 'default_hooks.logger.interval=1', 'train_cfg.val_interval=2',
        *(f'{name}_dataloader.{option}' for name in ('train', 'val')
          for option in ('num_workers=1', 'persistent_workers=True'))]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    output = []
    for line in process.stdout:
        output.append(line)
        if moment in line:
            os.killpg(process.pid, signal.SIGTERM)
            break
    output += process.stdout.readlines()
    assert process.wait() == 143, ''.join(output[-20:])
    assert 'stopped by SIGTERM after iteration' in ''.join(output)
    path = Path(stopped_checkpoint(str(work_dir)))
    assert path.name.startswith('stopped_iter_')
    case.train(work_dir.name)
    assert f'resume: going on from {path}' in run_log(work_dir)
    assert not path.exists()
    assert differing(case.end('whole'), case.end(work_dir.name)) == []


@pytest.mark.parametrize('split, name', [('train', 'training data'), ('val', 'validation data')])
def test_broken_image(tmp_path, split, name):
    """One line with its name; the traceback is in the log."""
    case = Case(tmp_path, 'det', 'SpatialMamba')
    for path in (tmp_path / 'data' / split).iterdir():
        path.write_bytes(b'no picture')
    with pytest.raises(SystemExit) as caught:
        case.train('run', options=['train_cfg.val_interval=1'])
    assert re.fullmatch(f'error: {name}: sample [0-9]+, {tmp_path}/data/{split}/[0-9]+.png: .*', caught.value.code)
    assert 'Traceback' in run_log(tmp_path / 'run')


def test_killed_while_a_worker_starts():
    """Before it looks for its parent, which PyTorch would then never miss."""
    code = (f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_repeatable import *; '
            'os.register_at_fork(after_in_child=lambda: time.sleep(2)); from mmvssm.engine.samples import NamedItems; '
            'data = Numbers(); data.__getitems__ = NamedItems(data, "data"); '
            'loading = iter(DataLoader(data, num_workers=1)); '
            'os.kill(os.getpid(), signal.SIGKILL)')
    process = subprocess.Popen([sys.executable, '-c', code], start_new_session=True)
    assert process.wait() == -signal.SIGKILL
    wait_for_all([process.pid])


def test_killed(tmp_path):
    """`kill_and_resume.py` with few kills."""
    assert survive(Case(tmp_path, 'det', 'SpatialMamba'), kills=2, seed=1) == []


@pytest.mark.parametrize('resume, load_from, expected', [
    (False, None, 'stopped'), (False, 'start.pth', 'stopped'), (True, None, 'newest'), (True, 'mine.pth', 'mine.pth'),
])
def test_what_a_run_goes_on_from(tmp_path, resume, load_from, expected):
    paths = {name: tmp_path / f'{name}_iter_3.pth' for name in ('stopped', 'newest')}
    for path, marker in zip(paths.values(), ('stopped', 'last_checkpoint'), strict=True):
        path.touch()
        (tmp_path / marker).write_text(str(path))
    cfg = Config(dict(work_dir=str(tmp_path), resume=resume, load_from=load_from))
    assert resume_checkpoint(cfg) == cfg.load_from == str(paths.get(expected, expected))
    assert cfg.resume


def test_stopped_at_what_is_gone(tmp_path):
    (tmp_path / 'stopped').write_text('/runs/stopped_iter_3.pth')
    cfg = Config(dict(work_dir=str(tmp_path), resume=False, load_from=None))
    with pytest.raises(UsageError, match='saved /runs/stopped_iter_3.pth, which is gone; delete .*/stopped to start'):
        resume_checkpoint(cfg)
    (tmp_path / 'epoch_1.pth').touch()
    with pytest.raises(UsageError, match='is gone; add --resume to go on from .*/epoch_1.pth, or delete'):
        resume_checkpoint(cfg)
    cfg.resume = True
    assert resume_checkpoint(cfg) == str(tmp_path / 'epoch_1.pth')


def test_nothing_to_go_on_from(tmp_path):
    for resume in (True, False):
        assert resume_checkpoint(Config(dict(work_dir=str(tmp_path), resume=resume, load_from=None))) is None
