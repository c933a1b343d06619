"""What the command-line tools do to a config before MMEngine's ``Runner`` takes it.

Functions change the ``Config`` they are given. Those that decide something the user should know of
return it as a sentence for the log, '' where there is nothing to say.
"""
import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.utils import apply_to, import_modules_from_strings

from mmvssm import kernels
from mmvssm.kernels import BackendError

AMP_DTYPES = dict(bf16='bfloat16', fp16='float16')


class UsageError(Exception):
    """A mistake in what the user gave; its one-line message says what came and what to give."""


class TrainingError(UsageError):
    """What ends a training that has begun; any rank may be the one that met it, and prints it."""


#: The variables in which a launcher tells a process its number among all, and among those of its machine.
RANKS = dict(pytorch=('RANK', 'LOCAL_RANK'), slurm=('SLURM_PROCID', 'SLURM_LOCALID'))


def is_main_rank():
    """Whether this process speaks for the job."""
    return all(os.environ.get(rank, '0') == '0' for rank, _ in RANKS.values())


def check_launcher(launcher):
    """Raise :class:`UsageError` if ``launcher``, 'none', 'pytorch' or 'slurm', did not start this process, or more
    processes than there are GPUs.
    """
    if launcher == 'none':
        return
    missing = [name for name in RANKS[launcher] if not os.environ.get(name, '').isdigit()]
    if missing:
        start = dict(pytorch='tools/dist_train.sh or torchrun', slurm='tools/slurm_train.sh or srun')[launcher]
        raise UsageError(f'--launcher {launcher}: {" and ".join(missing)} not set; start with {start}')
    local, gpus = int(os.environ[RANKS[launcher][1]]), torch.accelerator.device_count()
    if local >= gpus and not torch.distributed.is_initialized():  # on CPUs a custom import has done that
        raise UsageError(f'--launcher {launcher}: there is no GPU for process {local + 1} of this machine, PyTorch '
                         f'sees {gpus}; start as many as there are')


@contextmanager
def one_line_errors():
    """Turn the user's mistakes into one line on stderr and exit code 1.

    Those are a :class:`UsageError`, a ``BackendError`` of the kernels and what :func:`is_config_mistake`
    finds. The first two are met by all ranks alike, or by all of a machine that lacks a file: its first prints them.
    A :class:`TrainingError`, and what cannot be built, is printed by each rank that met it. Use as
    ``@one_line_errors()`` on a tool's ``main``. Other exceptions keep their traceback.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (UsageError, BackendError)):
            message = str(error)
        elif is_config_mistake(error):
            message = one_line(error, most=1000)
        else:
            raise
        if is_main_rank():
            raise SystemExit(f'error: {message}') from None
        rank, local = ([os.environ[names[i]] for names in RANKS.values() if names[i] in os.environ] for i in (0, 1))
        alike = isinstance(error, (UsageError, BackendError)) and not isinstance(error, TrainingError)
        raise SystemExit(1 if alike and {*local} != {'0'} else f'error: rank {rank[0]}: {message}') from None


def is_config_mistake(error):
    """Whether an exception says that a part of the config cannot be built or initialised as asked for.

    It does if it was raised below ``build_from_cfg`` or ``init_weights`` by this package or by the registries of
    MMEngine, whose messages are complete. Anything else may be a bug, and so may what the training loop raises;
    only files that cannot be read there are never one.
    """
    if not isinstance(error, (ValueError, TypeError, RuntimeError, KeyError, OSError)):
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not {'build_from_cfg', 'init_weights'} & {frame.f_code.co_name for frame in frames}:
        return False
    module = frames[-1].f_globals.get('__name__', '')
    return isinstance(error, OSError) or f'{module}.'.startswith(('mmvssm.', 'mmengine.registry.'))


class CfgOptions(DictAction):
    """MMEngine's ``--cfg-options KEY=VALUE ...``, with a message for what has no ``=``."""

    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            if '=' not in value:
                parser.error(f'{option_string} takes KEY=VALUE, got {value}')
        super().__call__(parser, namespace, values, option_string)


def load_config(path, options=None, work_dir=None, launcher='none'):
    """Read a config and apply the command line's overrides to it.

    The config's ``custom_imports`` are left to :func:`import_modules`.

    Args:
        path (str): Config file.
        options (dict, optional): ``--cfg-options``, see :func:`merge_options`.
        work_dir (str, optional): Where logs and checkpoints go. Defaults to the ``work_dir`` of the
            config, or ``work_dirs/`` and the config's name.
        launcher (str): 'none', 'pytorch' or 'slurm'.

    Returns:
        Config: The config, ready for :func:`import_modules`.

    Raises:
        UsageError: The file or one it is based on is missing or is not valid Python, or an environment
            variable that it reads is empty or missing.
    """
    if not os.path.isfile(path):
        raise UsageError(f'config: no such file: {os.path.abspath(path)}')
    try:
        cfg = Config.fromfile(path, import_custom_modules=False)
    except (OSError, SyntaxError, ModuleNotFoundError) as error:
        raise UsageError(f'config: cannot read {path}: {one_line(error)}') from None
    except KeyError as error:
        # MMEngine calls variables that are set to nothing missing.
        empty = [name for name, value in os.environ.items() if not value and f'`{name}`' in str(error)]
        why = f'environment variable {empty[0]} is empty; unset it or give it a value' if empty else one_line(error)
        raise UsageError(f'config: cannot read {path}: {why}') from None
    merge_options(cfg, options or {})
    cfg.work_dir = work_dir or cfg.get('work_dir') or os.path.join('work_dirs', Path(path).stem)
    cfg.launcher = launcher
    return cfg


def merge_options(cfg, options):
    """Merge ``--cfg-options`` into a config.

    MMEngine copies a config's variables into the places that use them while it reads the file, so
    overriding a variable afterwards changes nothing else. Two variables are carried along here:
    ``data_root`` (:func:`set_data_root`) and ``pretrained`` (:func:`set_pretrained`). Both are set
    before the other options, which can thus still override a single place.

    Args:
        cfg (Config): The config to change.
        options (dict): Dotted keys and their values.
    """
    options = dict(options)
    if 'data_root' in options:
        set_data_root(cfg, options.pop('data_root'))
    if 'pretrained' in options:
        set_pretrained(cfg, options.pop('pretrained'))
    cfg.merge_from_dict(options)


def set_data_root(cfg, data_root):
    """Replace the top-level ``data_root`` in every string of the config that starts with it."""
    old = cfg.get('data_root')
    if not isinstance(old, str) or not old.strip('/'):
        raise UsageError('data_root: this config has no top-level variable data_root; set the '
                         'folder where it is used, e.g. train_dataloader.dataset.data_root=FOLDER')
    if not isinstance(data_root, str) or not data_root:
        raise UsageError(f'data_root must be a folder, got {data_root!r}')
    old, new = old.rstrip('/'), data_root.rstrip('/')

    def moved(value):
        if isinstance(value, str) and (value == old or value.startswith(old + '/')):
            return new + value[len(old):]
        if isinstance(value, dict):
            return {key: moved(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(moved(item) for item in value)
        return value

    for key in list(cfg):
        cfg[key] = moved(cfg[key])


def set_pretrained(cfg, pretrained):
    """Let the backbone start from the checkpoint ``pretrained``, or from scratch if it is None."""
    backbone = cfg.model.get('backbone')
    if backbone is None:
        raise UsageError(f'pretrained: the model {cfg.model.type} of this config has no backbone')
    if pretrained is None:
        backbone.init_cfg = None
    elif isinstance(pretrained, str) and pretrained:
        # Keep what else the config says of its checkpoint, such as the prefix of its keys.
        init_cfg = backbone.get('init_cfg') or {}
        kept = init_cfg if type_name(init_cfg) == 'Pretrained' else {}
        backbone.init_cfg = dict(kept, type='Pretrained', checkpoint=pretrained)
    else:
        raise UsageError(f'pretrained must be a checkpoint file or None, got {pretrained!r}')
    cfg.pretrained = pretrained


def import_modules(cfg):
    """Import the config's ``custom_imports`` and keep a broken MMPretrain out of its way.

    MMDetection imports MMPretrain wherever it is installed (for re-identification), and MMPretrain
    1.3 fails half-way beside transformers 5. Where it fails and the config does not use it, it is
    made to look absent, which MMDetection is prepared for.

    Returns:
        str: What was left out and why.

    Raises:
        UsageError: MMPretrain is needed but broken, or a custom import fails.
    """
    note = ''
    error = _mmpretrain_error()
    if error:
        version = importlib.metadata.version('transformers')
        why = f'mmpretrain cannot be imported beside transformers {version} ({error})'
        remedy = 'pip install "transformers<5", or pip uninstall transformers'
        if cfg.get('default_scope') == 'mmpretrain' or 'mmpretrain.' in str(cfg.to_dict()):
            raise UsageError(f'{why}, and this config needs it: {remedy}')
        for name in [name for name in sys.modules if name.split('.')[0] == 'mmpretrain']:
            del sys.modules[name]
        sys.modules['mmpretrain'] = None
        note = f'{why}; going on without it, as this config does not need it. To have it: {remedy}'
    if cfg.get('custom_imports'):
        try:
            import_modules_from_strings(**cfg.custom_imports)
        except ImportError as failure:
            cause = one_line(failure.__context__ or failure)
            raise UsageError(f'custom_imports: {failure} ({cause})') from None
    return note


def _mmpretrain_error():
    """Why MMPretrain cannot be imported beside transformers 5 or later, or ''; others are not tried."""
    if 'mmpretrain' in sys.modules and sys.modules['mmpretrain'] is None:
        return ''
    try:
        major = int(importlib.metadata.version('transformers').split('.')[0])
    except importlib.metadata.PackageNotFoundError:
        return ''
    if major < 5 or not importlib.util.find_spec('mmpretrain'):
        return ''
    try:
        importlib.import_module('mmpretrain.models')
    except Exception as error:
        return one_line(error)
    return ''


def check_backend():
    """Check that some operator has the backend asked for by the environment variable ``MMVSSM_BACKEND``."""
    name = os.environ.get('MMVSSM_BACKEND')
    operators = [item.name for item in pkgutil.iter_modules(kernels.__path__)
                 if item.ispkg and not item.name.startswith('_')]
    modules = [importlib.import_module(f'{kernels.__name__}.{operator}.dispatch') for operator in operators]
    known = dict.fromkeys(backend.name for module in modules for backend in module.BACKENDS)
    if name and name not in known:
        raise UsageError(f'MMVSSM_BACKEND={name}: no such backend; there are {", ".join(known)}; unset it for '
                         'the fastest that can run')


def set_amp(cfg, dtype, training):
    """Switch mixed precision on, with loss scaling for fp16 only.

    Args:
        cfg (Config): The config to change.
        dtype (str): 'bf16' or 'fp16'.
        training (bool): Whether the run trains; if not, the test loop gets the precision.

    Returns:
        str: What else had to change.

    Raises:
        UsageError: There is no CUDA device, it has no bf16, or the optimizer wrapper cannot do it.
    """
    if not torch.cuda.is_available():
        raise UsageError(f'--amp {dtype} needs a CUDA device and none was found; leave --amp out '
                         'to run in fp32')
    if dtype == 'bf16' and not torch.cuda.is_bf16_supported():
        raise UsageError('--amp bf16: this CUDA device has no bfloat16; use --amp fp16')
    if training:
        wrapper = cfg.optim_wrapper
        if type_name(wrapper) not in ('', 'OptimWrapper', 'AmpOptimWrapper'):
            raise UsageError('--amp works with optim_wrapper.type OptimWrapper, got '
                             f'{type_name(wrapper)}')
        wrapper.type = 'AmpOptimWrapper'
        wrapper.dtype = AMP_DTYPES[dtype]
        # bf16 has the exponents of fp32: nothing underflows that a scale could save.
        wrapper.loss_scale = 'dynamic' if dtype == 'fp16' else dict(enabled=False)
    else:
        # MMEngine's test loop autocasts to the default dtype of the device.
        cfg.test_cfg.fp16 = True
        torch.set_autocast_dtype('cuda', getattr(torch, AMP_DTYPES[dtype]))
    changed = _use_torchvision_roi_align(cfg.model) if dtype == 'bf16' else 0
    if not changed:
        return ''
    return (f'--amp bf16: use_torchvision=True set for {changed} RoIAlign layer(s), since the CUDA '
            'RoIAlign of MMCV has no bfloat16 kernel')


def _use_torchvision_roi_align(value):
    """Set ``use_torchvision`` in every RoIAlign below ``value``; return how many changed."""
    if isinstance(value, (list, tuple)):
        return sum(_use_torchvision_roi_align(item) for item in value)
    if not isinstance(value, dict):
        return 0
    changed = sum(_use_torchvision_roi_align(item) for item in value.values())
    if type_name(value) == 'RoIAlign' and not value.get('use_torchvision'):
        value['use_torchvision'] = True
        changed += 1
    return changed


def keep_boxes_fp32(model):
    """Let dense heads hand out fp32 under mixed precision.

    MMDetection makes anchors in the dtype of the head's scores. Beyond pixel 1024 neighbouring bf16
    numbers are 8 pixels apart, fp16 numbers 1: proposals would be shifted.

    Args:
        model (nn.Module): The model, changed in place; nothing happens without dense heads.
    """
    for module in model.modules():
        if hasattr(module, 'prior_generator'):
            module.register_forward_hook(_float_outputs)


def _float_outputs(module, inputs, outputs):
    return apply_to(outputs, torch.is_tensor, torch.Tensor.float)


def as_list(value):
    """A list of what a config gives as nothing, one item or several."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def type_name(item):
    """The name of the class that a config's dict builds, without its scope; '' if it names none."""
    kind = item.get('type', '')
    return kind.split('.')[-1] if isinstance(kind, str) else kind.__name__


def one_line(error, most=300):
    """The class and text of an exception, without line breaks and cut to ``most`` characters."""
    text = f'{type(error).__name__}: {" ".join(str(error).split())}'
    return text if len(text) <= most else f'{text[:most]} ...'
