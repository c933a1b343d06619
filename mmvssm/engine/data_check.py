"""Checks of the files a config names, made before anything is built.

A mistake is reported by a :class:`~mmvssm.engine.config.UsageError` that says where the config
names the file, which path was looked at and how to set it.
"""
import json
import os
from pathlib import Path

from mmvssm.models.layers.checkpoint import read_checkpoint

from .checkpointing import STOPPED, checkpoints_by_date, newest_checkpoint, stopped_checkpoint
from .config import UsageError, as_list, one_line, type_name
from .dataset_config import class_names, dataset_class, few, file_sizes, leaf_datasets
from .imagefolder_check import check_image_folder
from .segmentation_check import check_segmentation

# Datasets of MMPretrain that fetch their files themselves.
SELF_DOWNLOADING = ('CIFAR10', 'CIFAR100', 'MNIST', 'FashionMNIST')

# What CocoDataset reads of every entry in the lists of a COCO file, and of a panoptic annotation.
COCO_KEYS = dict(
    images=('id', 'file_name', 'width', 'height'),
    annotations=('id', 'image_id', 'category_id', 'bbox', 'area'),
    categories=('id', 'name'))
PANOPTIC_KEYS = ('image_id', 'segments_info')


def check_data(cfg, splits):
    """Check that the datasets and evaluators of some splits find their files.

    Folders and annotation files must exist; a COCO annotation file must in addition be readable,
    name images that are there and, for training, leave some after the dataset's filters; image folders must be laid
    out as MMPretrain reads them, and images must have fitting label maps as MMSegmentation reads them. Files that
    are read through a storage backend are not looked at.

    Args:
        cfg (Config): The config.
        splits (Sequence[str]): Some of 'train', 'val' and 'test'.

    Raises:
        UsageError: Something is missing or empty.
    """
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        if loader is None:
            continue
        for where, dataset in leaf_datasets(loader.dataset, f'{split}_dataloader.dataset'):
            _check_dataset(cfg, where, dataset)
        for evaluator in as_list(cfg.get(f'{split}_evaluator')):
            ann_file = evaluator.get('ann_file')
            if ann_file and not _is_remote(ann_file, evaluator):
                _require(cfg, f'{split}_evaluator', 'ann_file', ann_file)


def check_pretrained(cfg):
    """Check that the checkpoint which the backbone starts from can be read."""
    init_cfg = (cfg.model.get('backbone') or {}).get('init_cfg') or {}
    if isinstance(init_cfg, dict) and type_name(init_cfg) == 'Pretrained':
        hint = ('set another with --cfg-options pretrained=FILE, or train from scratch with '
                'pretrained=None')
        check_checkpoint(init_cfg.checkpoint, 'pretrained checkpoint', hint)


def resume_checkpoint(cfg):
    """The checkpoint that training goes on from, or None if it starts anew; it is set in the config.

    A run that was stopped goes on without being told to, also if the config names a checkpoint to start from.
    """
    if cfg.get('resume'):
        path = cfg.get('load_from') or newest_checkpoint(cfg.work_dir)
    else:
        path = stopped_checkpoint(cfg.work_dir)
        marker = Path(cfg.work_dir, STOPPED)
        if path is None and marker.exists():
            newest = newest_checkpoint(cfg.work_dir)
            resume = f'add --resume to go on from {newest}, or ' if newest else ''
            raise UsageError(f'--work-dir: the run there was stopped and saved {marker.read_text().strip()}, which is '
                             f'gone; {resume}delete {marker} to start anew')
    if path:
        cfg.resume, cfg.load_from = True, path
    return path


def check_load_from(cfg, resumed):
    """Check the checkpoint ``resumed`` that training goes on from, or else the config's ``load_from``."""
    path = resumed or cfg.get('load_from')
    if path is None:
        return
    try:
        checkpoint = check_checkpoint(path, 'checkpoint')
    except UsageError as error:
        others = [file for file in checkpoints_by_date(cfg.work_dir) if resumed and not _same_file(file, path)]
        whole = next(filter(_is_whole, reversed(others)), None)
        if whole is None:
            raise
        raise UsageError(f'{error}; --resume {whole} goes on from another that is there') from None
    if resumed and checkpoint is not None and 'optimizer' not in checkpoint:
        raise UsageError(f'--resume: {path} holds weights but no optimizer; start from them with '
                         '--cfg-options load_from=FILE')


def _is_whole(path):
    try:
        return check_checkpoint(path, 'checkpoint') is not None
    except UsageError:
        return False


def _same_file(first, second):
    return os.path.realpath(first) == os.path.realpath(second)


def check_checkpoint(path, what, hint=''):
    """Read a checkpoint as a test, with ``weights_only=True``.

    Args:
        path (str): The file. Addresses such as ``https://...`` are left to MMEngine.
        what (str): What to call it in the message.
        hint (str): How to give another.

    Returns:
        Mapping: The checkpoint, on the CPU; None for an address.

    Raises:
        UsageError: The file is missing, truncated or not a checkpoint.
    """
    if '://' in path:
        return None
    hint = f'; {hint}' if hint else ''
    file = os.path.abspath(path)
    try:
        return read_checkpoint(file)
    except FileNotFoundError:
        raise UsageError(f'{what} not found: {file}{hint}') from None
    except OSError as error:
        raise UsageError(f'{what} cannot be read: {file} ({one_line(error)}){hint}') from None
    except ValueError as error:
        why = str(error).replace(f"checkpoint '{file}'", f'{what} {file}', 1)
        raise UsageError(f'{why}{hint}') from None


def _check_dataset(cfg, where, dataset):
    root = dataset.get('data_root') or ''
    if _is_remote(root, dataset) or type_name(dataset) in ('', *SELF_DOWNLOADING):
        return  # a dataset without a type is for the registry to judge
    if root:
        _require(cfg, where, 'data_root', root)
    ann_file = dataset.get('ann_file') or ''
    if ann_file:
        ann_file = os.path.join(root, ann_file)
        _require(cfg, where, 'ann_file', ann_file)
    prefixes = dataset.get('data_prefix') or {}
    if isinstance(prefixes, str):
        prefixes = {'': prefixes}
    for key, prefix in prefixes.items():
        if prefix:
            _require(cfg, where, f'data_prefix.{key}'.rstrip('.'), os.path.join(root, prefix))
    if ann_file.endswith('.json') and 'img' in prefixes:
        _check_coco(cfg, where, dataset, ann_file, os.path.join(root, prefixes['img']))
    check_image_folder(cfg, where, dataset)
    check_segmentation(cfg, where, dataset)


def _is_remote(path, owner):
    return '://' in path or bool(owner.get('backend_args'))


def _require(cfg, where, key, path):
    """Raise unless ``path`` exists and, being a folder, is not empty."""
    if os.path.isdir(path):
        if next(os.scandir(path), None) is not None:
            return
        problem = 'empty folder'
    elif os.path.exists(path):
        return
    else:
        problem = 'no such file or folder'
    variable = cfg.get('data_root')
    # Where the config has this variable, it moves all the paths that start with it.
    inside = variable and os.path.join(os.path.abspath(path), '').startswith(
        os.path.join(os.path.abspath(variable), ''))
    if inside:
        hint = '--cfg-options data_root=FOLDER'
    else:
        hint = f'--cfg-options {where}.{key}=PATH'
    raise UsageError(f'{where}.{key}: {problem}: {os.path.abspath(path)}; set it with {hint}')


def _check_coco(cfg, where, dataset, ann_file, folder):
    kind = dataset_class(cfg, dataset)
    if not hasattr(kind, 'COCOAPI'):
        return  # a format of its own, for its dataset to judge
    path = os.path.abspath(ann_file)
    try:
        with open(ann_file, encoding='utf-8') as file:
            coco = json.load(file)
    except ValueError as error:
        raise UsageError(f'{where}.ann_file: not valid JSON: {path} ({one_line(error)})') from None
    lvis = type_name(dataset).startswith('LVIS')  # names its images by coco_url
    _check_entries(where, coco, path, named_by_url=lvis)
    if not coco['images']:
        raise UsageError(f'{where}.ann_file: names no images: {path}')

    names = [] if lvis else [image['file_name'] for image in coco['images']]
    sizes = file_sizes(folder, names)
    missing = [name for name in names if os.path.normpath(name) not in sizes]
    if missing:
        raise UsageError(f'{where}.ann_file: {len(missing)} of the {len(names)} images that {path} '
                         f'names are not in {os.path.abspath(folder)}: {", ".join(missing[:3])}'
                         f'{", ..." if len(missing) > 3 else ""}')
    empty = [name for name in names if not sizes[os.path.normpath(name)]]
    if empty:
        raise UsageError(f'{where}.data_prefix.img: {len(empty)} of the {len(names)} images are empty files (0 '
                         f'bytes), the first of them {os.path.abspath(os.path.join(folder, empty[0]))}')
    named = [category['name'] for category in coco.get('categories', [])]
    classes = class_names(dataset, kind) or named
    absent = [name for name in classes if name not in named]
    if absent:
        # CocoDataset would number the remaining classes anew, and their labels would be wrong.
        raise UsageError(f'{where}.metainfo.classes: {len(absent)} of the {len(classes)} classes '
                         f'are no categories of {path}: {few(absent)}; it has {few(named)}')
    if not dataset.get('test_mode'):
        wanted = {item['id'] for item in coco.get('categories', []) if item['name'] in classes}
        _check_coco_training(where, dataset.get('filter_cfg') or {}, wanted, coco, path)


def _check_coco_training(where, filters, wanted, coco, path):
    """Raise unless the filters of ``CocoDataset`` leave some images with the wanted categories."""
    annotated = {item['image_id'] for item in coco.get('annotations', [])
                 if item.get('category_id') in wanted or 'segments_info' in item}
    if annotated.isdisjoint(image['id'] for image in coco['images']):
        raise UsageError(f'{where}.ann_file: no image has annotations of the classes to train on: '
                         f'{path}')
    min_size = filters.get('min_size', 0)
    images = [image for image in coco['images']
              if image['id'] in annotated or not filters.get('filter_empty_gt')]
    if min_size and all(min(image['width'], image['height']) < min_size for image in images):
        raise UsageError(f'{where}.filter_cfg.min_size={min_size}: all {len(images)} annotated '
                         f'images of {path} are smaller')


def _check_entries(where, coco, path, named_by_url):
    """Raise unless the lists of a COCO file are there and their entries have what ``CocoDataset`` reads."""
    if not isinstance(coco, dict):
        raise UsageError(f'{where}.ann_file: holds a {type(coco).__name__}, not an object with images: {path}')
    for name, keys in COCO_KEYS.items():
        entries = coco.get(name, None if name == 'images' else [])
        if not isinstance(entries, list):
            found = f'is a {type(entries).__name__}, not a list' if name in coco else 'is missing'
            raise UsageError(f'{where}.ann_file: {name} {found}: {path}')
        if named_by_url:
            keys = [key for key in keys if key != 'file_name']
        for i, entry in enumerate(entries):
            if not isinstance(entry, dict):
                found = type(entry).__name__
                raise UsageError(f'{where}.ann_file: {name}[{i}] is a {found}, not an object: {path}')
            wanted = PANOPTIC_KEYS if name == 'annotations' and 'segments_info' in entry else keys
            lacking = [key for key in wanted if entry.get(key) is None]
            if lacking:
                raise UsageError(f'{where}.ann_file: {name}[{i}] lacks {", ".join(lacking)}: {path}')
