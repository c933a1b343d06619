"""Evaluate a checkpoint of a config's model: detection, segmentation or classification."""
import argparse
import os
from copy import deepcopy

from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmvssm.engine.class_check import check_class_counts
from mmvssm.engine.config import (
    AMP_DTYPES,
    CfgOptions,
    UsageError,
    as_list,
    check_backend,
    check_launcher,
    import_modules,
    is_main_rank,
    load_config,
    one_line_errors,
    set_amp,
    type_name,
)
from mmvssm.engine.data_check import check_checkpoint, check_data
from mmvssm.engine.hooks import FloatBoxesHook, StrictLoadingHook
from mmvssm.engine.samples import NamedSamplesHook, sample_errors

SEG_TTA_RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)

TTA_MODELS = dict(
    mmdet=dict(
        type='DetTTAModel',
        tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)),
    mmseg=dict(type='SegTTAModel'),
    mmpretrain=dict(type='AverageClsScoreTTA'))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--work-dir', help='folder of logs and metrics (default: work_dirs/ and '
                        'the name of the config)')
    parser.add_argument('--out', help='save the predictions: a .pkl file, or for segmentation a '
                        'folder of label maps')
    parser.add_argument('--show-dir', help='draw the predictions into this folder')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    parser.add_argument('--amp', choices=tuple(AMP_DTYPES), help='mixed precision')
    parser.add_argument('--cfg-options', nargs='+', action=CfgOptions, metavar='KEY=VALUE',
                        help='override the config, e.g. data_root=/path/to/coco/')
    parser.add_argument('--launcher', choices=('none', 'pytorch', 'slurm'), default='none',
                        help='what started the processes of a distributed run')
    return parser.parse_args(argv)


def set_tta(cfg):
    """Wrap the model for test-time augmentation.

    The config's own ``tta_model`` and ``tta_pipeline`` are taken where it has them. By default
    detection and classification merge both flips; segmentation merges both flips of six scales
    (``SEG_TTA_RATIOS`` times the scale of the test pipeline).

    Returns:
        str: What is not evaluated, '' for nothing.

    Raises:
        UsageError: The task has no way to merge its predictions.
    """
    scope = cfg.get('default_scope')
    if 'tta_model' not in cfg:
        if scope not in TTA_MODELS:
            raise UsageError(f'--tta: no default for default_scope {scope!r}, only for '
                             f'{", ".join(TTA_MODELS)}; define tta_model and tta_pipeline')
        cfg.tta_model = deepcopy(TTA_MODELS[scope])
    note = _evaluate_boxes_only(cfg) if type_name(cfg.tta_model) == 'DetTTAModel' else ''
    # MMPretrain's EMAHook cannot load into the wrapped model, and without a word keeps random averages. A
    # checkpoint's weights are the averages already.
    cfg.custom_hooks = [hook for hook in cfg.get('custom_hooks') or [] if type_name(hook) != 'EMAHook'
                        or not hook.get('evaluate_on_ema', True)]

    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    if 'tta_pipeline' not in cfg:
        cfg.tta_pipeline = _tta_pipeline(dataset.pipeline, scope)
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(cfg.tta_model, module=cfg.model)
    return note


def _tta_pipeline(pipeline, scope):
    """The test pipeline with its last steps under ``TestTimeAug``."""
    flips = [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)]
    if scope != 'mmseg':
        *steps, pack = deepcopy(pipeline)
        if 'meta_keys' in pack:
            # Merging undoes the flips, so each view has to say how it was flipped.
            pack.meta_keys = tuple(dict.fromkeys((*pack.meta_keys, 'flip', 'flip_direction')))
        return [*steps, dict(type='TestTimeAug', transforms=[flips, [pack]])]

    for i, step in enumerate(pipeline):
        if type_name(step) == 'Resize' and isinstance(step.get('scale'), (list, tuple)):
            sizes = [dict(step, scale=tuple(int(side * ratio) for side in step.scale))
                     for ratio in SEG_TTA_RATIOS]
            rest = [[later] for later in pipeline[i + 1:]]
            return [*pipeline[:i], dict(type='TestTimeAug', transforms=[sizes, flips, *rest])]
    raise UsageError('--tta: the test pipeline has no Resize to a width and height; define '
                     'tta_pipeline')


def _evaluate_boxes_only(cfg):
    """Drop the masks' metric of a detector with masks, which ``DetTTAModel`` cannot merge."""
    with_masks = [item for item in as_list(cfg.test_evaluator)
                  if 'segm' in as_list(item.get('metric'))]
    if not with_masks:
        return ''
    if not (cfg.model.get('roi_head') or {}).get('mask_head'):
        raise UsageError('--tta: MMDetection merges boxes only, and the masks of '
                         f'{type_name(cfg.model)} cannot be left out')
    for item in with_masks:
        item.metric = [metric for metric in as_list(item.metric) if metric != 'segm']
    return ('--tta: MMDetection merges boxes only, so masks are left out and segm mAP is not '
            'evaluated')


def set_out(cfg, out):
    """Save the predictions in a pickle file, or for segmentation as label maps in a folder."""
    scope = cfg.get('default_scope')
    if scope == 'mmseg':
        if os.path.splitext(out)[1]:
            raise UsageError(f'--out takes a folder for segmentation, got {out}')
        for item in as_list(cfg.test_evaluator):
            item.output_dir = out
        return
    if not out.endswith(('.pkl', '.pickle')):
        raise UsageError(f'--out takes a file that ends in .pkl or .pickle, got {out}')
    dump = dict(type='DumpDetResults' if scope == 'mmdet' else 'DumpResults', out_file_path=out)
    cfg.test_evaluator = [*as_list(cfg.test_evaluator), dump]


def set_show_dir(cfg, folder):
    """Draw the predictions of every test image into a folder."""
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise UsageError('--show-dir needs default_hooks.visualization in the config')
    # Absolute, as the hooks join relative ones to the folder of the run.
    folder = os.path.abspath(folder)
    scope = cfg.get('default_scope')
    if scope == 'mmpretrain':
        hook.update(enable=True, interval=1, out_dir=folder)
    elif scope == 'mmseg':
        hook.update(draw=True, interval=1)
        cfg.visualizer.save_dir = folder
    else:
        hook.update(draw=True, test_out_dir=folder)


class BoxesOnlyHook(Hook):
    """Remove a detector's mask head for test-time augmentation.

    Done after the weights are loaded and not in the config, so that the checkpoint fits exactly.
    """

    def before_test(self, runner):
        model = runner.model
        while hasattr(model, 'module'):
            model = model.module
        if getattr(model, 'roi_head', None) is not None:
            model.roi_head.mask_head = None


@one_line_errors()
def main(argv=None):
    args = parse_args(argv)
    check_backend()
    cfg = load_config(args.config, args.cfg_options, args.work_dir, args.launcher)
    notes = [import_modules(cfg)]
    check_launcher(args.launcher)
    if args.amp:
        notes.append(set_amp(cfg, args.amp, training=False))
    if args.tta and args.show_dir and cfg.get('default_scope') == 'mmpretrain':
        raise UsageError('--show-dir: the visualization hook of MMPretrain cannot draw with --tta')
    if args.tta:
        notes.append(set_tta(cfg))
    if args.out:
        set_out(cfg, args.out)
    if args.show_dir:
        set_show_dir(cfg, args.show_dir)
    cfg.load_from = args.checkpoint
    cfg.resume = False

    if is_main_rank():
        check_data(cfg, ['test'])
        check_class_counts(cfg, ['test'])
        check_checkpoint(args.checkpoint, 'checkpoint')

    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    for note in filter(None, notes):
        runner.logger.info(note)
    if args.amp:
        runner.register_hook(FloatBoxesHook())
    runner.register_hook(StrictLoadingHook())
    if args.tta and type_name(cfg.model) == 'DetTTAModel':
        runner.register_hook(BoxesOnlyHook())
    runner.register_hook(NamedSamplesHook())
    with sample_errors(runner):
        runner.test()


if __name__ == '__main__':
    main()
