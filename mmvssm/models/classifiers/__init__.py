"""What ImageNet classification through MMPretrain adds.

Import it in the configs that need it, and only there, as it needs MMPretrain:
``custom_imports = dict(imports=['mmvssm', 'mmvssm.models.classifiers'], allow_failed_imports=False)``.
"""
from .image_classifier import AuthorsCheckpointHook, VisionSSMClassifier
from .mesa import MESAHook

__all__ = ['AuthorsCheckpointHook', 'MESAHook', 'VisionSSMClassifier']
