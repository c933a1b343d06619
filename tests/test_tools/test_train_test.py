"""tools/train.py, test.py and analysis/get_flops.py, on models and data of a few seconds."""
import importlib.util
import inspect
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.datasets import CocoDataset
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS
from mmengine.registry.build_functions import build_from_cfg

from mmvssm.engine import config as engine_config
from mmvssm.engine.config import (
    UsageError,
    check_backend,
    keep_boxes_fp32,
    load_config,
    one_line_errors,
    set_amp,
    set_data_root,
    set_pretrained,
)
from mmvssm.engine.data_check import check_checkpoint, check_data
from mmvssm.kernels import BackendError
from mmvssm.models.backbones import SpatialMamba

ROOT = Path(__file__).parents[2]
TINY = ROOT / 'configs' / 'mask_rcnn_spatialmamba_t_1x.py'

# Mask R-CNN T with a few channels, images of 64x64 and as few regions as that needs.
TINY_DETECTOR = f'''
_base_ = {str(TINY)!r}
pretrained = None
resize = dict(type='Resize', scale=(64, 64), keep_ratio=True)
load = [dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True, with_mask=True)]
pack = dict(type='PackDetInputs',
            meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))
train_dataloader = dict(
    num_workers=0, persistent_workers=False,
    dataset=dict(pipeline=[*load, resize, dict(type='PackDetInputs')]))
val_dataloader = dict(
    num_workers=0, persistent_workers=False, dataset=dict(pipeline=[*load, resize, pack]))
test_dataloader = val_dataloader
model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=16, depths=[1, 1, 1, 1]), drop_path_rate=0.0,
        init_cfg=None),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=16),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(num_convs=1, in_channels=16, conv_out_channels=16)),
    train_cfg=dict(rpn_proposal=dict(max_per_img=16), rcnn=dict(sampler=dict(num=16))),
    test_cfg=dict(rpn=dict(max_per_img=16), rcnn=dict(score_thr=0.0, max_per_img=4)))
train_cfg = dict(max_epochs=1)
'''


def load_tool(name):
    path = ROOT / 'tools' / f'{name}.py'
    spec = importlib.util.spec_from_file_location(f'tool_{path.stem}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train, test, get_flops = map(load_tool, ('train', 'test', 'analysis/get_flops'))


def make_coco(root, images=2):
    """Make a COCO folder of random images with one rectangle each."""
    rng = np.random.default_rng(0)
    categories = [dict(id=i, name=name)
                  for i, name in enumerate(CocoDataset.METAINFO['classes'], start=1)]
    (root / 'annotations').mkdir(parents=True)
    for split in ('train2017', 'val2017'):
        (root / split).mkdir()
        coco = dict(images=[], annotations=[], categories=categories)
        for i in range(1, images + 1):
            name = f'{i:012}.jpg'
            cv2.imwrite(str(root / split / name), rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
            coco['images'].append(dict(id=i, file_name=name, width=64, height=48))
            coco['annotations'].append(dict(
                id=i, image_id=i, category_id=1, bbox=[8, 8, 32, 24], area=768, iscrowd=0,
                segmentation=[[8, 8, 40, 8, 40, 32, 8, 32]]))
        (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(coco))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The folder of a run of one epoch, with config.py and the data under coco/."""
    folder = tmp_path_factory.mktemp('trained')
    make_coco(folder / 'coco')
    (folder / 'config.py').write_text(TINY_DETECTOR)
    train.main([str(folder / 'config.py'), '--work-dir', str(folder / 'run'), '--seed', '1',
                '--cfg-options', f'data_root={folder / "coco"}'])
    return folder


@pytest.fixture
def coco(tmp_path):
    """A good COCO folder and the arguments of ``load_config`` that use it."""
    make_coco(tmp_path / 'coco')
    return tmp_path / 'coco', (str(TINY), dict(data_root=str(tmp_path / 'coco')))


def edit(path, change):
    """Rewrite a JSON file after ``change(content)``."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def spy(function, seen):
    """``function``, noting the tensors it is given in ``seen``."""
    def spied(*args, **kwargs):
        seen.extend(arg for arg in args if torch.is_tensor(arg))
        return function(*args, **kwargs)
    return spied


def run_log(folder):
    return ''.join(path.read_text() for path in sorted(folder.rglob('*.log')))


class TestOptions:

    def test_data_root_moves_every_path(self):
        cfg = load_config(TINY, {'data_root': '/elsewhere/coco'})
        assert cfg.data_root == '/elsewhere/coco/'
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            assert loader.dataset.data_root == '/elsewhere/coco/'
        for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
            assert evaluator.ann_file == '/elsewhere/coco/annotations/instances_val2017.json'
        assert 'data/coco' not in str(cfg.to_dict())

    def test_more_specific_option_wins(self):
        cfg = load_config(TINY, {'data_root': '/a', 'val_dataloader.dataset.data_root': '/b/'})
        assert cfg.train_dataloader.dataset.data_root == '/a/'
        assert cfg.val_dataloader.dataset.data_root == '/b/'

    def test_data_root_from_the_environment(self, monkeypatch):
        monkeypatch.setenv('COCO_ROOT', '/from/environment')
        cfg = load_config(TINY)
        assert cfg.train_dataloader.dataset.data_root == '/from/environment/'
        assert cfg.val_evaluator.ann_file.startswith('/from/environment/annotations/')

    def test_data_root_leaves_similar_paths_alone(self):
        cfg = Config(dict(data_root='data/a', other='data/ab/x', inside=['data/a/x', ('data/a',)]))
        set_data_root(cfg, '/b')
        assert (cfg.other, cfg.inside) == ('data/ab/x', ['/b/x', ('/b',)])

    @pytest.mark.parametrize('variables, value, message', [
        (dict(), '/b', 'no top-level variable data_root'),
        (dict(data_root='a'), 3, 'got 3'),
    ])
    def test_bad_data_root(self, variables, value, message):
        with pytest.raises(UsageError, match=message):
            set_data_root(Config(variables), value)

    def test_pretrained(self):
        cfg = load_config(TINY, {'pretrained': 'x.pth'})
        assert cfg.model.backbone.init_cfg == dict(type='Pretrained', checkpoint='x.pth')
        cfg = load_config(TINY, {'pretrained': None})
        assert cfg.model.backbone.init_cfg is None

    def test_pretrained_keeps_the_prefix(self):
        init_cfg = dict(type='Pretrained', checkpoint='a.pth', prefix='backbone.')
        cfg = Config(dict(model=dict(backbone=dict(init_cfg=init_cfg))))
        set_pretrained(cfg, 'b.pth')
        assert cfg.model.backbone.init_cfg == dict(init_cfg, checkpoint='b.pth')

    def test_pretrained_needs_a_backbone(self):
        with pytest.raises(UsageError, match='no backbone'):
            set_pretrained(Config(dict(model=dict(type='Net'))), 'x.pth')

    def test_empty_environment_variable(self, monkeypatch):
        monkeypatch.setenv('COCO_ROOT', '')
        with pytest.raises(UsageError, match='environment variable COCO_ROOT is empty; unset it'):
            load_config(TINY)

    def test_key_error_in_the_config(self, tmp_path):
        (tmp_path / 'config.py').write_text("x = {}['gone']")
        with pytest.raises(UsageError, match="cannot read .*config.py: KeyError: 'gone'"):
            load_config(str(tmp_path / 'config.py'))

    def test_work_dir(self):
        assert load_config(TINY).work_dir == 'work_dirs/mask_rcnn_spatialmamba_t_1x'
        assert load_config(TINY, work_dir='/w').work_dir == '/w'


class TestAmp:

    @pytest.fixture
    def cuda(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda: True)

    @pytest.mark.usefixtures('cuda')
    @pytest.mark.parametrize('name, dtype, loss_scale', [
        ('bf16', 'bfloat16', dict(enabled=False)),
        ('fp16', 'float16', 'dynamic'),
    ])
    def test_optim_wrapper(self, name, dtype, loss_scale):
        cfg = load_config(TINY)
        set_amp(cfg, name, training=True)
        assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
        assert cfg.optim_wrapper.dtype == dtype
        assert cfg.optim_wrapper.loss_scale == loss_scale
        assert cfg.optim_wrapper.optimizer.type == 'AdamW'

    @pytest.mark.usefixtures('cuda')
    def test_test_loop(self, monkeypatch):
        defaults = []
        monkeypatch.setattr(torch, 'set_autocast_dtype', lambda *args: defaults.append(args))
        cfg = load_config(TINY)
        set_amp(cfg, 'bf16', training=False)
        assert cfg.test_cfg.fp16
        assert defaults == [('cuda', torch.bfloat16)]

    @pytest.mark.usefixtures('cuda')
    @pytest.mark.parametrize('name, changed', [('bf16', True), ('fp16', False)])
    def test_bf16_uses_torchvision_roi_align(self, name, changed):
        types = ('RoIAlign', 'mmcv.RoIAlign', 'RoIPool')
        layers = [dict(type=kind, output_size=7) for kind in types]
        model = dict(roi_head=dict(extractors=[dict(roi_layer=layer) for layer in layers]))
        cfg = Config(dict(model=model, optim_wrapper=dict()))
        note = set_amp(cfg, name, training=True)
        found = ['use_torchvision' in item.roi_layer for item in cfg.model.roi_head.extractors]
        assert found == [changed, changed, False]
        assert ('2 RoIAlign' in note) == changed

    def test_bf16_step_and_prediction(self, tmp_path):
        (tmp_path / 'config.py').write_text(TINY_DETECTOR)
        torch.manual_seed(0)
        model = get_flops.build_model(load_config(str(tmp_path / 'config.py')))
        keep_boxes_fp32(model)
        proposals = []
        model.rpn_head.bbox_coder.decode = spy(model.rpn_head.bbox_coder.decode, proposals)
        data = demo_mm_inputs(1, [[3, 64, 64]], num_classes=80, num_items=[2], with_mask=True)
        data = model.data_preprocessor(data, True)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            loss, _ = model.parse_losses(model(**data, mode='loss'))
            with torch.no_grad():
                prediction, = model(**data, mode='predict')
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        assert prediction.pred_instances.bboxes.dtype == torch.float32
        assert {tensor.dtype for tensor in proposals} == {torch.float32}

    def test_no_device(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
        with pytest.raises(UsageError, match='--amp bf16 needs a CUDA device'):
            set_amp(load_config(TINY), 'bf16', training=True)

    @pytest.mark.usefixtures('cuda')
    def test_other_wrapper(self):
        cfg = Config(dict(model=dict(), optim_wrapper=dict(type='ApexOptimWrapper')))
        with pytest.raises(UsageError, match='got ApexOptimWrapper'):
            set_amp(cfg, 'fp16', training=True)


class TestDataCheck:

    def test_missing_folder_comes_before_the_model(self, monkeypatch):
        monkeypatch.setattr(train.Runner, 'from_cfg', lambda cfg: pytest.fail('built'))
        with pytest.raises(SystemExit, match='no such file or folder: /gone; .*data_root=FOLDER'):
            train.main([str(TINY), '--cfg-options', 'data_root=/gone'])

    def test_good_data(self, coco):
        check_data(load_config(*coco[1]), ('train', 'val', 'test'))

    @pytest.mark.parametrize('change, message', [
        (lambda coco: coco.update(images=[]), 'names no images'),
        (lambda coco: coco.update(annotations=[]),
         'no image has annotations of the classes to train on'),
        (lambda coco: [item.update(image_id=99) for item in coco['annotations']],
         'no image has annotations of the classes to train on'),
        (lambda coco: coco['categories'][0].update(name='digit'),
         '1 of the 80 classes are no categories of .*json: person; it has digit, bicycle'),
        (lambda coco: coco['images'][1].update(file_name='gone.jpg'),
         '1 of the 2 images .* are not in .*train2017: gone.jpg'),
        (lambda coco: [image.update(height=20) for image in coco['images']],
         'min_size=32: all 2 annotated images of .* are smaller'),
        (lambda coco: coco.update(images={}), 'images is a dict, not a list: .*train2017.json'),
        (lambda coco: coco.pop('images'), 'images is missing'),
        (lambda coco: coco.update(annotations='x'), 'annotations is a str, not a list'),
        (lambda coco: coco['images'].append(3), r'images\[2\] is a int, not an object'),
        (lambda coco: coco['images'][1].pop('file_name'), r'images\[1\] lacks file_name: /.*json'),
        (lambda coco: [coco['images'][0].pop(key) for key in ('id', 'width', 'height')],
         r'images\[0\] lacks id, width, height'),
        (lambda coco: [coco['annotations'][1].pop(key) for key in ('image_id', 'category_id')],
         r'annotations\[1\] lacks image_id, category_id'),
        (lambda coco: coco['annotations'][0].pop('id'), r'annotations\[0\] lacks id'),
        (lambda coco: coco['categories'][4].pop('name'), r'categories\[4\] lacks name'),
    ])
    def test_bad_annotations(self, coco, change, message):
        edit(coco[0] / 'annotations' / 'instances_train2017.json', change)
        with pytest.raises(UsageError, match=message):
            check_data(load_config(*coco[1]), ['train'])

    def test_not_json(self, coco):
        (coco[0] / 'annotations' / 'instances_train2017.json').write_text('{"images": [')
        with pytest.raises(UsageError, match='not valid JSON'):
            check_data(load_config(*coco[1]), ['train'])

    def test_a_list_is_no_annotation_file(self, coco):
        (coco[0] / 'annotations' / 'instances_train2017.json').write_text('[]')
        with pytest.raises(UsageError, match='holds a list, not an object with images'):
            check_data(load_config(*coco[1]), ['train'])

    def test_format_of_its_own(self, coco):
        cfg = load_config(*coco[1])
        cfg.train_dataloader.dataset.type = 'BaseDetDataset'
        edit(coco[0] / 'annotations' / 'instances_train2017.json',
             lambda coco: coco['images'][1].pop('file_name'))
        check_data(cfg, ['train'])

    def test_lvis_names_images_by_url(self, coco):
        cfg = load_config(*coco[1])
        cfg.train_dataloader.dataset.type = 'LVISV1Dataset'
        cfg.train_dataloader.dataset.metainfo = dict(classes=('person',))
        edit(coco[0] / 'annotations' / 'instances_train2017.json',
             lambda coco: [image.pop('file_name') for image in coco['images']])
        check_data(cfg, ['train'])

    def test_file_names_need_not_be_normal(self, coco):
        edit(coco[0] / 'annotations' / 'instances_train2017.json', lambda coco: coco['images'][1].update(
            file_name='./' + coco['images'][1]['file_name']))
        check_data(load_config(*coco[1]), ['train'])

    def test_empty_image(self, coco):
        image = coco[0] / 'train2017' / f'{2:012}.jpg'
        image.write_bytes(b'')
        with pytest.raises(UsageError, match=rf'1 of the 2 images are empty files .* {image}'):
            check_data(load_config(*coco[1]), ['train'])

    def test_broken_link(self, coco):
        image = coco[0] / 'train2017' / f'{2:012}.jpg'
        image.unlink()
        image.symlink_to('/gone.jpg')
        with pytest.raises(UsageError, match='1 of the 2 images .* are not in'):
            check_data(load_config(*coco[1]), ['train'])

    def test_missing_annotation_file(self, coco):
        path = coco[0] / 'annotations' / 'instances_val2017.json'
        path.unlink()
        message = rf'val_dataloader.dataset.ann_file: .*{path}; .*data_root=FOLDER'
        with pytest.raises(UsageError, match=message):
            check_data(load_config(*coco[1]), ('train', 'val'))

    def test_missing_annotation_file_of_the_evaluator(self, coco):
        cfg = load_config(coco[1][0], {**coco[1][1], 'val_evaluator.ann_file': '/gone.json'})
        with pytest.raises(UsageError, match='val_evaluator.ann_file=PATH'):
            check_data(cfg, ['val'])

    def test_empty_image_folder(self, coco):
        for image in (coco[0] / 'train2017').iterdir():
            image.unlink()
        with pytest.raises(UsageError, match='data_prefix.img: empty folder: .*train2017'):
            check_data(load_config(*coco[1]), ['train'])

    def test_wrapped_datasets(self, coco):
        cfg = load_config(*coco[1])
        inner = cfg.train_dataloader.dataset
        gone = ConfigDict(inner, data_root='/gone/')
        cfg.train_dataloader.dataset = dict(
            type='RepeatDataset', times=2,
            dataset=dict(type='ConcatDataset', datasets=[inner, gone]))
        with pytest.raises(UsageError, match=r'dataset.dataset.datasets.1.data_root: .* /gone;'):
            check_data(cfg, ['train'])

    def test_config_of_classes(self, coco):
        cfg = load_config(*coco[1])
        cfg.train_dataloader.dataset.type = CocoDataset
        edit(coco[0] / 'annotations' / 'instances_train2017.json',
             lambda coco: coco.update(categories=[]))
        with pytest.raises(UsageError, match='80 of the 80 classes'):
            check_data(cfg, ['train'])

    def test_data_that_is_fetched(self):
        dataset = dict(type='CIFAR10', data_root='/gone/')
        check_data(Config(dict(train_dataloader=dict(dataset=dataset))), ['train'])


class TestCheckpointCheck:

    def test_missing(self):
        with pytest.raises(UsageError, match='checkpoint not found: .*/gone.pth'):
            check_checkpoint('gone.pth', 'checkpoint')

    def test_truncated(self, tmp_path):
        path = tmp_path / 'cut.pth'
        torch.save(dict(state_dict=dict(a=torch.zeros(1000))), path)
        path.write_bytes(path.read_bytes()[:2000])
        with pytest.raises(UsageError, match=rf'^my file {path} \(2000 bytes\) cannot be read: .*; try X$'):
            check_checkpoint(str(path), 'my file', 'try X')

    @pytest.mark.parametrize('content', [b'', b'abc', b'\x80\x02}', b'\x80\x04\x95'])
    def test_damaged(self, tmp_path, content):
        (tmp_path / 'damaged.pth').write_bytes(content)
        with pytest.raises(UsageError, match='cannot be read'):
            check_checkpoint(str(tmp_path / 'damaged.pth'), 'checkpoint')

    def test_not_a_checkpoint(self, tmp_path):
        path = tmp_path / 'page.pth'
        path.write_text('<html>404</html>')
        with pytest.raises(UsageError, match='cannot be read'):
            check_checkpoint(str(path), 'checkpoint')

    def test_not_a_dict(self, tmp_path):
        torch.save([1, 2], tmp_path / 'list.pth')
        with pytest.raises(UsageError, match='holds a list'):
            check_checkpoint(str(tmp_path / 'list.pth'), 'checkpoint')

    def test_code_is_not_run(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (Path.touch, (tmp_path / 'ran',))

        torch.save(dict(state_dict=Evil()), tmp_path / 'evil.pth')
        with pytest.raises(UsageError, match='cannot be read'):
            check_checkpoint(str(tmp_path / 'evil.pth'), 'checkpoint')
        assert not (tmp_path / 'ran').exists()


class TestImports:

    @pytest.fixture
    def broken(self, monkeypatch):
        """MMPretrain as it is beside transformers 5."""
        kept = {name: module for name, module in sys.modules.items()
                if name.split('.')[0] == 'mmpretrain'}
        monkeypatch.setattr(engine_config, '_mmpretrain_error', lambda: 'ImportError: no name X')
        monkeypatch.setattr(engine_config.importlib.metadata, 'version', lambda name: '5.0.0')
        yield
        sys.modules.pop('mmpretrain', None)
        sys.modules.update(kept)

    @pytest.mark.usefixtures('broken')
    def test_detection_goes_on(self):
        note = engine_config.import_modules(Config(dict(default_scope='mmdet')))
        assert 'transformers 5.0.0 (ImportError: no name X); going on without it' in note
        with pytest.raises(ImportError):
            import mmpretrain  # noqa: F401

    @pytest.mark.usefixtures('broken')
    @pytest.mark.parametrize('cfg', [
        dict(default_scope='mmpretrain'),
        dict(default_scope='mmdet', model=dict(backbone=dict(type='mmpretrain.ConvNeXt'))),
    ])
    def test_needed(self, cfg):
        with pytest.raises(UsageError, match='this config needs it: pip install "transformers<5"'):
            engine_config.import_modules(Config(cfg))

    def test_failing_custom_import(self):
        cfg = Config(dict(custom_imports=dict(imports=['not_there'])))
        with pytest.raises(UsageError, match="custom_imports: .*No module named 'not_there'"):
            engine_config.import_modules(cfg)


    @pytest.mark.parametrize('version, tried', [('4.57.1', False), ('5.0.0', True), ('10.1', True)])
    def test_only_new_transformers_are_blamed(self, monkeypatch, version, tried):
        def fail(name):
            raise ImportError('no name X')

        monkeypatch.setattr(engine_config.importlib.metadata, 'version', lambda name: version)
        monkeypatch.setattr(engine_config.importlib.util, 'find_spec', lambda name: True)
        monkeypatch.setattr(engine_config.importlib, 'import_module', fail)
        assert engine_config._mmpretrain_error() == ('ImportError: no name X' if tried else '')

    def test_no_transformers(self, monkeypatch):
        def version(name):
            raise engine_config.importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(engine_config.importlib.metadata, 'version', version)
        monkeypatch.setattr(engine_config.importlib, 'import_module', lambda name: pytest.fail('imported'))
        assert engine_config._mmpretrain_error() == ''


class TestOneLineErrors:

    def build(self, **cfg):
        with one_line_errors():
            MODELS.build(cfg)

    def test_backbone(self):
        with pytest.raises(SystemExit, match=r"^error: ValueError: .*SpatialMamba: arch='huge', expected one"):
            self.build(type='SpatialMamba', arch='huge')

    def test_registry(self):
        with pytest.raises(SystemExit, match='^error: KeyError: .*Gone is not in the'):
            self.build(type='Gone')
        with pytest.raises(SystemExit, match="^error: TypeError: .*unexpected keyword argument 'size'"):
            self.build(type='SpatialMamba', size=3)

    def test_backend(self):
        with pytest.raises(SystemExit, match='^error: op: no backend'), one_line_errors():
            raise BackendError('op: no backend')

    @pytest.mark.parametrize('kind', [ValueError, TypeError, RuntimeError, KeyError])
    def test_bugs_keep_their_traceback(self, kind):
        class Buggy:
            def __init__(self):
                raise kind('bug')

            def forward(self):
                SpatialMamba(dict(embed_dims=16, depths=[1, 1, 1, 1])).forward('no tensor')

        with pytest.raises(kind, match='bug'), one_line_errors():
            Buggy()
        if 'type(e)' not in inspect.getsource(build_from_cfg):  # the original MMEngine says what was built
            with pytest.raises(kind, match='bug'):
                self.build(type=Buggy)
        # Our own errors outside of building: a traceback says where the tensor came from.
        with pytest.raises(TypeError, match='input is a str'), one_line_errors():
            Buggy.forward(None)

    def test_backend_is_checked_up_front(self, monkeypatch):
        monkeypatch.setenv('MMVSSM_BACKEND', 'nonsense')
        for tool in (train, test):
            with pytest.raises(SystemExit, match='^error: MMVSSM_BACKEND=nonsense: no such .* are .*torch'):
                tool.main(['gone.py', 'gone.pth'][:1 if tool is train else 2])
        for name in ('torch', ''):
            monkeypatch.setenv('MMVSSM_BACKEND', name)
            check_backend()


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
              'model.roi_head.bbox_head.num_classes=7')
        log = run_log(tmp_path)
        total = sum('num_batches' not in name for name in state)
        assert f'load_from: {total - 4} of the {total} weights of the model are in the checkpoint' in log
        box = 'roi_head.bbox_head.fc'
        assert f'of another shape: {box}_cls.weight, {box}_cls.bias, {box}_reg.weight, {box}_reg.bias\n' in log
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


class TestTest:

    def evaluate(self, trained, work_dir, *options):
        test.main([str(trained / 'config.py'), str(trained / 'run' / 'epoch_1.pth'), '--work-dir',
                   str(work_dir), *options, '--cfg-options', f'data_root={trained / "coco"}'])

    def test_out_and_show_dir(self, trained, tmp_path):
        out, show_dir = tmp_path / 'new' / 'predictions.pkl', tmp_path / 'drawn'
        self.evaluate(trained, tmp_path, '--out', str(out), '--show-dir', str(show_dir))
        predictions = pickle.loads(out.read_bytes())
        assert len(predictions) == 2
        assert {'bboxes', 'labels', 'scores', 'masks'} <= set(predictions[0]['pred_instances'])
        assert len(list(show_dir.glob('*.jpg'))) == 2
        metrics = json.loads(next(tmp_path.glob('*/*.json')).read_text())
        assert {'coco/bbox_mAP', 'coco/segm_mAP'} <= set(metrics)

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


class TestGetFlops:

    def count(self, capsys, *arguments):
        """The printed parameters and FLOPs, the latter in G."""
        get_flops.main([str(argument) for argument in arguments])
        printed = capsys.readouterr().out
        parameters = re.search(r'^parameters: ([0-9,]+)$', printed, re.MULTILINE)[1]
        flops = re.search(r'^FLOPs: ([0-9.]+) G$', printed, re.MULTILINE)[1]
        return int(parameters.replace(',', '')), float(flops), printed

    def test_published_detector(self, capsys):
        parameters, flops, printed = self.count(capsys, TINY)
        assert parameters == 46_387_782
        assert flops == pytest.approx(261, rel=0.02)
        assert 'input: 3 x 800 x 1280' in printed
        assert 'not counted (calls): ' in printed
        assert 'mmvssm::' not in re.search('not counted.*', printed)[0]

    def test_shape_and_table(self, capsys, tmp_path):
        (tmp_path / 'config.py').write_text(TINY_DETECTOR)
        _, small, _ = self.count(capsys, tmp_path / 'config.py', '--shape', 64, 64)
        _, large, printed = self.count(
            capsys, tmp_path / 'config.py', '--shape', 128, 128, '--depth', 1)
        assert small < large
        for name in ('backbone', 'neck', 'rpn_head', 'roi_head'):
            assert re.search(rf'^ +[0-9,]+ +[0-9.]+  {name}$', printed, re.MULTILINE)

    def test_bad_shape(self):
        with pytest.raises(SystemExit, match=r'--shape takes two positive numbers, got \[0, 64\]'):
            get_flops.main([str(TINY), '--shape', '0', '64'])
