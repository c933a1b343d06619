"""Whether a model's heads have as many classes as the datasets of a config."""
import os

from mmengine.registry import MODELS

from .config import UsageError, as_list, type_name
from .dataset_config import build_unread, class_names, dataset_class, leaf_datasets, lists_like

# Where models of MMDetection, MMSegmentation and MMPretrain have heads with a class for each of the dataset's.
HEADS = ('bbox_head', 'mask_head', 'roi_head.bbox_head', 'roi_head.mask_head', 'decode_head', 'auxiliary_head',
         'head')


def check_class_counts(cfg, splits):
    """Check that the heads of ``cfg.model`` have as many classes as the datasets of some splits.

    Only what is certain is checked: datasets whose classes can be told without reading annotations, and heads of
    the OpenMMLab packages. Left alone are mask heads that are class-agnostic, segmentation heads with one output
    for two classes, auxiliary heads with a target of their own, detectors of things and stuff, and models that find
    what a text names.

    Args:
        cfg (Config): The config.
        splits (Sequence[str]): Some of 'train', 'val' and 'test'.

    Raises:
        UsageError: Some heads have another number; the message has both numbers and what to set.
    """
    model = cfg.model
    while 'module' in model:  # test-time augmentation
        model = model.module
    counts = dict(_head_counts(cfg, model))
    if not counts:
        return
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        if loader is None:
            continue
        where, dataset = next(leaf_datasets(loader.dataset, f'{split}_dataloader.dataset'))
        classes = _class_count(cfg, dataset)
        wrong = {place: count for place, count in counts.items() if classes is not None and count != classes}
        if wrong:
            found = ', '.join(f'{place}.num_classes={count}' for place, count in wrong.items())
            hint = ' '.join(f'{place}.num_classes={classes}' for place in wrong)
            raise UsageError(f'{found}, but {where} ({type_name(dataset)}) has {classes} classes; set '
                             f'--cfg-options {hint}, or its classes: {where}.metainfo.classes=NAME,NAME,...')


def _class_count(cfg, dataset):
    """How many classes a dataset has, or None if that cannot be told."""
    kind = dataset_class(cfg, dataset)
    if 'thing_classes' in getattr(kind, 'METAINFO', {}):
        return None  # heads share these classes out in several ways
    names = class_names(dataset, kind)
    if names is not None:
        return len(names)
    named = dataset.get('classes') or (dataset.get('metainfo') or {}).get('classes')
    if named or dataset.get('backend_args') or not lists_like(kind, 'mmpretrain.datasets.custom.CustomDataset'):
        return None
    built = build_unread(cfg, dataset)
    if built is None or built.ann_file or not built.with_label or not os.path.isdir(built.img_prefix):
        return None
    return sum(entry.is_dir() for entry in os.scandir(built.img_prefix))


def _head_counts(cfg, model):
    """Place in the config and number of classes of each head that is to have those of the dataset."""
    if 'language_model' in model or 'text_encoder' in model:
        return
    for path in HEADS:
        owner, key = model, path
        if '.' in path:
            parent, key = path.split('.')
            owner = model.get(parent) or {}
        heads = owner.get(key)
        for i, head in enumerate(as_list(heads)):
            if isinstance(head, dict) and isinstance(head.get('num_classes'), int) and _is_certain(cfg, key, head):
                yield f'model.{path}.{i}' if isinstance(heads, (list, tuple)) else f'model.{path}', head.num_classes
    if _mixes_labels(cfg, model):
        yield 'model.data_preprocessor', model.data_preprocessor.num_classes


def _is_certain(cfg, key, head):
    """Whether the ``num_classes`` of a head counts the classes of the dataset."""
    kind = head.get('type')
    if isinstance(kind, str):
        with MODELS.switch_scope_and_registry(cfg.get('default_scope')) as models:
            kind = models.get(kind)
    package = getattr(kind, '__module__', '').split('.')[0]
    if package == 'mmseg':
        from mmseg.models.decode_heads.decode_head import BaseDecodeHead
        plain = getattr(kind, 'loss_by_feat', None) is BaseDecodeHead.loss_by_feat
        return head.num_classes > 1 and head.get('out_channels') != 1 and (plain or key != 'auxiliary_head')
    return package in ('mmdet', 'mmpretrain') and not head.get('class_agnostic')


def _mixes_labels(cfg, model):
    """Whether a classifier's data preprocessor makes one-hot labels of a number of classes of its own."""
    preprocessor = model.get('data_preprocessor') or {}
    if cfg.get('default_scope') != 'mmpretrain' or not preprocessor.get('num_classes'):
        return False
    augments = (model.get('train_cfg') or {}).get('augments') or preprocessor.get('batch_augments')
    return bool(augments or preprocessor.get('to_onehot'))
