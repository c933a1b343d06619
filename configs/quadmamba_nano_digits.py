# The classification demo with a slim QuadMamba.
_base_ = './spatialmamba_nano_digits.py'

model = dict(backbone=dict(type='QuadMamba'))
