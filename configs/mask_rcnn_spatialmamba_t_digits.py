# The demo on a GPU: Spatial-Mamba-T in Mask R-CNN from scratch on digits in pictures of 512x512, minutes on one H100:
#     python tools/data/make_digits.py --out data/digits_512 --train 2500 --size 512 --jobs 16
#     python tools/train.py configs/mask_rcnn_spatialmamba_t_digits.py --amp bf16 --seed 0
_base_ = [
    '_base_/models/mask_rcnn.py',
    '_base_/datasets/digits_instance.py',
    '_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmvssm'], allow_failed_imports=False)

data_root = 'data/digits_512/'
num_classes = 10
norm = dict(type='BN')

model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    backbone=dict(type='SpatialMamba', arch='tiny', drop_path_rate=0.1),
    neck=dict(in_channels=[64, 128, 256, 512], norm_cfg=norm),
    rpn_head=dict(anchor_generator=dict(ratios=[0.7, 1.2, 2.0])),
    roi_head=dict(
        bbox_head=dict(num_classes=num_classes, reg_class_agnostic=True),
        mask_head=dict(num_classes=num_classes, class_agnostic=True, norm_cfg=norm)),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=256),
        rcnn=dict(sampler=dict(num=128))),
    test_cfg=dict(
        rpn=dict(nms_pre=500, max_per_img=100),
        rcnn=dict(max_per_img=30)))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomResize', scale=(512, 512), ratio_range=(0.8, 1.25), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(512, 512), allow_negative_crop=True),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(16, 16), keep_empty=True),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(512, 512), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs',
         meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(
    batch_size=16,
    num_workers=12,
    persistent_workers=True,
    pin_memory=True,
    dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(
    num_workers=8,
    persistent_workers=True,
    dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator

iterations = 900
train_cfg = dict(type='IterBasedTrainLoop', max_iters=iterations, val_interval=iterations)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='MergedOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=6e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0.),
    clip_grad=dict(max_norm=10, norm_type=2))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=100, end=iterations, eta_min=1e-6),
]
default_hooks = dict(
    logger=dict(interval=25),
    checkpoint=dict(by_epoch=False, interval=iterations),
    visualization=dict(score_thr=0.5))
log_processor = dict(by_epoch=False)
