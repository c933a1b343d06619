_base_ = './mask_rcnn.py'

# The authors' ImageNet checkpoint. --cfg-options pretrained=FILE takes another file,
# pretrained=None trains from scratch.
pretrained = 'pretrained/quadmamba_b.pth'

model = dict(
    backbone=dict(
        type='QuadMamba',
        arch='base',
        drop_path_rate=0.3,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained)),
    neck=dict(in_channels=[96, 192, 384, 768]))
