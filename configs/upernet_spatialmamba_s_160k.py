_base_ = [
    '_base_/models/upernet.py',
    '_base_/datasets/ade20k.py',
    '_base_/schedules/adamw_160k.py',
    '_base_/default_runtime_seg.py',
]
custom_imports = dict(imports=['mmvssm'], allow_failed_imports=False)

# The authors' ImageNet checkpoint. --cfg-options pretrained=FILE takes another file,
# pretrained=None trains from scratch.
pretrained = 'pretrained/spatialmamba_s.pth'

model = dict(
    backbone=dict(
        type='SpatialMamba',
        arch='small',
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained)),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256))
