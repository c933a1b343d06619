"""Make the offline demo data set: real handwritten digits on real photographs.

The digits are the 1797 images of 8x8 pixels that ship with scikit-learn (the test part of the UCI
"Optical Recognition of Handwritten Digits" set); the backgrounds are photographs that ship inside
the scikit-learn and scikit-image packages.  Nothing is ever downloaded.  All pictures have size x size
pixels, RGB, and are numbered; ``--task`` chooses what is in them and how they lie:

``det``, detection and instance segmentation in COCO format.  One to five digits per picture; the
ten categories '0' to '9' have the ids 1 to 10.

    OUT/{train,val}/000000.png ...
    OUT/annotations/instances_{train,val}.json

``seg``, semantic segmentation as MMSegmentation reads it.  The very pictures of ``det``; the label
maps are single-channel with 0 for the background and 1 to 10 for the digits '0' to '9'.

    OUT/images/{train,val}/000000.png ...
    OUT/labels/{train,val}/000000.png ...
    OUT/annotations/pictures_{train,val}.json

``cls``, classification in the folders of ImageNet.  One large digit per picture, the ten classes in
turn.

    OUT/{train,val}/{0,...,9}/000000.png ...
    OUT/annotations/pictures_{train,val}.json

The json files tell how the data set was made and, picture by picture, of which photograph and digits.

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

Masks and label maps hold visible pixels only: where a later digit covers an earlier one, the pixel
belongs to the later.  COCO's masks are uncompressed run-length encoding, its boxes are tight around
the visible mask, and its areas count the mask's pixels.

Usage:
    python tools/data/make_digits.py --out data/digits --train 1500 --val 200 --size 128 --seed 0
    python tools/data/make_digits.py --task seg --out data/digits_seg
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import re
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

# The one digit of a classification picture; turned, even the largest stays inside.
SINGLE_SIDE = (0.45, 0.7)
SINGLE_ROTATION = 15.0

SIZE_LIMITS = (32, 1024)
COUNT_LIMITS = (1, 999999)
SEED_LIMITS = (0, 2**32 - 1)
JOB_LIMITS = (1, 256)


# What --out, --train, --val and --size are unless given.
DEFAULTS = {
    'det': {'out': 'data/digits', 'train': 1500, 'val': 200, 'size': 128},
    'seg': {'out': 'data/digits_seg', 'train': 1500, 'val': 200, 'size': 128},
    'cls': {'out': 'data/digits_cls', 'train': 4000, 'val': 500, 'size': 64},
}
TASKS = tuple(DEFAULTS)


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
    canvas = scaled(background, size)
    owner = np.full((size, size), -1)  # which placed digit each pixel shows
    placed = []  # (index in the pool, number of pixels of the whole digit)
    low, high = (max(MIN_DIGIT_SIDE, share * size) for share in DIGIT_SIDE)

    for _ in range(rng.integers(DIGITS_PER_IMAGE[0], DIGITS_PER_IMAGE[1] + 1)):
        chosen = int(rng.integers(len(digits.labels)))
        alpha, opacity = draw_stroke(rng, digits.images[chosen], (low, high), MAX_ROTATION)
        solid = alpha >= 0.5
        for _ in range(PLACE_TRIES):
            window = draw_window(rng, alpha, size)
            trial = owner.copy()
            trial[window][solid] = len(placed)
            visible = [np.count_nonzero(trial == i) for i in range(len(placed))]
            if all(v >= MIN_VISIBLE * n for v, (_, n) in zip(visible, placed, strict=True)):
                break
        else:
            continue
        paint(rng, canvas[window], alpha, opacity)
        owner = trial
        placed.append((chosen, np.count_nonzero(solid)))

    instances = [
        Instance(int(digits.labels[chosen]), owner == i, int(digits.indices[chosen]))
        for i, (chosen, _) in enumerate(placed)
    ]
    return to_bytes(canvas), instances


def compose_single(rng, digits, label, background, size):
    """Put one large random digit on a background.

    Args:
        rng: the `numpy.random.Generator` that makes every choice.
        digits: the `DigitPool` to draw from.
        label: which digit, 0 to 9.
        background: (h, w, 3) uint8 crop of a photograph; scaled to the picture's size.
        size: side of the picture, pixels.

    Returns:
        image: (size, size, 3) uint8.
        digit_index: the digit's place in scikit-learn's file.
    """
    canvas = scaled(background, size)
    chosen = rng.choice(np.flatnonzero(digits.labels == label))
    sides = [share * size for share in SINGLE_SIDE]
    alpha, opacity = draw_stroke(rng, digits.images[chosen], sides, SINGLE_ROTATION)
    paint(rng, canvas[draw_window(rng, alpha, size)], alpha, opacity)
    return to_bytes(canvas), int(digits.indices[chosen])


def draw_stroke(rng, digit, sides, rotation):
    """Draw an 8x8 digit with a random look.

    Args:
        rng: the `numpy.random.Generator` that makes every choice.
        digit: (8, 8) float32 in 0..1, 1 is ink.
        sides: shortest and longest side of the upright grid, pixels.
        rotation: degrees that it may be turned by, either way.

    Returns:
        alpha: see `render_digit`.
        opacity: of the whole digit, 0..1.
    """
    alpha = render_digit(
        digit,
        side=rng.uniform(*sides),
        angle=rng.uniform(-rotation, rotation),
        threshold=rng.uniform(*INK_THRESHOLD),
    )
    return alpha, rng.uniform(*OPACITY)


def draw_window(rng, alpha, size):
    """A random place for ``alpha`` (h, w) inside a picture of ``size`` pixels, as a 2-D slice."""
    height, width = alpha.shape
    top = int(rng.integers(size - height + 1))
    left = int(rng.integers(size - width + 1))
    return np.s_[top : top + height, left : left + width]


def paint(rng, patch, alpha, opacity):
    """Paint a digit in a random readable colour over ``patch`` (h, w, 3) float32, in place."""
    colour = draw_colour(rng, patch, opacity)
    weight = opacity * alpha[..., None]
    patch[:] = (1 - weight) * patch + weight * colour


def scaled(background, size):
    """A (h, w, 3) uint8 picture as (size, size, 3) float32 in 0..255."""
    picture = Image.fromarray(background).resize((size, size), Image.Resampling.BICUBIC)
    return np.array(picture, dtype=np.float32)


def to_bytes(canvas):
    """A float picture in 0..255, rounded to uint8."""
    return np.rint(canvas).clip(0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------
# Files


def encode_rle(mask):
    """A (h, w) bool mask as COCO's uncompressed run-length encoding: lengths of the runs of 0 and 1
    in turn, down the columns, beginning with 0."""
    flat = mask.ravel(order='F')
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate(([0], edges, [flat.size]))).tolist()
    return {'size': list(mask.shape), 'counts': [0, *counts] if flat[0] else counts}


def describe(task, seed, size, counts):
    """The ``info`` part of the json files that tells one data set from another."""
    info = {
        'description': 'Real handwritten digits on real photographs',
        'tool': 'make_digits.py',
        'version': TOOL_VERSION,
        'seed': seed,
        'size': size,
        'counts': counts,
    }
    return info if task == 'det' else {**info, 'task': task}


def json_file(out, task, split):
    """The json file of a split of a data set in the folder ``out``."""
    return out / 'annotations' / f'{"instances" if task == "det" else "pictures"}_{split}.json'


def picture_folders(task, split):
    """The folders below OUT that hold the png files of a split, that of the pictures first."""
    if task == 'det':
        return [split]
    if task == 'seg':
        return [f'images/{split}', f'labels/{split}']
    return [f'{split}/{label}' for label in range(10)]


@dataclass(frozen=True)
class Split:
    """What the pictures of one split are made of and where they go: see `make_dataset`, `load_photos`,
    `load_digit_pool` and `picture_folders`."""

    folder: Path
    task: str
    name: str
    seed: int
    size: int
    photos: dict
    digits: DigitPool

    def build(self, index):
        """Write picture ``index``; returns its entry in the json file and its annotations, numbered
        from 1."""
        rng = np.random.default_rng([self.seed, SPLITS.index(self.name), index])
        photo, (x0, y0, x1, y1) = draw_crop(rng, self.photos, self.name)
        background = self.photos[photo][y0:y1, x0:x1]
        places = [self.folder / name for name in picture_folders(self.task, self.name)]
        name = f'{index:06d}.png'
        image = {
            'id': index + 1,
            'file_name': name,
            'width': self.size,
            'height': self.size,
            'photo': photo,
            'crop': [x0, y0, x1 - x0, y1 - y0],
        }
        if self.task == 'cls':
            label = index % 10
            picture, digit_index = compose_single(rng, self.digits, label, background, self.size)
            image |= {'file_name': f'{label}/{name}', 'digit_indices': [digit_index]}
            save(picture, places[label] / name)
            return image, []
        picture, instances = compose_scene(rng, self.digits, background, self.size)
        save(picture, places[0] / name)
        if self.task == 'seg':
            image['digit_indices'] = [instance.digit_index for instance in instances]
            save(label_map(instances, self.size), places[1] / name)
            return image, []
        return image, coco_annotations(instances, index + 1)


_split = None  # of a worker process


def _set_split(split):
    global _split
    _split = split


def _build(index):
    return _split.build(index)


def build_split(split, count, info, jobs):
    """Write the png files and the json file of one `Split`, in ``jobs`` processes."""
    for name in picture_folders(split.task, split.name):
        (split.folder / name).mkdir(parents=True)
    images, annotations = [], []
    with contextlib.ExitStack() as stack:
        if jobs == 1:
            built = map(split.build, range(count))
        else:
            pool = stack.enter_context(multiprocessing.Pool(jobs, _set_split, (split,)))
            built = pool.imap(_build, range(count), chunksize=8)
        for image, own in built:
            images.append(image)
            for annotation in own:
                annotation['id'] += len(annotations)
            annotations += own
            if len(images) % 100 == 0 or len(images) == count:
                print(f'{split.name}: {len(images)}/{count} pictures', file=sys.stderr, flush=True)
    document = {'info': info, 'licenses': [], 'images': images}
    if split.task == 'det':
        document |= {'annotations': annotations, 'categories': CATEGORIES}
    path = json_file(split.folder, split.task, split.name)
    path.write_text(json.dumps(document, separators=(',', ':')) + '\n', encoding='utf-8')


def save(pixels, path):
    """Write (h, w, 3) or (h, w) uint8 pixels as png."""
    Image.fromarray(pixels).save(path, compress_level=6)


def label_map(instances, size):
    """The visible digits of a picture as (size, size) uint8: 0 background, 1 to 10 digits 0 to 9."""
    labels = np.zeros((size, size), np.uint8)
    for instance in instances:
        labels[instance.mask] = instance.label + 1
    return labels


def coco_annotations(instances, image_id):
    """COCO's annotations of the digits of a picture, their ids from 1 on."""
    annotations = []
    for annotation_id, instance in enumerate(instances, start=1):
        left, top, right, bottom = tight_box(instance.mask)
        annotations.append(
            {
                'id': annotation_id,
                'image_id': image_id,
                'category_id': instance.label + 1,
                'bbox': [left, top, right - left, bottom - top],
                'area': int(instance.mask.sum()),
                'iscrowd': 0,
                'segmentation': encode_rle(instance.mask),
                'digit_index': instance.digit_index,
            }
        )
    return annotations


def holds_same(out, task, wanted):
    """Whether ``out`` holds, whole, the data set that ``wanted`` (see `describe`) tells of."""
    for split in SPLITS:
        try:
            document = json.loads(json_file(out, task, split).read_text(encoding='utf-8'))
            info = {key: document['info'].get(key) for key in wanted}
            names = {image['file_name'] for image in document['images']}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        roots = [out / split] if task == 'cls' else [out / n for n in picture_folders(task, split)]
        found = [{p.relative_to(root).as_posix() for p in root.rglob('*.png')} for root in roots]
        if info != wanted or any(names != present for present in found):
            return False
    return True


def foreign_entry(out, task):
    """The path below ``out`` of something that no data set of ``task`` has, or None."""
    known = '|'.join(re.escape(json_file(out, task, split).name) for split in SPLITS)
    files = {'annotations': known}
    for split in SPLITS:
        files |= dict.fromkeys(picture_folders(task, split), r'\d{6}\.png')
    folders = {parent.as_posix() for name in files for parent in (Path(name), *Path(name).parents)}
    # From the top down: other people's folders are not searched.
    for place, inner, names in os.walk(out):
        inner.sort()
        parent = Path(place).relative_to(out)
        foreign = [name for name in inner if (parent / name).as_posix() not in folders]
        pattern = files.get(parent.as_posix(), '')
        foreign += [name for name in sorted(names) if not re.fullmatch(pattern, name)]
        if foreign:
            return (parent / foreign[0]).as_posix()
    return None


def check_out(out, task, wanted, overwrite):
    """Whether there is anything to do: False where ``out`` already holds what is wanted.  Raises
    `DataError` where it holds something else that may not be replaced."""
    if out.exists() and not out.is_dir():
        raise DataError(f'--out {out} is a file; give a folder')
    if not out.exists() or not any(out.iterdir()):
        return True
    foreign = foreign_entry(out, task)
    if foreign:
        raise DataError(
            f'--out {out} holds {foreign!r}, which is no part of a digits data set for --task {task}, '
            'so --overwrite would not replace it either; give another folder'
        )
    if overwrite:
        return True
    if holds_same(out, task, wanted):
        return False
    raise DataError(
        f'--out {out} holds something else than this data set; '
        'give another folder, or --overwrite to replace what it holds'
    )


def make_dataset(out, train, val, size, seed, overwrite=False, task='det', jobs=1):
    """Make the data set of ``train`` and ``val`` pictures of ``size`` pixels in the folder ``out``,
    for one of `TASKS`, in ``jobs`` processes.

    Everything is written to a temporary folder beside ``out`` that is renamed at the end.

    Returns:
        False where ``out`` already held this very data set and nothing was done, else True.
    """
    out = Path(out).resolve()
    counts = {'train': train, 'val': val}
    wanted = describe(task, seed, size, counts)
    if not check_out(out, task, wanted, overwrite):
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
        for name in SPLITS:
            split = Split(new, task, name, seed, size, photos, load_digit_pool(name))
            build_split(split, counts[name], info, jobs)
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
        description='Make a data set of real handwritten digits on real photographs, offline.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        '--task', choices=TASKS, default='det', help='detection, segmentation or classification'
    )
    count = whole_number(COUNT_LIMITS)
    options = {
        'out': (str, 'folder to make'),
        'train': (count, 'number of train pictures'),
        'val': (count, 'number of val pictures'),
        'size': (whole_number(SIZE_LIMITS), 'side of a picture, pixels'),
    }
    for name, (kind, meaning) in options.items():
        usual = ', '.join(f'{task} {DEFAULTS[task][name]}' for task in TASKS)
        parser.add_argument(
            f'--{name}', type=kind, default=argparse.SUPPRESS, help=f'{meaning} (default: {usual})'
        )
    parser.add_argument(
        '--seed', type=whole_number(SEED_LIMITS), default=0, help='seed of all random choices'
    )
    parser.add_argument(
        '--overwrite', action='store_true', help='make it anew where OUT already holds a data set'
    )
    parser.add_argument(
        '--jobs', type=whole_number(JOB_LIMITS), default=1, help='processes that make pictures'
    )
    args = parser.parse_args(argv)
    return argparse.Namespace(**{**DEFAULTS[args.task], **vars(args)})


def main(argv=None):
    """Run the command line; returns the exit status."""
    args = parse_args(argv)
    try:
        made = make_dataset(**vars(args))
    except (DataError, OSError) as error:
        print(f'make_digits.py: error: {error}', file=sys.stderr)
        return 1
    print(f'{args.out}: made' if made else f'{args.out}: already holds this data set, nothing done')
    return 0


if __name__ == '__main__':
    sys.exit(main())
