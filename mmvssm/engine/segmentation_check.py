"""Checks of the images and label maps that MMSegmentation's ``BaseSegDataset`` reads."""
import os

import mmcv
import numpy as np
from mmengine.fileio import get
from mmengine.registry import TRANSFORMS

from .config import UsageError, as_list, one_line, type_name
from .dataset_config import build_unread, dataset_class, few, file_sizes, lists_like

IGNORED = 255  # what MMSegmentation pads label maps with
SAMPLE = 24  # label maps to read of each dataset, well below a second on ADE20K


def check_segmentation(cfg, where, dataset):
    """Check that images have label maps, and read a few of those, evenly spread over the dataset.

    Read label maps must have one channel, the size of their image and no label without a class.

    Args:
        cfg (Config): The config.
        where (str): The place of ``dataset`` in the config.
        dataset (ConfigDict): Any dataset. Those that do not list their samples as ``BaseSegDataset`` does are not
            looked at, nor label maps that another transform than ``LoadAnnotations`` reads.

    Raises:
        UsageError: A file is missing, cannot be read or does not fit; the message names it.
    """
    if not lists_like(dataset_class(cfg, dataset), 'mmseg.datasets.basesegdataset.BaseSegDataset'):
        return
    try:
        built = build_unread(cfg, dataset)
    except (ValueError, AssertionError) as error:
        raise UsageError(f'{where}: {one_line(error)}') from None
    if built is None:
        return
    if 'img_path' not in built.data_prefix:
        raise UsageError(f'{where}.data_prefix: needs img_path, got {dict(dataset.data_prefix)}')
    pairs = built.load_data_list()
    if not pairs:
        raise UsageError(f'{where}: {_no_images(where, built)}')
    _require_files(where, 'images', [pair['img_path'] for pair in pairs])
    load_labels = _transform(cfg, dataset, 'LoadAnnotations')
    if load_labels is None or 'seg_map_path' not in built.data_prefix:
        return
    _require_files(where, 'label maps', [pair['seg_map_path'] for pair in pairs])
    if load_labels.reduce_zero_label not in (None, built.reduce_zero_label):
        raise UsageError(f'{where}.reduce_zero_label is {built.reduce_zero_label} and that of LoadAnnotations in '
                         f'its pipeline {load_labels.reduce_zero_label}; make them equal')
    load_image = _transform(cfg, dataset, 'LoadImageFromFile')
    ignored = _ignored_labels(cfg, where, built)
    for index in np.unique(np.linspace(0, len(pairs) - 1, SAMPLE).astype(int)):
        pair = {key: os.path.abspath(value) if key.endswith('path') else value
                for key, value in pairs[index].items()}
        labels = _read_labels(where, pair['seg_map_path'], load_labels.imdecode_backend)
        if load_image is not None:
            _check_size(where, pair, labels, load_image)
        _check_labels(where, pair['seg_map_path'], labels, built, ignored)


def _no_images(where, built):
    if built.ann_file:
        return f'{os.path.abspath(built.ann_file)} names no images'
    folder = built.data_prefix['img_path']
    return (f'no images *{built.img_suffix} in {os.path.abspath(folder)}; it has '
            f'{few(sorted(os.listdir(folder)))}; set how they end with --cfg-options {where}.img_suffix=ENDING')


def _require_files(where, what, paths):
    """Raise unless all ``paths`` are files that are not empty."""
    paths = [os.path.abspath(path) for path in paths]
    sizes = file_sizes('', paths)
    for problem, bad in (('missing', [path for path in paths if path not in sizes]),
                         ('empty files', [path for path in paths if sizes.get(path) == 0])):
        if bad:
            raise UsageError(f'{where}: {len(bad)} of the {len(paths)} {what} are {problem}: {few(bad, most=3)}')


def _transform(cfg, dataset, name):
    """The first transform called ``name`` in a dataset's pipeline, built; None without one."""
    def steps(value):
        if isinstance(value, dict):
            yield value
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            for item in value:
                yield from steps(item)

    found = [step for step in steps(dataset.get('pipeline')) if 'type' in step and type_name(step) == name]
    if not found:
        return None
    with TRANSFORMS.switch_scope_and_registry(cfg.get('default_scope')) as transforms:
        return transforms.build(found[0])


def _ignored_labels(cfg, where, built):
    """The labels, as training and evaluation see them, that stand for no class on purpose."""
    split = where.split('_dataloader')[0]
    heads = as_list(cfg.model.get('decode_head')) if 'model' in cfg else []
    users = [*heads, *as_list(cfg.get(f'{split}_evaluator'))]
    return {IGNORED, built.ignore_index, *(user.get('ignore_index', IGNORED) for user in users)}


def _read_labels(where, path, backend):
    """The label map of a file, unchanged: (height, width)."""
    try:
        labels = mmcv.imfrombytes(get(path), flag='unchanged', backend=backend).squeeze()
    except Exception as error:  # each decoder has its own
        raise UsageError(f'{where}: label map cannot be read: {path} ({one_line(error)})') from None
    if labels.ndim != 2:
        raise UsageError(f'{where}: label map {path} has {labels.shape[-1]} channels, expected one with the number '
                         "of each pixel's class")
    return labels


def _check_size(where, pair, labels, load_image):
    """Raise unless the image of a label map can be read and has its size."""
    path = pair['img_path']
    try:
        size = load_image(dict(pair))['img'].shape[:2]
    except Exception as error:
        raise UsageError(f'{where}: image cannot be read: {path} ({one_line(error)})') from None
    if size != labels.shape:
        raise UsageError(f'{where}: label map {pair["seg_map_path"]} has {_size(labels.shape)} pixels, but its '
                         f'image {path} has {_size(size)} (width x height)')


def _check_labels(where, path, labels, built, ignored):
    """Raise if a label map as it lies in its file has labels for which the dataset has no class."""
    names = built.metainfo.get('classes')
    if names is None:
        return
    # Classes that are left out have numbers in the file, too. One class may be all that is not label 0.
    count = max(len(built.label_map or names), 2)
    # Counting takes a tenth of the time of sorting.
    raw = np.bincount(labels.ravel()).nonzero()[0] if labels.dtype == np.uint8 else np.unique(labels).astype(int)
    seen = raw.astype(np.uint8).astype(int)  # as MMSegmentation keeps them
    if built.reduce_zero_label:
        seen = np.where((seen == 0) | (seen == 255), 255, seen - 1)
    fine = np.isin(seen, list(ignored)) | ((seen < count) & (raw == raw.astype(np.uint8)))
    if not fine.all():
        first = int(built.reduce_zero_label)
        others = '0 and 255, which are ignored' if first else '255, which is ignored'
        hint = '' if first else f', and {where}.reduce_zero_label=True if classes are numbered from 1'
        raise UsageError(f'{where}: label map {path} has labels {few(raw[~fine])}, expected {first} to '
                         f'{first + count - 1} for {few(names, most=3)}, or {others}; set the names of all classes '
                         f'with {where}.metainfo.classes{hint}')


def _size(shape):
    return f'{shape[1]}x{shape[0]}'
