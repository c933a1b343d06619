_base_ = [
    '_base_/models/upernet.py',
    '_base_/datasets/ade20k.py',
    '_base_/schedules/adamw_160k.py',
    '_base_/default_runtime_seg.py',
]
custom_imports = dict(imports=['mmvssm'], allow_failed_imports=False)

# The authors' ImageNet checkpoint. --cfg-options pretrained=FILE takes another file,
# pretrained=None trains from scratch.
pretrained = 'pretrained/spatialmamba_b.pth'

model = dict(
    backbone=dict(
        type='SpatialMamba',
        arch='base',
        drop_path_rate=0.5,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained)),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384))
