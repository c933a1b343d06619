# The demo: a slim Spatial-Mamba Mask R-CNN from scratch on digits, minutes on two CPU cores.
_base_ = [
    '_base_/models/mask_rcnn.py',
    '_base_/datasets/digits_instance.py',
    '_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmvssm'], allow_failed_imports=False)

num_classes = 10
width = 64  # of the pyramid and the heads
norm = dict(type='BN')

model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    backbone=dict(
        type='SpatialMamba',
        arch=dict(embed_dims=32, depths=(1, 1, 2, 1)),
        drop_path_rate=0.),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=width, norm_cfg=norm, num_outs=4),
    rpn_head=dict(
        in_channels=width,
        feat_channels=width,
        anchor_generator=dict(scales=[6], ratios=[0.7, 1.2, 2.0], strides=[4, 8, 16, 32])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=width, featmap_strides=[4, 8, 16], finest_scale=28),
        bbox_head=dict(in_channels=width, fc_out_channels=256, num_classes=num_classes,
                       reg_class_agnostic=True),
        mask_roi_extractor=dict(out_channels=width, featmap_strides=[4, 8, 16], finest_scale=28),
        mask_head=dict(in_channels=width, conv_out_channels=width, num_convs=2, num_classes=num_classes,
                       class_agnostic=True, norm_cfg=norm)),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=128),
        rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(
        rpn=dict(nms_pre=500, max_per_img=100),
        rcnn=dict(max_per_img=30)))

iterations = 800
train_cfg = dict(type='IterBasedTrainLoop', max_iters=iterations, val_interval=iterations)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='MergedOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0.),
    clip_grad=dict(max_norm=10, norm_type=2))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=50, end=iterations, eta_min=1e-5),
]
default_hooks = dict(
    logger=dict(interval=25),
    checkpoint=dict(by_epoch=False, interval=200),
    visualization=dict(score_thr=0.5))
visualizer = dict(line_width=1)  # for pictures of 128 pixels
log_processor = dict(by_epoch=False)
