_base_ = [
    '_base_/models/mask_rcnn_quadmamba_li.py',
    '_base_/datasets/coco_instance.py',
    '_base_/schedules/adamw_1x.py',
    '_base_/default_runtime.py',
]
custom_imports = dict(imports=['mmvssm'], allow_failed_imports=False)
