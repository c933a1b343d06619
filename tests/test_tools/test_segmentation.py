"""Segmentation through the tools, and images and label maps that do not fit each other or the classes."""
import json
import re
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.structures import PixelData
from mmseg.datasets import BaseSegDataset
from mmseg.structures import SegDataSample
from mmseg.visualization import SegLocalVisualizer
from PIL import Image
from tool_testing import ROOT, load_tool, run_log

from mmvssm.engine import segmentation_check
from mmvssm.engine.config import TrainingError, UsageError, load_config
from mmvssm.engine.data_check import check_data
from mmvssm.engine.label_hook import LabelRangeHook

train, test = map(load_tool, ('train', 'test'))

CONFIG = ROOT / 'configs' / 'upernet_spatialmamba_t_160k.py'
IMAGES = 3
HEIGHT, WIDTH = 40, 56

# The ADE20K recipe on crops of 32x32 with a few channels, for two iterations.
SMALL = f'''
_base_ = {str(CONFIG)!r}
pretrained = None
load, pack = dict(type='LoadImageFromFile'), dict(type='PackSegInputs')
labels = dict(type='LoadAnnotations', reduce_zero_label=True)
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False,
    dataset=dict(pipeline=[load, labels, dict(type='RandomCrop', crop_size=(32, 32)), pack]))
val_dataloader = dict(
    num_workers=0, persistent_workers=False,
    dataset=dict(pipeline=[load, dict(type='Resize', scale=(128, 64), keep_ratio=True), labels, pack]))
test_dataloader = val_dataloader
model = dict(
    data_preprocessor=dict(size=(32, 32)),
    backbone=dict(arch=dict(_delete_=True, embed_dims=8, depths=[1, 1, 1, 1]), drop_path_rate=0., init_cfg=None),
    decode_head=dict(in_channels=[8, 16, 32, 64], channels=8),
    auxiliary_head=dict(in_channels=32, channels=8))
train_cfg = dict(max_iters=2, val_interval=2)
'''


def make_ade20k(root):
    """Noisy images, dark on the left and bright on the right, with label maps in squares of labels 0 to 150."""
    rng = np.random.default_rng(0)
    for split in ('training', 'validation'):
        for kind in ('images', 'annotations'):
            (root / kind / split).mkdir(parents=True)
        for i in range(IMAGES):
            picture = rng.integers(0, 60, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            picture[:, WIDTH // 2:] += 190
            assert cv2.imwrite(str(root / 'images' / split / f'{i}.jpg'), picture)
            labels = rng.integers(0, 151, (HEIGHT // 8, WIDTH // 8), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            labels[:8, :8], labels[-8:, -8:] = 0, 150
            write_labels(label_map(root, i, split), labels)


def label_map(root, index=1, split='training'):
    return root / 'annotations' / split / f'{index}.png'


def read_maps(folder):
    return [np.asarray(Image.open(path)) for path in folder.glob('*.png')]


def write_labels(path, labels):
    Image.fromarray(labels).save(path)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The folder of a run, with config.py and the data in ade/."""
    folder = tmp_path_factory.mktemp('segmentation')
    make_ade20k(folder / 'ade')
    (folder / 'config.py').write_text(SMALL)
    train.main([str(folder / 'config.py'), '--work-dir', str(folder / 'run'), '--seed', '1', '--cfg-options',
                f'data_root={folder / "ade"}/'])
    return folder


class TestTools:

    def evaluate(self, trained, out, *options):
        SegLocalVisualizer._instance_dict.clear()  # or the one of training would draw, into its folder
        test.main([str(trained / 'config.py'), str(trained / 'run' / 'iter_2.pth'), '--work-dir', str(out),
                   *options, '--cfg-options', f'data_root={trained / "ade"}/'])
        return json.loads(next(out.glob('*/*.json')).read_text())['mIoU']

    def test_training(self, trained):
        log = run_log(trained / 'run')
        assert 'Iter(val)' in log
        assert 'mIoU' in log

    def test_sync_bn_becomes_bn_on_one_device(self, trained, tmp_path, monkeypatch):
        assert 'SyncBatchNorm (SyncBN) layers in the model will be automatically' in run_log(trained / 'run')
        models = []
        monkeypatch.setattr(test.Runner, 'test', lambda runner: models.append(runner.model))
        test.main([str(trained / 'config.py'), str(trained / 'run' / 'iter_2.pth'), '--work-dir', str(tmp_path),
                   '--tta', '--cfg-options', f'data_root={trained / "ade"}/'])
        assert not any(isinstance(layer, torch.nn.SyncBatchNorm) for layer in models[0].modules())

    def test_tta_averages_scales_and_flips(self, trained, tmp_path, monkeypatch):
        """A model that tells dark (class 0) from bright (class 1) does so where the views show them."""
        seen = []

        def encode_decode(model, inputs, metas):
            seen.append(tuple(inputs.shape[-2:]))
            logits = inputs.new_full((len(inputs), 150, *inputs.shape[-2:]), -100)
            logits[:, 1] = inputs.mean(1)
            logits[:, 0] = -logits[:, 1]
            return logits

        monkeypatch.setattr('mmseg.models.EncoderDecoder.encode_decode', encode_decode)
        self.evaluate(trained, tmp_path, '--tta', '--out', str(tmp_path / 'maps'))
        # 40x56 within 64x128 times 0.5, 0.75, ... 1.75, each twice.
        sizes = [(32, 45), (48, 67), (64, 90), (80, 112), (96, 134), (112, 157)]
        assert sorted(seen) == sorted(sizes * 2 * IMAGES)
        for labels in read_maps(tmp_path / 'maps'):
            assert (labels[:, :WIDTH // 2 - 4] == 1).all()  # numbered as in ADE20K's files
            assert (labels[:, WIDTH // 2 + 4:] == 2).all()

    @pytest.mark.parametrize('options', [(), ('--tta',)], ids=['plain', 'tta'])
    def test_pictures_and_label_maps(self, trained, tmp_path, options):
        self.evaluate(trained, tmp_path, '--out', str(tmp_path / 'maps'), '--show-dir', str(tmp_path / 'pictures'),
                      *options)
        assert len(list((tmp_path / 'pictures').rglob('*.png'))) == IMAGES
        assert [labels.shape for labels in read_maps(tmp_path / 'maps')] == [(HEIGHT, WIDTH)] * IMAGES

    def test_missing_folder(self, monkeypatch):
        monkeypatch.delenv('ADE20K_ROOT', raising=False)
        with pytest.raises(SystemExit, match='^error: train_dataloader.dataset.data_root: no such file or folder: '
                           '/.*/ADEChallengeData2016; set it with --cfg-options data_root=FOLDER$'):
            train.main([str(CONFIG)])

    def test_label_that_only_training_meets(self, trained, tmp_path, monkeypatch):
        """The few label maps that are read beforehand do not have it."""
        make_ade20k(tmp_path / 'ade')
        labels = np.full((HEIGHT, WIDTH), 200, np.uint8)
        write_labels(label_map(tmp_path / 'ade'), labels)
        monkeypatch.setattr('mmvssm.engine.segmentation_check.SAMPLE', 1)
        with pytest.raises(SystemExit, match=rf'^error: label map {label_map(tmp_path / "ade")} has labels 199, '
                           'expected 0 to 149 for wall, building, sky, ..., or 255, .*greater by 1$') as raised:
            train.main([str(trained / 'config.py'), '--work-dir', str(tmp_path / 'run'), '--cfg-options',
                        f'data_root={tmp_path / "ade"}/'])
        assert '\n' not in raised.value.code


def hook_message(labels, classes=3, shifted=False, **head):
    """What the hook says of a batch of one label map, '' for nothing."""
    dataset = SimpleNamespace(metainfo=dict(classes=tuple('abcdefgh'[:classes]), reduce_zero_label=shifted))
    runner = SimpleNamespace(
        train_dataloader=SimpleNamespace(dataset=dataset),
        model=SimpleNamespace(module=SimpleNamespace(decode_head=SimpleNamespace(**head))))
    sample = SegDataSample(metainfo=dict(seg_map_path='/data/x.png'))
    sample.gt_sem_seg = PixelData(data=torch.tensor([[labels]]))
    hook = LabelRangeHook()
    hook.before_train(runner)
    try:
        hook.before_train_iter(runner, 0, dict(data_samples=[sample]))
    except TrainingError as error:
        return str(error)
    return ''


class TestLabelRangeHook:

    @pytest.mark.parametrize('labels, options', [
        ([0, 2, 255], {}),
        ([0, 1], dict(classes=1)),
        ([0, 77], dict(ignore_index=77)),
    ], ids=['padding', 'one output for two classes', 'ignore_index'])
    def test_good(self, labels, options):
        assert hook_message(labels, **options) == ''

    @pytest.mark.parametrize('labels, options, message', [
        ([0, 3], {}, 'label map /data/x.png has labels 3, expected 0 to 2 for a, b, c, or 255, which is ignored'),
        ([8, 9], dict(classes=5), 'has labels 8, 9, expected 0 to 4 for a, b, c, ..., or'),
        ([2], dict(classes=1), 'has labels 2, expected 0 to 1 for a, or'),
        ([3], dict(shifted=True), 'labels 3, .*; reduce_zero_label=True: in the file they are greater by 1'),
    ], ids=['class count', 'several', 'one class', 'shifted'])
    def test_bad(self, labels, options, message):
        assert re.search(message, hook_message(labels, **options))

    @pytest.mark.parametrize('batch', [dict(data_samples=[SegDataSample()]), dict(inputs=[]), [1]],
                             ids=['no labels', 'no samples', 'no dict'])
    def test_other_batches(self, batch):
        hook = LabelRangeHook()
        hook.before_train(SimpleNamespace(train_dataloader=SimpleNamespace(dataset=[]), model=None))
        hook.names = ('a', 'b')
        hook.before_train_iter(None, 0, batch)


@pytest.fixture
def check(tmp_path):
    """A function that checks the training data of the small config in an ADE20K folder."""
    make_ade20k(tmp_path / 'ade')
    (tmp_path / 'config.py').write_text(SMALL)

    def run(dataset=None, split='train', **options):
        cfg = load_config(str(tmp_path / 'config.py'), {'data_root': f'{tmp_path / "ade"}/'})
        for key, value in (dataset or {}).items():
            cfg[f'{split}_dataloader'].dataset[key] = value
        cfg.merge_from_dict(options)
        check_data(cfg, [split])
    return run


def paint(value, dtype=np.uint8):
    """A change of an ADE20K folder: one label map has another label in its middle."""
    def change(root):
        labels = np.asarray(Image.open(label_map(root))).astype(dtype)
        labels[10:20, 10:20] = value
        write_labels(label_map(root), labels)
    return change


PLAIN = dict(type='BaseSegDataset', metainfo=dict(classes=[f'class {i}' for i in range(151)]),
             pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')])


class TestCheck:

    @pytest.mark.parametrize('change, options', [
        (paint(255), dict()),
        (paint(65535, np.uint16), dict()),
        (paint(1), dict(dataset=PLAIN)),
        (paint(220), {'model.decode_head.ignore_index': 219}),
        (paint(220), dict(split='val', val_evaluator=dict(type='IoUMetric', ignore_index=219))),
        (lambda root: label_map(root).unlink(), dict(dataset=dict(pipeline=[dict(type='LoadImageFromFile')]))),
        (lambda root: label_map(root).unlink(), dict(dataset=dict(pipeline=[dict(type='MyLoader')]))),
        (paint(220), dict(dataset=dict(backend_args=dict(backend='petrel')))),
        (lambda root: None, dict(dataset=dict(metainfo=dict(classes=('wall', 'sky'))))),
    ], ids=['ignored', '16 bits', 'other dataset', "head's ignore_index", "evaluator's ignore_index",
            'labels not read', 'own loader', 'storage backend', 'some classes'])
    def test_good(self, check, tmp_path, change, options):
        change(tmp_path / 'ade')
        check(**options)

    @pytest.mark.parametrize('change, options, message', [
        (paint(151), dict(), 'label map /.*/training/1.png has labels 151, expected 1 to 150 for wall, building, '
         'sky, ..., or 0 and 255, which are ignored; .*train_dataloader.dataset.metainfo.classes$'),
        (paint(257, np.uint16), dict(), 'has labels 257, expected 1 to 150'),
        (paint(151), dict(dataset=PLAIN), r'labels 151, expected 0 to 150 .* or 255, which is ignored; '
         '.*reduce_zero_label=True if classes are numbered from 1'),
        (paint(2), dict(dataset=dict(PLAIN, metainfo=dict(classes=['dot']))), 'expected 0 to 1 for dot'),
        (paint(151), dict(dataset=dict(metainfo=dict(classes=('wall', 'sky')))),
         'labels 151, expected 1 to 150 for wall, sky, or'),
        (lambda root: write_labels(label_map(root), np.zeros((HEIGHT, WIDTH, 3), np.uint8)), dict(),
         '/1.png has 3 channels, expected one'),
        (lambda root: write_labels(label_map(root), np.zeros((HEIGHT, 9), np.uint8)), dict(),
         f'/1.png has 9x{HEIGHT} pixels, but its image /.*/1.jpg has {WIDTH}x{HEIGHT} .width x height'),
        (lambda root: label_map(root).unlink(), dict(), '1 of the 3 label maps are missing: /.*/training/1.png$'),
        (lambda root: label_map(root).write_bytes(b''), dict(), '1 of the 3 label maps are empty files: /'),
        (lambda root: label_map(root).write_bytes(b'x'), dict(), 'label map cannot be read: /.*/1.png'),
        (lambda root: (root / 'images/training/1.jpg').write_bytes(b'x'), dict(), 'image cannot be read: /'),
        (lambda root: None, dict(dataset=dict(img_suffix='.tif')),
         r'no images \*.tif in /.*/images/training; it has 0.jpg, 1.jpg, .*img_suffix=ENDING'),
        (lambda root: (root / 'list.txt').write_text('0\n7'), dict(dataset=dict(ann_file='list.txt')),
         '1 of the 2 images are missing: /.*/7.jpg'),
        (lambda root: (root / 'list.txt').touch(), dict(dataset=dict(ann_file='list.txt')),
         'list.txt names no images'),
        (lambda root: None, dict(dataset=dict(type='BaseSegDataset')),
         'reduce_zero_label is False and that of LoadAnnotations in its pipeline True; make them equal'),
        (lambda root: None, dict(dataset=dict(metainfo=dict(classes=('wall', 'rat')))), 'rat.* is not a subset'),
        (lambda root: None, dict(dataset=dict(data_prefix=dict(img='images/training'))),
         'data_prefix: needs img_path, got .*images/training'),
    ], ids=['label', 'label above 255', 'label of other dataset', 'label of one class', 'label of some classes',
            'colours', 'size', 'no label map', 'empty label map', 'broken label map', 'broken image', 'suffix',
            'list', 'empty list', 'reduce_zero_label', 'unknown class', 'prefix'])
    def test_bad(self, check, tmp_path, change, options, message):
        change(tmp_path / 'ade')
        with pytest.raises(UsageError, match=f'^train_dataloader.dataset.*{message}') as raised:
            check(**options)
        assert '\n' not in str(raised.value)

    def test_label_maps_read_are_spread_over_the_dataset(self, check, tmp_path, monkeypatch):
        monkeypatch.setattr(segmentation_check, 'SAMPLE', 2)
        paint(151)(tmp_path / 'ade')
        check()
        label_map(tmp_path / 'ade').rename(label_map(tmp_path / 'ade', 2))
        write_labels(label_map(tmp_path / 'ade'), np.ones((HEIGHT, WIDTH), np.uint8))
        with pytest.raises(UsageError, match='training/2.png has labels 151'):
            check()

    def test_users_dataset_with_arguments_of_its_own(self, check):
        class Own(BaseSegDataset):
            def __init__(self, data_root, data_prefix, pipeline):
                super().__init__(data_root=data_root, data_prefix=data_prefix, pipeline=pipeline)

        check(dataset=dict(type=Own))
