"""The backbones in configs that OpenMMLab ships: only the import, the backbone and the widths after it change.

A change is a config file as a user writes it; the examples of the README run here too.
"""
import importlib
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData

from mmvssm.models import backbones

README = Path(__file__).parents[1] / 'README.md'
EXAMPLES = re.findall(r'^```python\n(_base_ = .*?)^```$', README.read_text(), re.MULTILINE | re.DOTALL)
SLIM = dict(embed_dims=16, depths=(1, 1, 1, 1))
WIDTHS = [16, 32, 64, 128]
SIZE = (64, 96)
SIZE_DINO = (224, 256)  # the four maps must have 900 tokens to take the queries from

# Shipped config: options of the backbone, what else changes in the model.
SHIPPED = {
    'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py': (
        dict(out_indices=(1, 2, 3)), dict(neck=dict(in_channels=WIDTHS[1:], start_level=0))),
    'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py': ({}, dict(neck=dict(in_channels=WIDTHS))),
    'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py': (
        dict(out_indices=(1, 2, 3)), dict(neck=dict(in_channels=WIDTHS[1:]))),
    'mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py': (
        {}, dict(pretrained=None, neck=dict(in_channels=WIDTHS))),
    'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py': (
        {}, dict(decode_head=dict(in_channels=WIDTHS))),
    'mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py': (
        {}, dict(decode_head=dict(in_channels=WIDTHS))),
    'mmpretrain::resnet/resnet50_8xb32_in1k.py': (
        dict(out_indices=(3,)), dict(head=dict(in_channels=WIDTHS[3]))),
}


def config_name(text):
    return re.search(r'([\w-]+)\.py', text)[1]


def installed(shipped):
    """The file of a shipped config; `mmseg::` alone is found by MMEngine only with the original packages."""
    package, name = shipped.split('::')
    return Path(importlib.import_module(package).__file__).parent / '.mim' / 'configs' / name


def read(text, tmp_path):
    """The config of a user's file with this text."""
    file = tmp_path / 'config.py'
    file.write_text(text)
    return Config.fromfile(file)


def build(cfg, size):
    init_default_scope(cfg.default_scope)
    if 'data_preprocessor' in cfg:  # the Runner does so
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    if cfg.default_scope == 'mmseg':
        cfg.model.data_preprocessor.size = size  # shipped: 512x512, only slower
    torch.manual_seed(0)
    return revert_sync_batchnorm(MODELS.build(cfg.model))


def batch_of_one(task, size):
    if task == 'mmdet':
        from mmdet.testing import demo_mm_inputs
        return demo_mm_inputs(1, [[3, *size]], num_classes=80, num_items=[3], with_mask=True)
    if task == 'mmseg':
        from mmseg.structures import SegDataSample
        sample = SegDataSample(metainfo=dict(img_shape=size, ori_shape=size),
                               gt_sem_seg=PixelData(data=torch.randint(150, (1, *size))))
    else:
        from mmpretrain.structures import DataSample
        sample = DataSample().set_gt_label(3)
    return dict(inputs=[torch.randint(256, (3, *size), dtype=torch.uint8)], data_samples=[sample])


# What is predicted for an image.
PREDICTIONS = dict(mmdet=lambda sample: sample.pred_instances.bboxes,
                   mmseg=lambda sample: sample.seg_logits.data,
                   mmpretrain=lambda sample: sample.pred_score)


def check_training_and_prediction(cfg):
    task = cfg.default_scope
    size = SIZE_DINO if cfg.model.type == 'DINO' else SIZE
    model = build(cfg, size)
    assert type(model.backbone).__module__.startswith('mmvssm.')
    batch = batch_of_one(task, size)

    loss, _ = model.parse_losses(model(**model.data_preprocessor(batch, True), mode='loss'))
    assert torch.isfinite(loss)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.backbone.named_parameters()}
    # Distributed training demands one for every parameter.
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert any(gradient.any() for gradient in gradients.values())

    model.eval()
    with torch.no_grad():
        prediction, = model.test_step(batch)
    assert PREDICTIONS[task](prediction).isfinite().all()


@pytest.mark.parametrize('backbone', backbones.__all__)
@pytest.mark.parametrize('shipped', SHIPPED, ids=config_name)
def test_shipped_config(shipped, backbone, tmp_path):
    options, changes = SHIPPED[shipped]
    model = dict(backbone=dict(_delete_=True, type=backbone, arch=SLIM, **options), **changes)
    cfg = read(f"_base_ = '{installed(shipped)}'\n"
               "custom_imports = dict(imports=['mmvssm'], allow_failed_imports=False)\n"
               f'model = {model!r}\n', tmp_path)
    check_training_and_prediction(cfg)


def test_readme_has_an_example_for_each_library():
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize('example', EXAMPLES, ids=config_name)
def test_example_in_readme(example, tmp_path):
    # A file beside one of MMSegmentation's stays where the others are here.
    example = re.sub(r"'\./(.+)'  # in MMSegmentation's configs/(.+)",
                     lambda match: repr(str(installed(f'mmseg::{match[2]}/{match[1]}'))), example)
    check_training_and_prediction(read(example, tmp_path))
