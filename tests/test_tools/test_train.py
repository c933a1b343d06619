"""tools/train.py on a model and data of a few seconds."""
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from tool_testing import ROOT, TINY, load_tool, run_log

from mmvssm.engine.hooks import PartialLoadingHook
from mmvssm.models.backbones import QuadMamba

train = load_tool('train')


class TestTrain:

    @pytest.mark.parametrize('arguments, message', [
        (['gone.py'], f'error: config: no such file: {ROOT}/gone.py'),
        ([str(TINY), '--cfg-options', 'data_root=gone/coco'],
         f'error: train_dataloader.dataset.data_root: no such file or folder: {ROOT}/gone/coco; '
         'set it with --cfg-options data_root=FOLDER'),
    ])
    def test_mistakes_are_one_line(self, arguments, message):
        run = subprocess.run(
            [sys.executable, 'tools/train.py', *arguments],
            cwd=ROOT, capture_output=True, text=True)
        assert (run.returncode, run.stderr) == (1, message + '\n')

    def test_other_ranks_are_silent(self, monkeypatch):
        monkeypatch.setenv('RANK', '1')
        with pytest.raises(SystemExit) as exit_info:
            train.main(['gone.py'])
        assert exit_info.value.code == 1

    @pytest.mark.parametrize('options, message', [
        (['--resume', 'gone.pth'], 'checkpoint not found'),
        (['--cfg-options', 'pretrained=gone.pth'],
         'pretrained checkpoint not found: .*/gone.pth; .*pretrained=None'),
        (['--auto-scale-lr', '--cfg-options', 'auto_scale_lr.base_batch_size=0'],
         '--auto-scale-lr needs auto_scale_lr.base_batch_size'),
        (['--seed', '-1'], '--seed must be from 0 to 4294967295, got -1'),
    ])
    def test_bad_options(self, trained, options, message, monkeypatch):
        monkeypatch.setattr(train.Runner, 'from_cfg', lambda cfg: pytest.fail('built'))
        monkeypatch.setenv('COCO_ROOT', str(trained / 'coco'))
        with pytest.raises(SystemExit, match=message):
            train.main([str(trained / 'config.py'), '--work-dir', 'unused', *options])

    def test_options_need_values(self, capsys):
        with pytest.raises(SystemExit):
            train.main([str(TINY), '--cfg-options', 'data_root', '/data'])
        assert '--cfg-options takes KEY=VALUE, got data_root' in capsys.readouterr().err

    def test_resume_needs_an_optimizer(self, trained, tmp_path, monkeypatch):
        monkeypatch.setenv('COCO_ROOT', str(trained / 'coco'))
        torch.save(dict(state_dict={}), tmp_path / 'weights.pth')
        with pytest.raises(SystemExit, match='holds weights but no optimizer'):
            train.main([str(trained / 'config.py'), '--resume', str(tmp_path / 'weights.pth')])

    @pytest.mark.parametrize('option, message', [
        ('model.backbone.arch.depths=[1,2]', r"ValueError: .*SpatialMamba: arch\['depths'\]=\[1, 2\], expected 4"),
        ('model.backbone.type=Gone', 'KeyError: .*Gone is not in the'),
        ('pretrained={tmp}/odd.pth', "RuntimeError: checkpoint '.*/odd.pth' does not fit: "),
    ])
    def test_what_cannot_be_built_is_one_line(self, trained, tmp_path, monkeypatch, option, message):
        monkeypatch.setenv('COCO_ROOT', str(trained / 'coco'))
        torch.save(dict(state_dict=dict(a=torch.zeros(1))), tmp_path / 'odd.pth')
        with pytest.raises(SystemExit, match=f'^error: {message}') as exit_info:
            train.main([str(trained / 'config.py'), '--work-dir', str(tmp_path), '--cfg-options',
                        option.format(tmp=tmp_path)])
        assert '\n' not in exit_info.value.code

    def test_resume_with_other_groups(self, trained, tmp_path, monkeypatch):
        monkeypatch.setenv('COCO_ROOT', str(trained / 'coco'))
        with pytest.raises(SystemExit, match='^error: resume: .*parameter group.* paramwise_cfg, from which groups'):
            train.main([str(trained / 'config.py'), '--work-dir', str(tmp_path), '--resume',
                        str(trained / 'run' / 'epoch_1.pth'), '--cfg-options', 'optim_wrapper.paramwise_cfg=None',
                        'optim_wrapper.constructor=DefaultOptimWrapperConstructor'])

    def test_resume_is_strict(self, trained, tmp_path, monkeypatch):
        monkeypatch.setenv('COCO_ROOT', str(trained / 'coco'))
        checkpoint = torch.load(trained / 'run' / 'epoch_1.pth', weights_only=False)
        del checkpoint['state_dict']['rpn_head.rpn_cls.weight']
        torch.save(checkpoint, tmp_path / 'cut.pth')
        with pytest.raises(SystemExit, match='not one of this model: .*missing keys .*rpn_head.rpn_cls.weight'):
            train.main([str(trained / 'config.py'), '--work-dir', str(tmp_path), '--resume',
                        str(tmp_path / 'cut.pth')])

    @pytest.fixture
    def starting(self, trained, tmp_path, monkeypatch):
        """Start training from some weights and stop before the first step."""
        monkeypatch.setenv('COCO_ROOT', str(trained / 'coco'))
        monkeypatch.setattr('mmengine.runner.EpochBasedTrainLoop.run', lambda loop: None)

        def start(weights, *options):
            torch.save(dict(state_dict=weights), tmp_path / 'start.pth')
            train.main([str(trained / 'config.py'), '--work-dir', str(tmp_path), '--cfg-options',
                        f'load_from={tmp_path / "start.pth"}', *options])

        state = torch.load(trained / 'run' / 'epoch_1.pth', weights_only=False)['state_dict']
        return start, state

    def test_load_from_with_other_classes(self, starting, tmp_path):
        start, state = starting
        start({**{f'module.{name}': value for name, value in state.items()}, 'more': torch.zeros(1)},
              *(f'model.roi_head.{head}.num_classes=2' for head in ('bbox_head', 'mask_head')),
              *(f'{split}_dataloader.dataset.metainfo.classes=person,car' for split in ('train', 'val')))
        log = run_log(tmp_path)
        total = sum('num_batches' not in name for name in state)
        assert f'load_from: {total - 6} of the {total} weights of the model are in the checkpoint' in log
        box, mask = 'roi_head.bbox_head.fc', 'roi_head.mask_head.conv_logits'
        assert (f'of another shape: {box}_cls.weight, {box}_cls.bias, {box}_reg.weight, {box}_reg.bias, '
                f'{mask}.weight, {mask}.bias\n') in log
        assert 'load_from: not in the model: more\n' in log

    @pytest.mark.parametrize('change', [
        lambda state: {},
        lambda state: dict(a=torch.zeros(1)),
        lambda state: {name: value for name, value in state.items() if not name.startswith('backbone.')},
        lambda state: {name.removeprefix('backbone.'): value for name, value in state.items()},
        lambda state: {name: value[:1] for name, value in state.items() if value.dim()},
    ])
    def test_load_from_what_does_not_fit(self, starting, change):
        start, state = starting
        with pytest.raises(SystemExit, match='^error: load_from: [0-9]+ of the [0-9]+ weights of the backbone'):
            start(change(state))

    def test_resume_without_the_pretrained_file(self, trained, tmp_path, monkeypatch):
        monkeypatch.setenv('COCO_ROOT', str(trained / 'coco'))
        arguments = [str(trained / 'config.py'), '--work-dir', str(tmp_path), '--resume',
                     '--cfg-options', 'pretrained=/gone.pth']
        with pytest.raises(SystemExit, match='pretrained checkpoint not found'):
            train.main(arguments)  # nothing to resume from yet
        (tmp_path / 'last_checkpoint').write_text(str(trained / 'run' / 'epoch_1.pth'))
        train.main(arguments)
        log = run_log(tmp_path)
        assert 'the pretrained checkpoint /gone.pth is not read again' in log
        assert 'resumed epoch: 1' in log

    def test_resume_of_nothing_keeps_load_from(self, trained, tmp_path, monkeypatch):
        monkeypatch.setenv('COCO_ROOT', str(trained / 'coco'))
        monkeypatch.setattr('mmengine.runner.EpochBasedTrainLoop.run', lambda loop: None)
        start = trained / 'run' / 'epoch_1.pth'
        train.main([str(trained / 'config.py'), '--work-dir', str(tmp_path), '--resume', '--cfg-options',
                    f'load_from={start}'])
        assert f'Load checkpoint from {start}' in run_log(tmp_path)

    def test_epoch(self, trained):
        assert (trained / 'run' / 'epoch_1.pth').is_file()
        log = run_log(trained / 'run')
        assert 'coco/segm_mAP' in log
        assert 'seed: 1' in log

    def test_resume(self, trained, tmp_path, monkeypatch):
        monkeypatch.setenv('COCO_ROOT', str(trained / 'coco'))
        (tmp_path / 'last_checkpoint').write_text(str(trained / 'run' / 'epoch_1.pth'))
        train.main([str(trained / 'config.py'), '--work-dir', str(tmp_path), '--resume',
                    '--cfg-options', 'train_cfg.max_epochs=2', 'train_cfg.val_interval=9'])
        assert torch.load(tmp_path / 'epoch_2.pth', weights_only=False)['meta']['epoch'] == 2
        assert not (tmp_path / 'epoch_1.pth').exists()

    def test_sync_bn_becomes_bn(self, trained, tmp_path, monkeypatch):
        monkeypatch.setenv('COCO_ROOT', str(trained / 'coco'))
        models = []
        monkeypatch.setattr(train.Runner, 'train', lambda runner: models.append(runner.model))
        train.main([str(trained / 'config.py'), '--work-dir', str(tmp_path),
                    '--cfg-options', 'model.neck.norm_cfg.type=SyncBN'])
        layers = [type(layer).__name__ for layer in models[0].neck.modules()]
        assert any('BatchNorm' in name for name in layers)
        assert not any('Sync' in name for name in layers)


def test_load_from_takes_older_names_of_quadmamba():
    model = torch.nn.Module()
    model.backbone = QuadMamba(dict(embed_dims=8, depths=(1, 1, 1, 1)))
    older = {name.replace('.norm.', '.ln_1.').replace('.op.', '.self_attention.'): value
             for name, value in model.state_dict().items()}
    assert len(older.keys() - model.state_dict().keys()) > len(older) / 2
    lines = []
    runner = SimpleNamespace(model=model, logger=SimpleNamespace(info=lines.append, warning=lines.append))
    PartialLoadingHook().after_load_checkpoint(runner, {'state_dict': older})
    assert lines == [f'load_from: {len(older)} of the {len(older)} weights of the model are in the checkpoint']
