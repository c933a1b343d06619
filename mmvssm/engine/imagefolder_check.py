"""Checks of the folders that MMPretrain's ``CustomDataset`` and ``ImageNet`` read."""
import os

from .config import UsageError, type_name
from .dataset_config import class_names, dataset_class, few, lists_like

# Those of MMPretrain's CustomDataset, ImageNet and ImageNet21k.
EXTENSIONS = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif')


def check_image_folder(cfg, where, dataset):
    """Check the layout of an image folder: class folders, or a list of images with their class numbers.

    What MMPretrain accepts is accepted, unless labels would be wrong: by class folders, a label is the place of the
    folder's name among the others, so a split with other folders than training has other labels. Folders are listed
    and images looked for until one is found, which is quick on ImageNet.

    Args:
        cfg (Config): The config; its ``train_dataloader`` says which class folders other splits should have.
        where (str): The place of ``dataset`` in the config.
        dataset (ConfigDict): Any dataset. Those that do not list their images as MMPretrain's ``CustomDataset``
            does are not looked at.

    Raises:
        UsageError: The layout is another; the message says what was found, what is expected and how to set it.
    """
    kind = dataset_class(cfg, dataset)
    if not _lists_images(kind):
        return
    folder = _folder(dataset)
    if not os.path.isdir(folder):
        root = dataset.get('data_root') or '.'
        shared = dataset.get('data_root') and dataset.data_root == cfg.get('data_root')
        key = 'data_root' if shared else f'{where}.data_root'
        raise UsageError(f'{where}: there is no folder {os.path.abspath(folder)}; {_found(root)}; set the folder '
                         f'that holds {_prefix(dataset) or "the images"} with --cfg-options {key}=FOLDER, or what '
                         f'is below it with {where}.data_prefix=NAME')
    ann_file = _ann_file(dataset)
    if ann_file:
        _check_list(where, dataset, ann_file, folder)
    elif _with_label(dataset):
        _check_class_folders(where, dataset, kind, folder)
        _compare_with_training(cfg, where, folder)


def _check_list(where, dataset, ann_file, folder):
    """Check the first line of an annotation file and that its image is there."""
    path = os.path.abspath(ann_file)
    if not os.path.isfile(ann_file):
        raise UsageError(f'{where}.ann_file: no such file: {path}')
    with open(ann_file, encoding='utf-8', errors='replace') as file:
        line = next((line.strip() for line in file if line.strip()), '')
    name, label = line, '0'
    if _with_label(dataset):
        name, _, label = line.rpartition(' ')
    if not name or not label.isdigit():
        raise UsageError(f'{where}.ann_file: {path} begins with {line[:80]!r}, expected lines of an image and its '
                         "class number, such as 'n01440764/n01440764_18.JPEG 0'")
    if not os.path.isfile(os.path.join(folder, name)):
        raise UsageError(f'{where}.ann_file: {path} names {name}, which is not there; {_found(folder)}; set the '
                         f'folder that its names start from with --cfg-options {where}.data_prefix=FOLDER, or move '
                         'the file away to take the class folders')


def _check_class_folders(where, dataset, kind, folder):
    """Check that ``folder`` has as many class folders as there are classes, and images in them."""
    path, names = os.path.abspath(folder), _class_folders(folder)
    extensions = tuple(dataset.get('extensions') or EXTENSIONS)
    if not names:
        raise UsageError(f'{where}: {_found(folder)} but no class folders; expected {path}/CLASS/IMAGE, or a list '
                         f'of images and class numbers, set with --cfg-options {where}.ann_file=FILE')
    classes = class_names(dataset, kind)
    if len(names) == 1 and (classes is None or len(classes) > 1):
        inner = os.path.join(folder, names[0])
        if len(_class_folders(inner)) > 1 and not _has_image(inner, extensions, recursive=False):
            deeper = os.path.join(_prefix(dataset), names[0])
            raise UsageError(f'{where}: the class folders are one level too deep, in {os.path.abspath(inner)}; '
                             f'move them up, or read them there with --cfg-options {where}.data_prefix={deeper}')
    if not any(_has_image(os.path.join(folder, name), extensions) for name in names):
        raise UsageError(f'{where}: no images ({", ".join(extensions)}) in the {len(names)} class folders of '
                         f'{path}; {_found(os.path.join(folder, names[0]))}')
    if classes is not None and len(classes) != len(names):
        raise UsageError(f'{where}: {path} has {len(names)} class folders ({few(names)}), expected {len(classes)} '
                         f'for the classes of this {type_name(dataset)} ({few(classes)}); set its classes with '
                         f'--cfg-options {where}.metainfo.classes=NAME,NAME,...')


def _compare_with_training(cfg, where, folder):
    """Raise if the class folders are others than those of training, where both can be compared."""
    train = (cfg.get('train_dataloader') or {}).get('dataset') or {}
    while 'dataset' in train:
        train = train['dataset']
    if where.startswith('train_dataloader') or 'type' not in train or not _lists_images(dataset_class(cfg, train)) \
            or _ann_file(train) or not _with_label(train) or not os.path.isdir(_folder(train)):
        return
    trained, names = set(_class_folders(_folder(train))), set(_class_folders(folder))
    if len(trained) == len(names) and trained.isdisjoint(names):
        return  # other names for the same classes
    if trained != names:
        parts = [f'{len(only)} only in {os.path.abspath(place)} ({few(sorted(only))})'
                 for only, place in ((trained - names, _folder(train)), (names - trained, folder)) if only]
        raise UsageError(f'{where}: the class folders are not those of training: {"; ".join(parts)}; labels count '
                         'the folders by name, so both need the same (an empty folder for a class without images)')


def _lists_images(kind):
    """Whether a dataset class lists its images by the method of MMPretrain's ``CustomDataset``."""
    return lists_like(kind, 'mmpretrain.datasets.custom.CustomDataset')


def _prefix(dataset):
    prefix = dataset.get('data_prefix') or ''
    if not isinstance(prefix, str):
        prefix = prefix.get('img_path') or ''
    return os.path.expanduser(prefix) or dataset.get('split') or ''


def _folder(dataset):
    return os.path.join(dataset.get('data_root') or '', _prefix(dataset)) or '.'


def _ann_file(dataset):
    """The annotation file that is read, or ''; a ``split`` has one where ``meta/`` has a file of its name."""
    root, given = dataset.get('data_root') or '', dataset.get('ann_file')
    if given:
        return os.path.join(root, os.path.expanduser(given))
    listed = os.path.join(root, 'meta', f'{dataset.get("split")}.txt')
    return listed if dataset.get('split') and os.path.exists(listed) else ''


def _with_label(dataset):
    return dataset.get('with_label', True) and dataset.get('split') != 'test'


def _class_folders(folder):
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def _has_image(folder, extensions, recursive=True):
    for _, _, files in os.walk(folder, followlinks=True):
        if any(name.lower().endswith(extensions) and not name.startswith('.') for name in files):
            return True
        if not recursive:
            break
    return False


def _found(folder):
    """What a folder holds, in words."""
    path = os.path.abspath(folder)
    if not os.path.isdir(folder):
        return f'there is no {path}'
    names = sorted(os.listdir(folder))
    return f'{path} has {few(names)}' if names else f'{path} is empty'
