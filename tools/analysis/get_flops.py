"""Count the parameters and FLOPs (multiply-adds, each counted once) of a config's model."""
import argparse
from functools import partial

import torch
from mmengine.analysis import FlopAnalyzer, parameter_count
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope

from mmvssm.engine.config import (
    CfgOptions,
    UsageError,
    import_modules,
    load_config,
    one_line_errors,
)

# Height and width that publications count at.
SHAPES = dict(mmdet=(800, 1280), mmseg=(512, 2048), mmpretrain=(224, 224))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('--shape', type=int, nargs=2, metavar=('H', 'W'),
                        help='size of the image (default: 800 1280 for detection, 512 2048 for '
                        'segmentation, 224 224 otherwise)')
    parser.add_argument('--depth', type=int, default=0,
                        help='list the modules down to this depth (default: 0, totals only)')
    parser.add_argument('--cfg-options', nargs='+', action=CfgOptions, metavar='KEY=VALUE',
                        help='override the config')
    return parser.parse_args(argv)


def build_model(cfg):
    """Build a config's model for inference, with random weights."""
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    torch.manual_seed(0)
    return revert_sync_batchnorm(MODELS.build(cfg.model)).eval()


def count_flops(model, scope, shape):
    """Trace a model's forward pass on one image.

    A detector also finds its proposals, and its heads see them all: 1000 regions for the boxes and
    100 for the masks with MMDetection's usual settings. Post-processing is not traced.

    Args:
        model (nn.Module): The model, in evaluation mode.
        scope (str): Its ``default_scope``.
        shape (tuple[int, int]): Height and width of the image, in pixels.

    Returns:
        FlopAnalyzer: The counts, by module and by operator.
    """
    if scope == 'mmdet':
        from mmdet.structures import DetDataSample
        sample = DetDataSample(metainfo=dict(
            img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape,
            scale_factor=(1.0, 1.0)))
        model.forward = partial(model.forward, data_samples=[sample])
    image = torch.randn(1, 3, *shape, device=next(model.parameters()).device)
    analyzer = FlopAnalyzer(model, image)
    analyzer.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    with torch.no_grad():
        analyzer.total()
    return analyzer


@one_line_errors()
def main(argv=None):
    args = parse_args(argv)
    if args.shape and min(args.shape) < 1:
        raise UsageError(f'--shape takes two positive numbers, got {args.shape}')
    cfg = load_config(args.config, args.cfg_options)
    note = import_modules(cfg)
    if note:
        print(note)
    scope = cfg.get('default_scope')
    shape = tuple(args.shape or SHAPES.get(scope, (224, 224)))
    model = build_model(cfg)
    parameters = parameter_count(model)
    if torch.cuda.is_available():
        model.cuda()
    flops = count_flops(model, scope, shape)

    if args.depth:
        print(f'{"parameters":>14} {"GFLOPs":>10}  module')
        for name, count in flops.by_module().items():
            if name and name.count('.') < args.depth:
                print(f'{parameters[name]:14,} {count / 1e9:10.3f}  {name}')
    print('GFLOPs by operator: ' + ', '.join(
        f'{name} {count / 1e9:.3f}' for name, count in flops.by_operator().most_common()))
    print('not counted (calls): ' + ', '.join(
        f'{name} {calls}' for name, calls in flops.unsupported_ops().most_common()))
    print(f'input: 3 x {shape[0]} x {shape[1]}')
    print(f'parameters: {parameters[""]:,}')
    print(f'FLOPs: {flops.total() / 1e9:.2f} G')


if __name__ == '__main__':
    main()
