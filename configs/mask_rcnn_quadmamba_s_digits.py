# The demo on a GPU with QuadMamba-S in place of Spatial-Mamba-T:
#     python tools/data/make_digits.py --out data/digits_512 --train 2500 --size 512 --jobs 16
#     python tools/train.py configs/mask_rcnn_quadmamba_s_digits.py --amp bf16 --seed 0
_base_ = './mask_rcnn_spatialmamba_t_digits.py'

model = dict(
    backbone=dict(_delete_=True, type='QuadMamba', arch='small', drop_path_rate=0.1),
    neck=dict(in_channels=[96, 192, 384, 768]))
