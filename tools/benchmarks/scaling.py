"""How training scales with the number of GPUs: runs of tools/train.py, then of tools/dist_train.sh, as a user starts
them, on generated photographs on disk. Speed, share of linear and share of the time that is spent waiting for data come
from the runs' own logs. See README.md beside this file."""
import argparse
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import torch
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from run import ROOT, Report, describe_system, dtype_of, quantiles, training_log

#: Shares of linear that are wanted, by the number of GPUs, and the most of the time that may be spent waiting for data.
TARGETS = {2: 0.95, 4: 0.92}
MOST_WAITING = 0.05

# What takes time and is not training goes; the data are those of this benchmark.
CONFIG = '''
_base_ = {base!r}
pretrained = None
data_root = {data!r}
train_dataloader = dict(dataset=dict(data_root=data_root, ann_file='annotations.json', data_prefix=dict(img='images/')))
train_cfg = dict(max_epochs=1)
val_cfg = val_dataloader = val_evaluator = test_cfg = test_dataloader = test_evaluator = None
default_hooks = dict(checkpoint=None, logger=dict(interval={interval}))
log_processor = dict(window_size={interval})
'''


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--config', type=Path, default=ROOT / 'configs' / 'mask_rcnn_spatialmamba_t_1x.py',
                        help='a config of a detector on COCO (default: Mask R-CNN Spatial-Mamba-T)')
    parser.add_argument('--gpus', type=positive, nargs='+', default=[1, 2], metavar='N',
                        help='numbers of GPUs, the first of which is what the others are compared with (default: 1 2)')
    parser.add_argument('--iterations', type=positive, default=120, help='that are timed (default: 120)')
    parser.add_argument('--warmup', type=positive, default=40, help='iterations before those (default: 40)')
    parser.add_argument('--interval', type=positive, default=10, help='iterations of which one time is the mean')
    parser.add_argument('--amp', choices=('bf16', 'fp16', 'none'), default='bf16', help='(default: bf16)')
    parser.add_argument('--size', type=positive, nargs=2, default=[384, 640], metavar=('HEIGHT', 'WIDTH'),
                        help='of the photographs (default: 384 640, which the config makes 800x1333)')
    parser.add_argument('--folder', type=Path, help='where photographs and work dirs go (default: a temporary one)')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='those of tools/train.py')
    parser.add_argument('--out', type=Path, help='append the rows to this .json file')
    return parser.parse_args(argv)


def positive(text):
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f'expected a whole number above 0, got {text!r}')
    return int(text)


# Data


def write_photograph(args):
    """Write a smooth picture with coarse noise and seven polygons, about as long as one of COCO's; its annotations."""
    path, number, (height, width) = args
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 255, (12, 20, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    image += rng.normal(0, 6, image.shape).astype(np.int16)
    image = image.clip(0, 255).astype(np.uint8)
    annotations = []
    for _ in range(7):
        radius = rng.uniform(0.08, 0.3) * height
        centre = rng.uniform(radius, (width - radius, height - radius))
        angles = np.linspace(0, 2 * math.pi, 24, endpoint=False)
        radii = radius * rng.uniform(0.6, 1, (24, 1))
        points = centre + radii * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        cv2.fillPoly(image, [points.round().astype(np.int32)], rng.integers(0, 255, 3).tolist())
        left, top = points.min(axis=0)
        right, bottom = points.max(axis=0)
        annotations.append(dict(
            image_id=number, category_id=int(rng.integers(1, 81)), iscrowd=0, segmentation=[points.ravel().tolist()],
            bbox=[left, top, right - left, bottom - top], area=(right - left) * (bottom - top) / 2))
    cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, 90])
    return annotations


def make_photographs(folder, count, size):
    """A folder in COCO's format with as many photographs of size (height, width)."""
    (folder / 'images').mkdir(parents=True, exist_ok=True)
    images = [dict(id=i, file_name=f'{i:06}.jpg', height=size[0], width=size[1]) for i in range(count)]
    tasks = [(folder / 'images' / image['file_name'], image['id'], size) for image in images]
    with multiprocessing.Pool(initializer=cv2.setNumThreads, initargs=(0,)) as pool:
        annotations = [one for several in pool.map(write_photograph, tasks, chunksize=8) for one in several]
    for i, annotation in enumerate(annotations):
        annotation['id'] = i
    categories = [dict(id=i, name=name) for i, name in enumerate(CocoDataset.METAINFO['classes'], start=1)]
    (folder / 'annotations.json').write_text(
        json.dumps(dict(images=images, annotations=annotations, categories=categories)))


# Runs


def command_of(args, gpus, config, work_dir, images):
    """What a user would type."""
    start = [sys.executable, str(ROOT / 'tools' / 'train.py'), str(config)] if gpus == 1 \
        else [str(ROOT / 'tools' / 'dist_train.sh'), str(config), str(gpus)]
    amp = [] if args.amp == 'none' else ['--amp', args.amp]
    return [*start, '--work-dir', str(work_dir), '--seed', '0', *amp,
            '--cfg-options', f'train_dataloader.dataset.indices={images}', *args.cfg_options]


def measure(args, gpus, config, work_dir, batch):
    """A row of one training."""
    command = command_of(args, gpus, config, work_dir, images=gpus * batch * (args.warmup + args.iterations))
    log = work_dir.with_suffix('.txt')
    with log.open('w') as output:
        run = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                             env=dict(os.environ, PYTHON=sys.executable))
    if run.returncode:
        raise SystemExit(f'error: training with --gpus {gpus} ended with status {run.returncode}:\n'
                         + '\n'.join(log.read_text().splitlines()[-15:]))
    lines, _, cfg = training_log(work_dir)
    steps = [line for line in lines if line['step'] > args.warmup]
    ms = quantiles([1e3 * line['time'] for line in steps])
    waiting = sum(line['data_time'] for line in steps) / sum(line['time'] for line in steps)
    return dict(gpus=gpus, ms=ms, rate=1e3 * gpus * batch / ms[1], unit='img/s', batch=batch, iterations=len(lines),
                peak_gib=max(line.get('memory', 0) for line in steps) / 1024 or None, waiting=round(waiting, 4),
                dtype=dtype_of(cfg))


def scaling(args, folder, report):
    """Rows of all numbers of GPUs; whether what is wanted was reached."""
    batch = int(dict(option.split('=', 1) for option in args.cfg_options).get(
        'train_dataloader.batch_size', Config.fromfile(args.config).train_dataloader.batch_size))
    print('making photographs ...', flush=True)
    make_photographs(folder / 'data', max(args.gpus) * batch * (args.warmup + args.iterations), args.size)
    config = folder / f'{args.config.stem}_scaling.py'
    base, data = str(args.config.resolve()), f'{folder / "data"}/'
    config.write_text(CONFIG.format(base=base, data=data, interval=args.interval))
    first, reached = None, True
    for gpus in args.gpus:
        print(f'training on {gpus} GPU{"s" * (gpus > 1)} ...', flush=True)
        row = measure(args, gpus, config, folder / f'{gpus}_gpus', batch)
        first = first or row
        row['linear'] = round(row['rate'] / row['gpus'] * first['gpus'] / first['rate'], 4)
        wanted = TARGETS.get(gpus) if first['gpus'] == 1 else None
        reached &= row['linear'] >= (wanted or 0) and row['waiting'] <= MOST_WAITING
        report.add(f'{args.config.stem}, {gpus} x {batch} images', row.pop('dtype'), **row,
                   target=wanted and f'>= {wanted:.0%} of linear',
                   note=f'{row["linear"]:.1%} of linear, {row["waiting"]:.1%} of the time waiting for data')
    return reached


def main(argv=None):
    args = parse_args(argv)
    if not args.config.is_file():
        raise SystemExit(f'error: --config: no such file: {args.config}')
    argv = sys.argv[1:] if argv is None else argv
    system = describe_system('cuda' if torch.cuda.is_available() else 'cpu', argv, 'tools/benchmarks/scaling.py')
    report = Report(dict(system, cpus=os.cpu_count()), args.out)
    with tempfile.TemporaryDirectory() as temporary:
        reached = scaling(args, (args.folder or Path(temporary)).resolve(), report)
    print(report.table())
    return 0 if reached else 1


if __name__ == '__main__':
    sys.exit(main())
