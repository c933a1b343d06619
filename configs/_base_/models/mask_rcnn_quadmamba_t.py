_base_ = './mask_rcnn.py'

# The authors' ImageNet checkpoint. --cfg-options pretrained=FILE takes another file,
# pretrained=None trains from scratch.
pretrained = 'pretrained/quadmamba_t.pth'

model = dict(
    backbone=dict(
        type='QuadMamba',
        arch='tiny',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained)),
    neck=dict(in_channels=[64, 128, 256, 512]))
