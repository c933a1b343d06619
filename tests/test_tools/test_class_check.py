"""Heads whose number of classes is not the dataset's are named before anything is built."""
import re

import pytest
from mmengine.config import Config
from tool_testing import ROOT, load_tool

from mmvssm.engine.class_check import check_class_counts
from mmvssm.engine.config import UsageError, load_config

train, test = map(load_tool, ('train', 'test'))

TWO = dict(classes=('cat', 'dog'))
COCO = dict(type='CocoDataset')
COCO_TWO = dict(COCO, metainfo=TWO)
ADE = dict(type='ADE20KDataset')
SEG_TWO = dict(type='BaseSegDataset', metainfo=TWO)
CLS_TWO = dict(type='CustomDataset', metainfo=TWO)

RETINA = dict(type='RetinaNet', bbox_head=dict(type='RetinaHead', num_classes=80))
DETR = dict(type='DETR', bbox_head=dict(type='DETRHead', num_classes=80))
PANOPTIC = dict(type='PanopticFPN', roi_head=dict(bbox_head=dict(type='Shared2FCBBoxHead', num_classes=80)),
                semantic_head=dict(type='PanopticFPNHead', num_things_classes=80, num_stuff_classes=53))
GROUNDED = dict(type='GLIP', language_model=dict(), bbox_head=dict(type='ATSSVLFusionHead', num_classes=256))
UPERNET = dict(type='EncoderDecoder', decode_head=dict(type='UPerHead', num_classes=150),
               auxiliary_head=dict(type='FCNHead', num_classes=150))
OCRNET = dict(type='CascadeEncoderDecoder', decode_head=[dict(type='FCNHead', num_classes=150),
                                                         dict(type='OCRHead', num_classes=150)])
CLASSIFIER = dict(type='ImageClassifier', head=dict(type='LinearClsHead', num_classes=1000))


def rcnn(bbox=80, mask=80, **mask_head):
    return dict(type='MaskRCNN', rpn_head=dict(type='RPNHead'), roi_head=dict(
        bbox_head=dict(type='Shared2FCBBoxHead', num_classes=bbox),
        mask_head=dict(type='FCNMaskHead', num_classes=mask, **mask_head)))


def cascade(*counts):
    return dict(type='CascadeRCNN', roi_head=dict(
        bbox_head=[dict(type='Shared2FCBBoxHead', num_classes=count) for count in counts]))


def segmentor(head='FCNHead', auxiliary=None, **options):
    return dict(type='EncoderDecoder', decode_head=dict(type=head, **options), auxiliary_head=auxiliary)


def classifier(classes, **options):
    return dict(type='ImageClassifier', head=dict(type='LinearClsHead', num_classes=classes), **options)


def check(scope, model, dataset):
    cfg = Config(dict(default_scope=scope, model=model, val_dataloader=dict(dataset=dataset)))
    check_class_counts(cfg, ['val'])


@pytest.fixture
def folder(tmp_path):
    for name in ('ant', 'bee', 'cow'):
        (tmp_path / 'val' / name).mkdir(parents=True)
    return dict(type='CustomDataset', data_root=str(tmp_path), data_prefix='val')


@pytest.mark.parametrize('path', sorted((ROOT / 'configs').glob('*.py')), ids=lambda path: path.stem)
def test_own_configs(path):
    check_class_counts(load_config(str(path)), ('train', 'val', 'test'))


@pytest.mark.parametrize('scope, model, dataset', [
    ('mmdet', RETINA, COCO),
    ('mmdet', DETR, COCO),
    ('mmdet', rcnn(2, 80, class_agnostic=True), COCO_TWO),
    ('mmdet', dict(type='RPN', rpn_head=dict(type='RPNHead', num_classes=1)), COCO),
    ('mmdet', PANOPTIC, dict(type='CocoPanopticDataset')),
    ('mmdet', GROUNDED, COCO_TWO),
    ('mmdet', dict(type='Mine', bbox_head=dict(type='MyHead', num_classes=7)), COCO),
    ('mmdet', RETINA, dict(type='MyDataset')),
    ('mmdet', RETINA, dict(type='BaseDetDataset')),
    ('mmdet', RETINA, dict()),
    ('mmdet', RETINA, dict(COCO, metainfo=dict(classes='classes.txt'))),
    ('mmseg', UPERNET, ADE),
    ('mmseg', dict(segmentor(num_classes=20), text_encoder=dict()), ADE),
    ('mmseg', segmentor(num_classes=2, out_channels=1), dict(SEG_TWO, metainfo=dict(classes=['cell']))),
    ('mmseg', segmentor(num_classes=1), SEG_TWO),
    ('mmseg', segmentor(num_classes=150, auxiliary=dict(type='STDCHead', num_classes=2)), ADE),
    ('mmpretrain', classifier(2, data_preprocessor=dict(num_classes=1000)), CLS_TWO),
    ('mmpretrain', CLASSIFIER, dict(type='CustomDataset', data_root='gone', ann_file='list.txt')),
    ('mmpretrain', CLASSIFIER, dict(type='CustomDataset', data_root='gone')),
    ('mmpretrain', dict(type='MoCo', head=dict(type='ContrastiveHead')), CLS_TWO),
], ids=['RetinaNet', 'DETR', 'class-agnostic masks', 'RPN', 'things and stuff', 'text', 'own head', 'own dataset',
        'no classes', 'no type', 'classes in a file', 'UPerNet', 'text encoder', 'one output', 'one class',
        'edge target', 'preprocessor without mixing', 'list of images', 'missing folder', 'no num_classes'])
def test_good(scope, model, dataset):
    check(scope, model, dataset)


def test_good_folder(folder):
    check('mmpretrain', classifier(3), folder)


@pytest.mark.parametrize('scope, model, dataset, wrong, right', [
    ('mmdet', RETINA, COCO_TWO, {'bbox_head': 80}, 2),
    ('mmdet', DETR, dict(COCO, metainfo=dict(classes=list('abcdefg'))), {'bbox_head': 80}, 7),
    ('mmdet', RETINA, dict(type='RepeatDataset', times=2, dataset=dict(type='ConcatDataset', datasets=[COCO_TWO])),
     {'bbox_head': 80}, 2),
    ('mmdet', rcnn(2, 80), COCO_TWO, {'roi_head.mask_head': 80}, 2),
    ('mmdet', rcnn(81, 81), COCO, {'roi_head.bbox_head': 81, 'roi_head.mask_head': 81}, 80),
    ('mmdet', cascade(80, 3, 80), COCO, {'roi_head.bbox_head.1': 3}, 80),
    ('mmdet', dict(type='SOLO', mask_head=dict(type='SOLOHead', num_classes=80)), COCO_TWO, {'mask_head': 80}, 2),
    ('mmseg', UPERNET, SEG_TWO, {'decode_head': 150, 'auxiliary_head': 150}, 2),
    ('mmseg', OCRNET, SEG_TWO, {'decode_head.0': 150, 'decode_head.1': 150}, 2),
    ('mmseg', dict(type='SegTTAModel', module=segmentor(num_classes=149)), ADE, {'decode_head': 149}, 150),
    ('mmpretrain', CLASSIFIER, CLS_TWO, {'head': 1000}, 2),
    ('mmpretrain', CLASSIFIER, dict(type='CustomDataset', classes=('cat', 'dog')), {'head': 1000}, 2),
    ('mmpretrain', classifier(2), dict(type='ImageNet'), {'head': 2}, 1000),
    ('mmpretrain', classifier(2, data_preprocessor=dict(num_classes=9), train_cfg=dict(augments=[1])),
     CLS_TWO, {'data_preprocessor': 9}, 2),
], ids=['RetinaNet', 'DETR', 'wrapped dataset', 'masks', 'boxes and masks', 'cascade', 'SOLO', 'UPerNet', 'list',
        'tta', 'classifier', 'classes argument', 'ImageNet', 'mixing preprocessor'])
def test_bad(scope, model, dataset, wrong, right):
    with pytest.raises(UsageError) as raised:
        check(scope, model, dataset)
    message = str(raised.value)
    found, hint = (re.findall(r'model\.([\w.]+)\.num_classes=(\d+)', part) for part in message.split(', but '))
    assert {place: int(count) for place, count in found} == wrong
    assert hint == [(place, str(right)) for place in wrong]
    assert re.search(rf'val_dataloader\.dataset\S* \(\w+\) has {right} classes; set --cfg-options', message)


def test_bad_folder(folder):
    with pytest.raises(UsageError, match=r'^model.head.num_classes=5, but .*CustomDataset\) has 3 classes'):
        check('mmpretrain', classifier(5), folder)


@pytest.mark.parametrize('tool, arguments, loader', [(train, [], 'train'), (test, ['x.pth'], 'test')],
                         ids=['train', 'test'])
def test_tools_say_so_before_they_build(tool, arguments, loader, monkeypatch):
    """And the message's options mend it."""
    class Built(Exception):
        pass

    def build(cfg):
        raise Built

    monkeypatch.setattr(tool, 'check_data', lambda cfg, splits: None)
    for name in {'check_pretrained', 'check_load_from', 'check_checkpoint'} & set(dir(tool)):
        monkeypatch.setattr(tool, name, lambda *args: None)
    monkeypatch.setattr(tool.Runner, 'from_cfg', build)
    arguments = [str(ROOT / 'configs' / 'upernet_spatialmamba_t_160k.py'), *arguments, '--cfg-options']
    message = f'^error: model.decode_head.num_classes=3, but {loader}_dataloader.dataset .ADE20KDataset. has 150'
    with pytest.raises(SystemExit, match=message) as raised:
        tool.main([*arguments, 'model.decode_head.num_classes=3'])
    with pytest.raises(Built):
        tool.main([*arguments, *re.search(r'--cfg-options (\S+),', raised.value.code)[1].split()])
