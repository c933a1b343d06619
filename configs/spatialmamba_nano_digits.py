# The classification demo: a slim Spatial-Mamba from scratch on digits, minutes on two CPU cores.
_base_ = [
    '_base_/models/classifier.py',
    '_base_/datasets/digits_classes.py',
    '_base_/default_runtime_cls.py',
]
custom_imports = dict(imports=['mmvssm', 'mmvssm.models.classifiers'], allow_failed_imports=False)

num_classes = 10
model = dict(
    data_preprocessor=dict(num_classes=num_classes, to_rgb=False),
    backbone=dict(
        type='SpatialMamba',
        arch=dict(embed_dims=24, depths=(1, 1, 2, 1)),
        drop_path_rate=0.),
    head=dict(in_channels=192, num_classes=num_classes),
    train_cfg=None)

epochs = 24
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=epochs, val_interval=epochs)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    constructor='MergedOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(flat_decay_mult=0.),
    clip_grad=dict(max_norm=5.))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=True, begin=0, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=1, end=epochs, eta_min_ratio=0.01,
         convert_to_iter_based=True),
]
custom_hooks = [dict(type='EMAHook', momentum=0.01, update_buffers=True, priority='ABOVE_NORMAL')]
default_hooks = dict(
    logger=dict(interval=50),
    checkpoint=dict(interval=3),
    visualization=dict(resize=256))
