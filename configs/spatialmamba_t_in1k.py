_base_ = [
    '_base_/models/classifier.py',
    '_base_/datasets/imagenet.py',
    '_base_/schedules/adamw_300e.py',
    '_base_/default_runtime_cls.py',
]
custom_imports = dict(imports=['mmvssm', 'mmvssm.models.classifiers'], allow_failed_imports=False)

model = dict(backbone=dict(type='SpatialMamba', arch='tiny'), head=dict(in_channels=512))
default_hooks = dict(mesa=dict(type='MESAHook', weight=1.0))
