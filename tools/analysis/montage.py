"""Put the pictures that ``tools/test.py --show-dir`` drew side by side into one."""
import argparse
import sys
from pathlib import Path

import cv2
import numpy as np

SUFFIXES = ('.jpg', '.jpeg', '.png')


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', type=Path, help='searched for pictures, subfolders included')
    parser.add_argument('out', type=Path, help='the picture to write')
    parser.add_argument('--columns', type=int, default=3)
    parser.add_argument('--rows', type=int, default=4)
    parser.add_argument('--height', type=int, default=256, help='of each picture, in pixels')
    return parser.parse_args(argv)


def montage(pictures, columns, height, gap=6):
    """Pictures (H, W, 3) of any sizes on a white grid, each scaled to ``height`` and centred in its cell."""
    pictures = [cv2.resize(p, (max(1, round(p.shape[1] * height / p.shape[0])), height),
                           interpolation=cv2.INTER_AREA) for p in pictures]
    width = max(p.shape[1] for p in pictures)
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        top = i // columns * (height + gap)
        left = i % columns * (width + gap) + (width - picture.shape[1]) // 2
        sheet[top:top + height, left:left + picture.shape[1]] = picture
    return sheet


def main(argv=None):
    args = parse_args(argv)
    for name in ('columns', 'rows', 'height'):
        if getattr(args, name) < 1:
            sys.exit(f'error: --{name} must be at least 1, got {getattr(args, name)}')
    files = sorted(p for p in args.folder.rglob('*') if p.suffix.lower() in SUFFIXES)
    if not files:
        sys.exit(f'error: no pictures ({", ".join(SUFFIXES)}) in {args.folder}; '
                 'draw some with tools/test.py --show-dir')
    count = args.columns * args.rows
    chosen = [files[i * len(files) // count] for i in range(count)] if len(files) > count else files
    args.out.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(args.out), montage([cv2.imread(str(f)) for f in chosen], args.columns, args.height))
    print(f'{len(chosen)} of {len(files)} pictures: {args.out}')


if __name__ == '__main__':
    main()
