"""Make the offline demo data set: real handwritten digits on real photographs.

The digits are the 1797 images of 8x8 pixels that ship with scikit-learn (the test part of the UCI
"Optical Recognition of Handwritten Digits" set); the backgrounds are photographs that ship inside
the scikit-learn and scikit-image packages.  Nothing is ever downloaded.  The result is a detection
and instance segmentation data set in COCO format, with the ten categories '0' to '9' (ids 1 to 10):

    OUT/train/000000.png ...                  pictures of size x size pixels, RGB
    OUT/val/000000.png ...
    OUT/annotations/instances_train.json
    OUT/annotations/instances_val.json

What train and val share, and what they do not:

* Digits.  The source file holds one sheet of about 130 digits per writer, one sheet after the
  other.  Train uses the samples before ``FIRST_VAL_DIGIT`` and val those from there on, and that is
  where a sheet begins, so no sheet has digits in both.
* Photographs.  Each photograph is cut once across its longer side: train crops come from the first
  two thirds (left or top), val crops from the last third.  A val crop never has a source pixel in
  common with a train crop, though both may show the same scene.

The random numbers of a picture come from (seed, split, index) alone, so a picture depends neither
on the others nor on how many there are.  With the same versions of the packages named in the
``info`` part of the json files, the same arguments give the same bytes.

Masks hold visible pixels only, as uncompressed run-length encoding: where a later digit covers an
earlier one, the pixel belongs to the later.  Boxes are tight around the visible mask, and areas
count its pixels.

Usage:
    python tools/data/make_digits.py --out data/digits --train 1500 --val 200 --size 128 --seed 0
"""

import argparse
import json
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

try:
    import numpy as np
    import PIL
    import skimage
    import sklearn
    from PIL import Image
    from sklearn.datasets import load_digits, load_sample_image
except ImportError as error:
    sys.exit(
        f'make_digits.py: error: {error}; '
        'install what is needed with: pip install scikit-learn scikit-image pillow'
    )

TOOL_VERSION = '1.0'
SPLITS = ('train', 'val')
CATEGORIES = [{'id': i + 1, 'name': str(i), 'supercategory': 'digit'} for i in range(10)]

# The digits file holds 1797 samples; its last three sheets begin at 1415.
DIGIT_COUNT = 1797
FIRST_VAL_DIGIT = 1415

SKLEARN_PHOTOS = ('china.jpg', 'flower.jpg')
SKIMAGE_PHOTOS = (
    'astronaut.png',
    'brick.png',
    'camera.png',
    'chelsea.png',
    'coffee.png',
    'coins.png',
    'grass.png',
    'gravel.png',
    'moon.png',
    'motorcycle_left.png',
    'rocket.jpg',
)
TRAIN_FRACTION = 2 / 3  # of a photograph's longer side
CROP_SIDE = (96, 160)  # photograph pixels, shortest and longest

DIGITS_PER_IMAGE = (1, 5)
DIGIT_SIDE = (0.17, 0.46)  # of the picture's side; the side of the upright 8x8 grid
MIN_DIGIT_SIDE = 14.0  # pixels, for small pictures
MAX_ROTATION = 30.0  # degrees either way: more would turn a 6 towards a 9
INK_THRESHOLD = (0.38, 0.54)  # of full ink: the lower, the thicker the stroke
OPACITY = (0.85, 1.0)
EDGE_WIDTH = 1.5  # pixels over which a stroke's edge goes from clear to opaque
MIN_VISIBLE = 0.65  # of a digit's own pixels, after all later digits are placed
MIN_CONTRAST = 70.0  # 0 to 255, see colour_distance
COLOUR_TRIES = 24
PLACE_TRIES = 10

SIZE_LIMITS = (32, 1024)
COUNT_LIMITS = (1, 999999)
SEED_LIMITS = (0, 2**32 - 1)


class DataError(Exception):
    """A mistake in what was asked for, told to the user in one line."""


@dataclass(frozen=True)
class DigitPool:
    """Digits to draw from: ``images`` (N, 8, 8) float32 in 0..1 (1 is ink), ``labels`` (N,) int in
    0..9 and ``indices`` (N,) int, the place of each in scikit-learn's file."""

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray


@dataclass(frozen=True)
class Instance:
    """One digit in a picture: its ``label`` in 0..9, its visible ``mask`` (size, size) bool and
    ``digit_index``, its place in scikit-learn's file."""

    label: int
    mask: np.ndarray
    digit_index: int


# ---------------------------------------------------------------------------------------------
# Sources


def digit_range(split):
    """The samples of scikit-learn's digits file that ``split`` may use."""
    if split == 'train':
        return range(FIRST_VAL_DIGIT)
    return range(FIRST_VAL_DIGIT, DIGIT_COUNT)


def region_boxes(width, height):
    """Cut a photograph in two: ``{'train': box, 'val': box}``, with boxes (x0, y0, x1, y1) in
    pixels, x1 and y1 exclusive."""
    if width >= height:
        cut = round(width * TRAIN_FRACTION)
        return {'train': (0, 0, cut, height), 'val': (cut, 0, width, height)}
    cut = round(height * TRAIN_FRACTION)
    return {'train': (0, 0, width, cut), 'val': (0, cut, width, height)}


def load_digit_pool(split):
    """The digits of one split, as a `DigitPool`."""
    data = load_digits()
    chosen = np.array(digit_range(split))
    return DigitPool(
        images=(data.images[chosen] / 16).astype(np.float32),
        labels=data.target[chosen],
        indices=chosen,
    )


def load_photos():
    """All photographs, as ``{name: (height, width, 3) uint8}``; grey ones are made RGB."""
    photos = {name: load_sample_image(name) for name in SKLEARN_PHOTOS}
    for name in SKIMAGE_PHOTOS:
        path = Path(skimage.data_dir) / name
        if not path.is_file():
            raise DataError(
                f'scikit-image {skimage.__version__} does not ship {name}; '
                'a version that does: pip install scikit-image==0.26.0'
            )
        with Image.open(path) as photo:
            photos[name] = np.asarray(photo.convert('RGB'))
    return photos


def draw_crop(rng, photos, split):
    """Choose a square crop of a random photograph, inside the region of ``split``: the
    photograph's name and the crop's box (x0, y0, x1, y1) in its pixels."""
    names = list(photos)
    name = names[rng.integers(len(names))]
    height, width = photos[name].shape[:2]
    x0, y0, x1, y1 = region_boxes(width, height)[split]
    longest = min(CROP_SIDE[1], x1 - x0, y1 - y0)
    side = int(rng.integers(CROP_SIDE[0], longest + 1))
    left = int(rng.integers(x0, x1 - side + 1))
    top = int(rng.integers(y0, y1 - side + 1))
    return name, (left, top, left + side, top + side)


# ---------------------------------------------------------------------------------------------
# Scene


def render_digit(digit, side, angle, threshold):
    """Draw an 8x8 digit large, turned and with soft edges.

    Args:
        digit: (8, 8) float32 in 0..1, 1 is ink.
        side: length in pixels that the 8 grid cells come to.
        angle: degrees, counter-clockwise.
        threshold: share of full ink at which the stroke's edge lies, 0..1.

    Returns:
        (h, w) float32 alpha in 0..1, cut tight around the pixels where it is above 0.
    """
    padded = np.pad(digit, 2)
    cells_per_pixel = 8 / side
    cos = math.cos(math.radians(angle)) * cells_per_pixel
    sin = math.sin(math.radians(angle)) * cells_per_pixel
    canvas = math.ceil(side * 12 / 8 * math.sqrt(2))
    # Canvas centre to grid centre; image rows run downwards.
    x_shift = 6 - (cos - sin) * canvas / 2
    y_shift = 6 - (sin + cos) * canvas / 2
    ink = Image.fromarray(padded).transform(
        (canvas, canvas),
        Image.Transform.AFFINE,
        (cos, -sin, x_shift, sin, cos, y_shift),
        resample=Image.Resampling.BICUBIC,
    )
    # Ink rises by about 1 per cell at an edge; never so flat an edge that no ink is not clear.
    rise = min(cells_per_pixel * EDGE_WIDTH, 2 * threshold)
    alpha = (0.5 + (np.asarray(ink) - threshold) / rise).clip(0, 1)
    x0, y0, x1, y1 = tight_box(alpha > 0)
    return alpha[y0:y1, x0:x1]


def tight_box(mask):
    """The box (x0, y0, x1, y1) around the true pixels of a non-empty (h, w) bool mask, in pixels,
    x1 and y1 exclusive."""
    columns = np.flatnonzero(mask.any(axis=0))
    rows = np.flatnonzero(mask.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def colour_distance(first, second):
    """Distance of RGB colours (..., 3) in 0..255, the channels weighted roughly as the eye does;
    0 for equal colours, 255 for black against white."""
    weights = np.array([0.3, 0.5, 0.2], dtype=np.float32)
    return np.sqrt(((first - second) ** 2) @ weights)


def draw_colour(rng, patch, opacity):
    """A random RGB colour (3,) in 0..255 that can be told from nearly all of ``patch`` (h, w, 3)
    when painted over it with ``opacity``; the best of those tried where the patch allows none."""
    step = 1 + max(patch.shape[:2]) // 32  # about 32 x 32 pixels tell enough
    seen = patch[::step, ::step].reshape(1, -1, 3)
    colours = rng.uniform(0, 255, (COLOUR_TRIES, 1, 3)).astype(np.float32)
    distances = opacity * colour_distance(colours, seen)
    contrast = np.percentile(distances, 5, axis=1)
    enough = np.flatnonzero(contrast >= MIN_CONTRAST)
    return colours[enough[0] if enough.size else contrast.argmax(), 0]


def compose_scene(rng, digits, background, size):
    """Put random digits on a background.

    Args:
        rng: the `numpy.random.Generator` that makes every choice.
        digits: the `DigitPool` to draw from.
        background: (h, w, 3) uint8 crop of a photograph; scaled to the picture's size.
        size: side of the picture, pixels.

    Returns:
        image: (size, size, 3) uint8.
        instances: list of `Instance`, the lowest first; their masks do not overlap.  One to five,
            fewer than drawn where a digit found no place that leaves the others readable.
    """
    scaled = Image.fromarray(background).resize((size, size), Image.Resampling.BICUBIC)
    canvas = np.array(scaled, dtype=np.float32)
    owner = np.full((size, size), -1)  # which placed digit each pixel shows
    placed = []  # (index in the pool, number of pixels of the whole digit)
    low, high = (max(MIN_DIGIT_SIDE, share * size) for share in DIGIT_SIDE)

    for _ in range(rng.integers(DIGITS_PER_IMAGE[0], DIGITS_PER_IMAGE[1] + 1)):
        chosen = int(rng.integers(len(digits.labels)))
        alpha = render_digit(
            digits.images[chosen],
            side=rng.uniform(low, high),
            angle=rng.uniform(-MAX_ROTATION, MAX_ROTATION),
            threshold=rng.uniform(*INK_THRESHOLD),
        )
        opacity = rng.uniform(*OPACITY)
        solid = alpha >= 0.5
        height, width = alpha.shape
        for _ in range(PLACE_TRIES):
            top = int(rng.integers(size - height + 1))
            left = int(rng.integers(size - width + 1))
            window = np.s_[top : top + height, left : left + width]
            trial = owner.copy()
            trial[window][solid] = len(placed)
            visible = [np.count_nonzero(trial == i) for i in range(len(placed))]
            if all(v >= MIN_VISIBLE * n for v, (_, n) in zip(visible, placed, strict=True)):
                break
        else:
            continue
        colour = draw_colour(rng, canvas[window], opacity)
        weight = opacity * alpha[..., None]
        canvas[window] = (1 - weight) * canvas[window] + weight * colour
        owner = trial
        placed.append((chosen, np.count_nonzero(solid)))

    instances = [
        Instance(int(digits.labels[chosen]), owner == i, int(digits.indices[chosen]))
        for i, (chosen, _) in enumerate(placed)
    ]
    return np.rint(canvas).clip(0, 255).astype(np.uint8), instances


# ---------------------------------------------------------------------------------------------
# COCO files


def encode_rle(mask):
    """A (h, w) bool mask as COCO's uncompressed run-length encoding: lengths of the runs of 0 and 1
    in turn, down the columns, beginning with 0."""
    flat = mask.ravel(order='F')
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate(([0], edges, [flat.size]))).tolist()
    return {'size': list(mask.shape), 'counts': [0, *counts] if flat[0] else counts}


def describe(seed, size, counts):
    """The ``info`` part of the json files that tells one data set from another."""
    return {
        'description': 'Real handwritten digits on real photographs',
        'tool': 'make_digits.py',
        'version': TOOL_VERSION,
        'seed': seed,
        'size': size,
        'counts': counts,
    }


def build_split(folder, split, seed, size, count, info, photos):
    """Write the pictures and the json file of one split under ``folder``."""
    digits = load_digit_pool(split)
    images, annotations = [], []
    (folder / split).mkdir()
    for index in range(count):
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        photo, (x0, y0, x1, y1) = draw_crop(rng, photos, split)
        picture, instances = compose_scene(rng, digits, photos[photo][y0:y1, x0:x1], size)
        name = f'{index:06d}.png'
        Image.fromarray(picture).save(folder / split / name, compress_level=6)
        images.append(
            {
                'id': index + 1,
                'file_name': name,
                'width': size,
                'height': size,
                'photo': photo,
                'crop': [x0, y0, x1 - x0, y1 - y0],
            }
        )
        for instance in instances:
            left, top, right, bottom = tight_box(instance.mask)
            annotations.append(
                {
                    'id': len(annotations) + 1,
                    'image_id': index + 1,
                    'category_id': instance.label + 1,
                    'bbox': [left, top, right - left, bottom - top],
                    'area': int(instance.mask.sum()),
                    'iscrowd': 0,
                    'segmentation': encode_rle(instance.mask),
                    'digit_index': instance.digit_index,
                }
            )
        if (index + 1) % 100 == 0 or index + 1 == count:
            print(f'{split}: {index + 1}/{count} pictures', file=sys.stderr, flush=True)
    document = {
        'info': info,
        'licenses': [],
        'images': images,
        'annotations': annotations,
        'categories': CATEGORIES,
    }
    path = folder / 'annotations' / f'instances_{split}.json'
    path.write_text(json.dumps(document, separators=(',', ':')) + '\n', encoding='utf-8')


def holds_same(out, wanted):
    """Whether ``out`` holds, whole, the data set that ``wanted`` (see `describe`) tells of."""
    for split in SPLITS:
        path = out / 'annotations' / f'instances_{split}.json'
        try:
            document = json.loads(path.read_text(encoding='utf-8'))
            info = {key: document['info'].get(key) for key in wanted}
            names = {image['file_name'] for image in document['images']}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        if info != wanted or names != {entry.name for entry in (out / split).glob('*')}:
            return False
    return True


def check_out(out, wanted, overwrite):
    """Whether there is anything to do: False where ``out`` already holds what is wanted.  Raises
    `DataError` where it holds something else that may not be replaced."""
    if out.exists() and not out.is_dir():
        raise DataError(f'--out {out} is a file; give a folder')
    entries = sorted(entry.name for entry in out.iterdir()) if out.exists() else []
    if not entries:
        return True
    foreign = [name for name in entries if name not in (*SPLITS, 'annotations')]
    if foreign:
        raise DataError(
            f'--out {out} holds {foreign[0]!r}, which is no part of a digits data set, so '
            '--overwrite would not replace it either; give another folder'
        )
    if overwrite:
        return True
    if holds_same(out, wanted):
        return False
    raise DataError(
        f'--out {out} holds something else than this data set; '
        'give another folder, or --overwrite to replace what it holds'
    )


def make_dataset(out, train, val, size, seed, overwrite=False):
    """Make the data set of ``train`` and ``val`` pictures of ``size`` pixels in the folder ``out``.

    Everything is written to a temporary folder beside ``out`` that is renamed at the end.

    Returns:
        False where ``out`` already held this very data set and nothing was done, else True.
    """
    out = Path(out).resolve()
    counts = {'train': train, 'val': val}
    wanted = describe(seed, size, counts)
    if not check_out(out, wanted, overwrite):
        return False
    info = {
        **wanted,
        'packages': {
            'numpy': np.__version__,
            'pillow': PIL.__version__,
            'scikit-image': skimage.__version__,
            'scikit-learn': sklearn.__version__,
        },
        'sources': 'Digits: E. Alpaydin and C. Kaynak, UCI. china.jpg: danielbuechele, flower.jpg: '
        'vultilion, both Flickr, CC BY 2.0. Other photographs: see scikit-image.',
    }
    photos = load_photos()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{out.name}.', dir=out.parent) as temporary:
        new, old = Path(temporary) / 'new', Path(temporary) / 'old'
        (new / 'annotations').mkdir(parents=True)
        for split in SPLITS:
            build_split(new, split, seed, size, counts[split], info, photos)
        if out.exists():
            out.rename(old)
        try:
            new.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
    return True


# ---------------------------------------------------------------------------------------------
# Command line


def whole_number(limits):
    """An argparse type: a whole number between the two ``limits``, both allowed."""
    low, high = limits

    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f'got {text!r}, but a whole number from {low} to {high} is needed'
            )
        return value

    return parse


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Make a COCO data set of real handwritten digits on real photographs, offline.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument('--out', default='data/digits', help='folder to make')
    count = whole_number(COUNT_LIMITS)
    parser.add_argument('--train', type=count, default=1500, help='number of train pictures')
    parser.add_argument('--val', type=count, default=200, help='number of val pictures')
    parser.add_argument(
        '--size', type=whole_number(SIZE_LIMITS), default=128, help='side of a picture, pixels'
    )
    parser.add_argument(
        '--seed', type=whole_number(SEED_LIMITS), default=0, help='seed of all random choices'
    )
    parser.add_argument(
        '--overwrite', action='store_true', help='make it anew where OUT already holds a data set'
    )
    return parser.parse_args(argv)


def main(argv=None):
    """Run the command line; returns the exit status."""
    args = parse_args(argv)
    try:
        made = make_dataset(args.out, args.train, args.val, args.size, args.seed, args.overwrite)
    except (DataError, OSError) as error:
        print(f'make_digits.py: error: {error}', file=sys.stderr)
        return 1
    print(f'{args.out}: made' if made else f'{args.out}: already holds this data set, nothing done')
    return 0


if __name__ == '__main__':
    sys.exit(main())
