# Mask R-CNN of MMDetection with its backbone left open: configs add `model.backbone` and
# `model.neck.in_channels`.
_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'

# MMCV's CUDA RoIAlign has no bfloat16 kernel; torchvision's gives the same values in every dtype.
roi_extractor = dict(roi_layer=dict(use_torchvision=True))

model = dict(
    backbone=dict(_delete_=True, out_indices=(0, 1, 2, 3)),
    roi_head=dict(bbox_roi_extractor=roi_extractor, mask_roi_extractor=roi_extractor))
