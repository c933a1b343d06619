# The segmentation demo: a UPerNet on digits whose backbone starts from the classification demo, minutes on two CPU
# cores.
_base_ = [
    '_base_/models/upernet.py',
    '_base_/datasets/digits_semantic.py',
    '_base_/default_runtime_seg.py',
]
custom_imports = dict(imports=['mmvssm'], allow_failed_imports=False)

pretrained = 'work_dirs/spatialmamba_nano_digits/epoch_24.pth'
num_classes = 11
norm = dict(type='BN', requires_grad=True)
loss = dict(class_weight=[0.3] + [1.0] * 10)  # of ten pixels nine are background

model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(
        type='SpatialMamba',
        arch=dict(embed_dims=24, depths=(1, 1, 2, 1)),
        drop_path_rate=0.,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained)),
    decode_head=dict(in_channels=[24, 48, 96, 192], channels=64, num_classes=num_classes, norm_cfg=norm,
                     loss_decode=loss),
    auxiliary_head=dict(in_channels=96, channels=64, num_classes=num_classes, norm_cfg=norm, loss_decode=loss))

iterations = 600
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
    checkpoint=dict(interval=200))
visualizer = dict(alpha=0.6)  # the photograph shows through
