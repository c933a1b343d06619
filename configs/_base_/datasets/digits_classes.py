# One handwritten digit on a photograph per picture, made offline by `tools/data/make_digits.py --task cls`.
data_root = 'data/digits_cls/'

# Pictures are drawn from the model's inputs, which MMPretrain takes for RGB.
to_rgb = [dict(type='NumpyToPIL', to_rgb=True), dict(type='PILToNumpy')]

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=64),
    dict(
        type='RandAugment',
        policies=[
            dict(type='Rotate', magnitude_range=(0, 20)),
            dict(type='Shear', magnitude_range=(0, 0.3), direction='horizontal'),
            dict(type='Shear', magnitude_range=(0, 0.3), direction='vertical'),
            dict(type='Translate', magnitude_range=(0, 0.1), direction='horizontal'),
            dict(type='Translate', magnitude_range=(0, 0.1), direction='vertical'),
            dict(type='Brightness', magnitude_range=(0, 0.6)),
            dict(type='Contrast', magnitude_range=(0, 0.6)),
            dict(type='ColorTransform', magnitude_range=(0, 0.9)),
            dict(type='Invert'),
        ],
        num_policies=6,
        magnitude_level=10,
        magnitude_std='inf'),
    *to_rgb,
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=64),
    *to_rgb,
    dict(type='PackInputs'),
]

train_dataloader = dict(
    batch_size=32,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='CustomDataset', data_root=data_root, data_prefix='train', pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=32,
    num_workers=0,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CustomDataset', data_root=data_root, data_prefix='val', pipeline=test_pipeline))
test_dataloader = val_dataloader

val_evaluator = dict(type='Accuracy', topk=1)
test_evaluator = val_evaluator
