"""What a config says of its datasets, found out without reading the data."""
import os

from mmengine.registry import DATASETS


def leaf_datasets(dataset, where):
    """The datasets below wrappers such as ``ConcatDataset``, each with its place in the config.

    Args:
        dataset (ConfigDict): A dataset or a wrapper.
        where (str): Its place in the config, such as 'train_dataloader.dataset'.

    Yields:
        tuple[str, ConfigDict]: The place and the dataset.
    """
    if 'dataset' in dataset:
        yield from leaf_datasets(dataset.dataset, f'{where}.dataset')
    elif 'datasets' in dataset:
        for i, item in enumerate(dataset.datasets):
            yield from leaf_datasets(item, f'{where}.datasets.{i}')
    else:
        yield where, dataset


def dataset_class(cfg, dataset):
    """The class of a dataset, or None if no registry has it."""
    kind = dataset.get('type')
    if isinstance(kind, str):
        with DATASETS.switch_scope_and_registry(cfg.get('default_scope')) as datasets:
            kind = datasets.get(kind)
    return kind


def lists_like(kind, other):
    """Whether the dataset class ``kind`` lists its samples by the method of ``other``, 'package.module.Class'."""
    method = getattr(kind, 'load_data_list', None)
    return f'{getattr(method, "__module__", "")}.{getattr(method, "__qualname__", "")}' == f'{other}.load_data_list'


def build_unread(cfg, dataset):
    """Build a dataset without its pipeline and without listing its samples; None for a class that cannot do so."""
    with DATASETS.switch_scope_and_registry(cfg.get('default_scope')) as datasets:
        try:
            return datasets.build(dict(dataset, pipeline=[], lazy_init=True))
        except TypeError:  # a user's class with other arguments
            return None


def class_names(dataset, kind):
    """The names of a dataset's classes, or None if it has none or reads them from its data or a file.

    Args:
        dataset (ConfigDict): A dataset that is no wrapper.
        kind (type, optional): Its class.
    """
    names = (dataset.get('metainfo') or {}).get('classes') or dataset.get('classes')
    if names is None:
        names = getattr(kind, 'METAINFO', {}).get('classes')
    return None if isinstance(names, str) else names


def file_sizes(folder, names):
    """The sizes in bytes of the files beside the named ones, by normalised name below ``folder``."""
    sizes = {}
    for parent in {os.path.dirname(os.path.normpath(name)) for name in names}:
        in_folder = os.path.join(folder, parent)
        if not os.path.isdir(in_folder):
            continue
        with os.scandir(in_folder) as entries:
            for entry in entries:
                if entry.is_file():  # no link to what is gone
                    sizes[os.path.join(parent, entry.name)] = entry.stat().st_size
    return sizes


def few(names, most=5):
    """The first of some names in words."""
    names = list(names)
    return ', '.join(map(str, names[:most])) + (', ...' if len(names) > most else '')
