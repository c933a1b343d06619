"""Train the model of a config: detection, segmentation or classification."""
import argparse
import errno
import os
import sys

from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmvssm.engine.checkpointing import check_work_dir, where_to_go_on, write_files_whole
from mmvssm.engine.class_check import check_class_counts
from mmvssm.engine.config import (
    AMP_DTYPES,
    CfgOptions,
    TrainingError,
    UsageError,
    check_backend,
    check_launcher,
    import_modules,
    is_main_rank,
    load_config,
    one_line,
    one_line_errors,
    set_amp,
    type_name,
)
from mmvssm.engine.data_check import check_data, check_load_from, check_pretrained, resume_checkpoint
from mmvssm.engine.finite_hook import FiniteHook
from mmvssm.engine.hooks import FloatBoxesHook, PartialLoadingHook, StrictLoadingHook
from mmvssm.engine.label_hook import LabelRangeHook
from mmvssm.engine.samples import NamedSamplesHook, sample_errors
from mmvssm.engine.seeding import IterationSeedHook
from mmvssm.engine.stopping import STOPPED_STATUS, ResumeHook, StopHook, TrainingStopped

#: Of files that cannot be written any more, such as logs.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='folder of logs and checkpoints (default: '
                        'work_dirs/ and the name of the config)')
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='go on from this checkpoint, or from the latest in the work dir')
    parser.add_argument('--amp', choices=tuple(AMP_DTYPES), help='mixed precision')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help='scale the learning rate with the batch size')
    parser.add_argument('--seed', type=int, help='seed of all random numbers')
    parser.add_argument('--deterministic', action='store_true',
                        help='use deterministic algorithms, so that equal seeds give equal runs')
    parser.add_argument('--cfg-options', nargs='+', action=CfgOptions, metavar='KEY=VALUE',
                        help='override the config, e.g. data_root=/path/to/coco/ pretrained=FILE '
                        'train_cfg.max_epochs=1')
    parser.add_argument('--launcher', choices=('none', 'pytorch', 'slurm'), default='none',
                        help='what started the processes of a distributed run')
    return parser.parse_args(argv)


def drop_pretrained(cfg):
    """Leave out the backbone's checkpoint, whose weights a resumed run would replace.

    Returns:
        str: What was left out.
    """
    init_cfg = (cfg.model.get('backbone') or {}).get('init_cfg') or {}
    if not isinstance(init_cfg, dict) or type_name(init_cfg) != 'Pretrained':
        return ''
    cfg.model.backbone.init_cfg = None
    return f'--resume: the pretrained checkpoint {init_cfg.checkpoint} is not read again'


@one_line_errors()
def main(argv=None):
    args = parse_args(argv)
    check_backend()
    cfg = load_config(args.config, args.cfg_options, args.work_dir, args.launcher)
    notes = [import_modules(cfg)]
    check_launcher(args.launcher)
    if args.amp:
        notes.append(set_amp(cfg, args.amp, training=True))
    if args.auto_scale_lr:
        if not cfg.get('auto_scale_lr', {}).get('base_batch_size'):
            raise UsageError('--auto-scale-lr needs auto_scale_lr.base_batch_size in the config')
        cfg.auto_scale_lr.enable = True
    if args.seed is not None and not 0 <= args.seed < 2 ** 32:
        raise UsageError(f'--seed must be from 0 to {2 ** 32 - 1}, got {args.seed}')
    if args.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # cuBLAS asks for it
    if args.seed is not None or args.deterministic:
        cfg.randomness = dict(cfg.get('randomness', {}), deterministic=args.deterministic)
        if args.seed is not None:
            cfg.randomness.seed = args.seed
    if args.resume:
        cfg.resume = True
        start, cfg.load_from = cfg.get('load_from'), None if args.resume == 'auto' else args.resume

    resumed = resume_checkpoint(cfg)
    if args.resume and not resumed:  # nothing to go on from yet
        cfg.resume, cfg.load_from = False, start
    if resumed:
        notes += [f'resume: going on from {resumed}', drop_pretrained(cfg)]
    if is_main_rank():
        check_work_dir(cfg.work_dir)
        check_data(cfg, ('train', 'val'))
        check_class_counts(cfg, ('train', 'val'))
        check_pretrained(cfg)
        check_load_from(cfg, resumed)

    make_resumable(cfg)
    notes.append(allow_accumulation(cfg))
    write_files_whole()
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    for note in filter(None, notes):
        runner.logger.info(note)
    if args.amp:
        runner.register_hook(FloatBoxesHook())
    for hook in (LabelRangeHook(), NamedSamplesHook(), IterationSeedHook(), ResumeHook(), FiniteHook(), StopHook(),
                 StrictLoadingHook() if cfg.get('resume') else PartialLoadingHook()):
        runner.register_hook(hook)
    train(runner)


def allow_accumulation(cfg):
    """Take back DDP's static graph where gradients are accumulated: PyTorch cannot learn it from a step without an
    exchange.

    Returns:
        str: What was changed.
    """
    wrapper = cfg.get('model_wrapper_cfg') or {}
    if cfg.optim_wrapper.get('accumulative_counts', 1) == 1 or not wrapper.get('static_graph'):
        return ''
    wrapper.static_graph = False
    return 'model_wrapper_cfg.static_graph=False, since gradients are accumulated'


def make_resumable(cfg):
    """Let a run go on where it was interrupted, in any iteration, and end as if it had not been.

    Takes this package's checkpoint hook, sampler around the sampler and loop over epochs in place of MMEngine's; a
    config with others of its own keeps them.
    """
    cfg.default_hooks = dict(dict(checkpoint=dict(type='CheckpointHook')), **cfg.get('default_hooks', {}))
    saving = cfg.default_hooks.checkpoint
    if saving and type_name(saving) == 'CheckpointHook':
        saving.type = 'SafeCheckpointHook'
    sampler = cfg.train_dataloader.get('sampler')
    if isinstance(sampler, dict) and type_name(sampler) != 'SeededSampler':
        cfg.train_dataloader.sampler = dict(type='SeededSampler', sampler=sampler)
    loop = cfg.train_cfg
    if type_name(loop) == 'EpochBasedTrainLoop' or (not type_name(loop) and loop.get('by_epoch')):
        loop.pop('by_epoch', None)
        loop.type = 'ResumableEpochLoop'


def train(runner):
    """Train; what ends it early says where the next run goes on."""
    try:
        with sample_errors(runner):
            runner.train()
    except TrainingStopped as stop:
        runner.logger.info(str(stop))
        sys.exit(STOPPED_STATUS)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise TrainingError(f'{one_line(error)}, in {runner.work_dir} or elsewhere. '
                            f'{where_to_go_on(runner.work_dir)}') from error
    except ValueError as error:
        if 'parameter group' not in str(error):  # of PyTorch's optimizers, when they load a state
            raise
        raise UsageError(f'resume: {one_line(error)}. optim_wrapper.constructor and paramwise_cfg, from which groups '
                         'come, have to be those of the run before; or begin a run from its weights: without '
                         '--resume, with --cfg-options load_from=CHECKPOINT, in another --work-dir') from None


if __name__ == '__main__':
    main()
