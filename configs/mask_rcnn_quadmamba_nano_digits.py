# The demo with QuadMamba: same widths, depths and training.
_base_ = './mask_rcnn_spatialmamba_nano_digits.py'

model = dict(backbone=dict(type='QuadMamba'))
