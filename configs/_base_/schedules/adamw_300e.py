# AdamW for 300 epochs of ImageNet at batch 1024: 20 epochs of warm-up from 1e-6 to 1e-3, cosine to 1e-5.
warm_up, max_epochs = 20, 300
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

# Relative to the learning rate, so that --auto-scale-lr scales all of it.
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=True, begin=0, end=warm_up, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, by_epoch=True, begin=warm_up, end=max_epochs,
         convert_to_iter_based=True),
]

optim_wrapper = dict(
    type='OptimWrapper',
    constructor='MergedOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=0.001, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    # No decay for 1-D tensors, which most biases are, and for the biases of QuadMamba's stacked projections.
    paramwise_cfg=dict(flat_decay_mult=0.0, custom_keys=dict(dt_projs_bias=dict(decay_mult=0.0))),
    clip_grad=dict(max_norm=5.0))

# Evaluation and the saved weights are those of the average, whose statistics of BatchNorm are averaged too.
custom_hooks = [dict(type='EMAHook', momentum=0.0001, update_buffers=True, priority='ABOVE_NORMAL')]

# The learning rate is for 8 GPUs x 128 images; --auto-scale-lr adapts it to other batch sizes.
auto_scale_lr = dict(enable=False, base_batch_size=1024)
