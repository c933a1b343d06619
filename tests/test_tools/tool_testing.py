"""What the tests of the tools share: the tools as modules, a slim detector, a COCO folder."""
import importlib.util
import json
from pathlib import Path

import cv2
import numpy as np
from mmdet.datasets import CocoDataset

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


def run_log(folder):
    return ''.join(path.read_text() for path in sorted(folder.rglob('*.log')))
