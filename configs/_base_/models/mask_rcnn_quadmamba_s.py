_base_ = './mask_rcnn.py'

# The authors' ImageNet checkpoint. --cfg-options pretrained=FILE takes another file,
# pretrained=None trains from scratch.
pretrained = 'pretrained/quadmamba_s.pth'

model = dict(
    backbone=dict(
        type='QuadMamba',
        arch='small',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained)),
    neck=dict(in_channels=[96, 192, 384, 768]))
