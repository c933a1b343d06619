"""tools/test.py on a model and data of a few seconds."""
import json
import pickle

import pytest
import torch
from mmengine.config import Config
from tool_testing import load_tool, make_coco, run_log

from mmvssm.engine.config import UsageError

test = load_tool('test')


class TestTest:

    def evaluate(self, trained, work_dir, *options, data=None):
        test.main([str(trained / 'config.py'), str(trained / 'run' / 'epoch_1.pth'), '--work-dir',
                   str(work_dir), *options, '--cfg-options', f'data_root={data or trained / "coco"}'])

    def test_out_and_show_dir(self, trained, tmp_path):
        out, show_dir = tmp_path / 'new' / 'predictions.pkl', tmp_path / 'drawn'
        self.evaluate(trained, tmp_path, '--out', str(out), '--show-dir', str(show_dir))
        predictions = pickle.loads(out.read_bytes())
        assert len(predictions) == 2
        assert {'bboxes', 'labels', 'scores', 'masks'} <= set(predictions[0]['pred_instances'])
        assert len(list(show_dir.glob('*.jpg'))) == 2
        metrics = json.loads(next(tmp_path.glob('*/*.json')).read_text())
        assert {'coco/bbox_mAP', 'coco/segm_mAP'} <= set(metrics)

    def test_broken_image(self, trained, tmp_path):
        make_coco(tmp_path / 'coco')
        path = tmp_path / 'coco' / 'val2017' / '000000000002.jpg'
        path.write_bytes(b'no picture')
        with pytest.raises(SystemExit, match=f'^error: test data: sample 1, {path}: '):
            self.evaluate(trained, tmp_path, data=tmp_path / 'coco')
        assert 'Traceback' in run_log(tmp_path)

    def test_tta(self, trained, tmp_path):
        self.evaluate(trained, tmp_path, '--tta')
        assert 'segm mAP is not evaluated' in run_log(tmp_path)
        metrics = json.loads(next(tmp_path.glob('*/*.json')).read_text())
        assert 'coco/bbox_mAP' in metrics
        assert 'coco/segm_mAP' not in metrics

    @pytest.mark.parametrize('state, message', [
        (dict(a=torch.zeros(1)), 'not one of this model: .*unexpected key'),
        (dict(), 'not one of this model: .*missing keys'),
    ])
    def test_foreign_checkpoint(self, trained, tmp_path, state, message):
        torch.save(dict(state_dict=state), tmp_path / 'foreign.pth')
        with pytest.raises(SystemExit, match=message):
            test.main([str(trained / 'config.py'), str(tmp_path / 'foreign.pth'), '--work-dir',
                       str(tmp_path), '--cfg-options', f'data_root={trained / "coco"}'])

    def test_missing_checkpoint(self, trained):
        with pytest.raises(SystemExit, match='checkpoint not found: .*gone.pth'):
            test.main([str(trained / 'config.py'), 'gone.pth', '--cfg-options',
                       f'data_root={trained / "coco"}'])

    def test_out_must_be_a_pickle(self, trained):
        with pytest.raises(SystemExit, match='ends in .pkl or .pickle, got x.json'):
            self.evaluate(trained, 'unused', '--out', 'x.json')


class TestTestTimeAugmentation:

    def test_segmentation(self):
        pipeline = [dict(type='LoadImageFromFile'),
                    dict(type='Resize', scale=(2048, 512), keep_ratio=True),
                    dict(type='LoadAnnotations', reduce_zero_label=True),
                    dict(type='PackSegInputs')]
        dataset = dict(type='ADE20KDataset', pipeline=pipeline)
        cfg = Config(dict(default_scope='mmseg', model=dict(type='EncoderDecoder'),
                          test_dataloader=dict(dataset=dataset)))
        assert test.set_tta(cfg) == ''
        assert (cfg.model.type, cfg.model.module.type) == ('SegTTAModel', 'EncoderDecoder')
        load, augment = cfg.test_dataloader.dataset.pipeline
        sizes, flips, annotations, pack = augment.transforms
        assert [size.scale for size in sizes] == [
            (1024, 256), (1536, 384), (2048, 512), (2560, 640), (3072, 768), (3584, 896)]
        assert [flip.prob for flip in flips] == [0.0, 1.0]
        assert (annotations[0].reduce_zero_label, pack[0].type) == (True, 'PackSegInputs')

    def test_segmentation_needs_a_size(self):
        dataset = dict(pipeline=[dict(type='Resize', scale_factor=2)])
        cfg = Config(dict(default_scope='mmseg', test_dataloader=dict(dataset=dataset)))
        with pytest.raises(UsageError, match='no Resize to a width and height'):
            test.set_tta(cfg)

    def test_classification(self):
        pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
        cfg = Config(dict(default_scope='mmpretrain', model=dict(type='ImageClassifier'),
                          test_dataloader=dict(dataset=dict(pipeline=pipeline))))
        assert test.set_tta(cfg) == ''
        assert cfg.model.type == 'AverageClsScoreTTA'

    def test_the_config_decides(self):
        cfg = Config(dict(default_scope='mmseg', model=dict(type='Net'),
                          tta_model=dict(type='Mine'), tta_pipeline=[dict(type='Mine')],
                          test_dataloader=dict(dataset=dict(pipeline=[]))))
        test.set_tta(cfg)
        assert cfg.model == dict(type='Mine', module=dict(type='Net'))
        assert cfg.test_dataloader.dataset.pipeline == [dict(type='Mine')]

    def test_unknown_task(self):
        with pytest.raises(UsageError, match="no default for default_scope 'mmpose'"):
            test.set_tta(Config(dict(default_scope='mmpose')))

    def test_masks_that_cannot_be_left_out(self):
        cfg = Config(dict(default_scope='mmdet', model=dict(type='SOLO'),
                          test_evaluator=dict(metric=['bbox', 'segm'])))
        with pytest.raises(UsageError, match='masks of SOLO cannot be left out'):
            test.set_tta(cfg)


class TestOtherTasks:
    """Settings of tools/test.py that depend on the task."""

    def test_segmentation_saves_label_maps(self):
        cfg = Config(dict(default_scope='mmseg', test_evaluator=dict(type='IoUMetric')))
        test.set_out(cfg, 'maps')
        assert cfg.test_evaluator.output_dir == 'maps'
        with pytest.raises(UsageError, match='a folder for segmentation'):
            test.set_out(cfg, 'maps.pkl')

    def test_classification_cannot_draw_augmented(self, tmp_path):
        (tmp_path / 'config.py').write_text("default_scope = 'mmpretrain'")
        with pytest.raises(SystemExit, match='cannot draw with --tta'):
            test.main([str(tmp_path / 'config.py'), 'x.pth', '--tta', '--show-dir', 'x'])

    def test_classification_saves_predictions(self):
        cfg = Config(dict(default_scope='mmpretrain', test_evaluator=dict(type='Accuracy')))
        test.set_out(cfg, 'x.pkl')
        assert [item.type for item in cfg.test_evaluator] == ['Accuracy', 'DumpResults']

    @pytest.mark.parametrize('scope, expected', [
        ('mmdet', dict(draw=True, test_out_dir='/x')),
        ('mmseg', dict(draw=True, interval=1)),
        ('mmpretrain', dict(enable=True, interval=1, out_dir='/x')),
    ])
    def test_show_dir(self, scope, expected):
        cfg = Config(dict(default_scope=scope, default_hooks=dict(visualization=dict()),
                          visualizer=dict()))
        test.set_show_dir(cfg, '/x')
        assert cfg.default_hooks.visualization == expected
        assert cfg.visualizer == (dict(save_dir='/x') if scope == 'mmseg' else dict())

    def test_show_dir_needs_the_hook(self):
        with pytest.raises(UsageError, match='needs default_hooks.visualization'):
            test.set_show_dir(Config(dict(default_scope='mmdet')), '/x')
