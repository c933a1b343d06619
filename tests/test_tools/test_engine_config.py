"""What the tools do to a config before a Runner takes it, and how they tell mistakes."""
import inspect
import sys

import pytest
import torch
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.registry.build_functions import build_from_cfg
from tool_testing import TINY, TINY_DETECTOR, load_tool

from mmvssm.engine import config as engine_config
from mmvssm.engine.config import (
    RANKS,
    TrainingError,
    UsageError,
    check_backend,
    check_launcher,
    keep_boxes_fp32,
    load_config,
    one_line_errors,
    set_amp,
    set_data_root,
    set_pretrained,
)
from mmvssm.kernels import BackendError
from mmvssm.models.backbones import SpatialMamba

train, test, get_flops = map(load_tool, ('train', 'test', 'analysis/get_flops'))


def spy(function, seen):
    """``function``, noting the tensors it is given in ``seen``."""
    def spied(*args, **kwargs):
        seen.extend(arg for arg in args if torch.is_tensor(arg))
        return function(*args, **kwargs)
    return spied


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

    @pytest.mark.parametrize('rank, message', [('0', 'error: loss is nan'), ('3', 'error: rank 3: loss is nan')])
    def test_every_rank_says_what_ends_training(self, monkeypatch, rank, message):
        monkeypatch.setenv('RANK', rank)
        with pytest.raises(SystemExit) as caught, one_line_errors():
            raise TrainingError('loss is nan')
        assert caught.value.code == message

    @pytest.mark.parametrize('error', [UsageError('no file'), BackendError('no backend')], ids=type)
    @pytest.mark.parametrize('launcher', RANKS)
    @pytest.mark.parametrize('rank, local, expected', [
        ('0', '0', 'error: {}'), ('3', '3', 1), ('8', '0', 'error: rank 8: {}'),
    ], ids=['main', 'beside', 'other_machine'])
    def test_what_all_meet_is_said_by_the_first(self, monkeypatch, rank, local, expected, launcher, error):
        for name, value in zip(RANKS[launcher], (rank, local), strict=True):
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as caught, one_line_errors():
            raise error
        assert caught.value.code == (expected if expected == 1 else expected.format(error))

    def test_every_rank_says_what_cannot_be_built(self, monkeypatch):
        """As data that one lacks."""
        for name in RANKS['pytorch']:
            monkeypatch.setenv(name, '1')
        with pytest.raises(SystemExit, match=r'^error: rank 1: ValueError: .*huge'), one_line_errors():
            MODELS.build(dict(type='SpatialMamba', arch='huge'))

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


class TestLauncher:

    def test_none(self):
        check_launcher('none')

    @pytest.mark.parametrize('launcher', RANKS)
    def test_did_not_start_this_process(self, launcher, monkeypatch):
        for names in RANKS.values():
            for name in names:
                monkeypatch.delenv(name, raising=False)
        with pytest.raises(UsageError, match=f'^--launcher {launcher}: {" and ".join(RANKS[launcher])} not set; '):
            check_launcher(launcher)

    @pytest.mark.parametrize('launcher', RANKS)
    @pytest.mark.parametrize('gpus', [0, 2])
    def test_more_processes_than_gpus(self, launcher, gpus, monkeypatch):
        monkeypatch.setattr(torch.accelerator, 'device_count', lambda: gpus)
        for name in RANKS[launcher]:
            monkeypatch.setenv(name, '2')
        with pytest.raises(UsageError, match=f'no GPU for process 3 of this machine, PyTorch sees {gpus}; '):
            check_launcher(launcher)

    def test_as_many_processes_as_gpus(self, monkeypatch):
        monkeypatch.setattr(torch.accelerator, 'device_count', lambda: 2)
        for name in RANKS['pytorch']:
            monkeypatch.setenv(name, '1')
        check_launcher('pytorch')
