"""Tests of tools/data/make_digits.py, run offline on tiny data sets."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

np = pytest.importorskip('numpy')
Image = pytest.importorskip('PIL.Image')
pytest.importorskip('skimage')
load_digits = pytest.importorskip('sklearn.datasets').load_digits

TOOL = Path(__file__).resolve().parents[2] / 'tools' / 'data' / 'make_digits.py'
SMALL = {'train': 10, 'val': 6, 'size': 64, 'seed': 3}
MARGIN = 8  # pixels that a digit's soft edge stays within, at the sizes used here


def load_tool():
    spec = importlib.util.spec_from_file_location('make_digits', TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


tool = load_tool()


def read_files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(Path(folder).rglob('*'))
        if path.is_file()
    }


def read_json(folder, split, kind='instances'):
    return json.loads((folder / 'annotations' / f'{kind}_{split}.json').read_text())


def read_pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def arguments(out, **changes):
    named = {**SMALL, **changes}
    return ['--out', str(out), *(f'--{name}={value}' for name, value in named.items())]


@pytest.fixture(scope='module')
def photos():
    return tool.load_photos()


@pytest.fixture(scope='module')
def datasets(tmp_path_factory):
    """The folder of a small data set of each task."""
    folder = tmp_path_factory.mktemp('digits')
    for task in tool.TASKS:
        assert tool.make_dataset(folder / task, **SMALL, task=task)
    return {task: folder / task for task in tool.TASKS}


@pytest.fixture(scope='module')
def dataset(datasets):
    return datasets['det']


# Files


def test_layout(dataset):
    expected = {f'annotations/instances_{split}.json' for split in ('train', 'val')}
    for split in ('train', 'val'):
        expected |= {f'{split}/{i:06d}.png' for i in range(SMALL[split])}
    assert set(read_files(dataset)) == expected
    for path in dataset.glob('*/*.png'):
        with Image.open(path) as picture:
            assert picture.size == (64, 64)
            assert picture.mode == 'RGB'


@pytest.mark.parametrize('split', ['train', 'val'])
def test_info_and_categories(dataset, split):
    document = read_json(dataset, split)
    info = document['info']
    assert (info['seed'], info['size']) == (3, 64)
    assert info['counts'] == {'train': 10, 'val': 6}
    assert info['version'] == tool.TOOL_VERSION
    named = [(category['id'], category['name']) for category in document['categories']]
    assert named == [(i + 1, str(i)) for i in range(10)]
    assert len(document['images']) == SMALL[split]


def test_same_seed_same_bytes(dataset, tmp_path):
    command = [sys.executable, str(TOOL), *arguments(tmp_path / 'again')]
    subprocess.run(command, check=True, capture_output=True)
    assert read_files(tmp_path / 'again') == read_files(dataset)


@pytest.mark.parametrize('task', tool.TASKS)
def test_number_of_processes_changes_nothing(datasets, tmp_path, task):
    tool.make_dataset(tmp_path / 'set', **SMALL, task=task, jobs=3)
    assert read_files(tmp_path / 'set') == read_files(datasets[task])


def test_other_seed_differs(dataset, tmp_path):
    tool.make_dataset(tmp_path / 'set', **{**SMALL, 'seed': 4})
    first, second = read_files(dataset), read_files(tmp_path / 'set')
    assert first.keys() == second.keys()
    assert not [name for name in first if first[name] == second[name]]


def test_pictures_do_not_depend_on_how_many(dataset, tmp_path):
    tool.make_dataset(tmp_path / 'set', **{**SMALL, 'train': 2, 'val': 3})
    many, few = read_files(dataset), read_files(tmp_path / 'set')
    pictures = [name for name in few if name.endswith('.png')]
    assert len(pictures) == 5
    assert all(few[name] == many[name] for name in pictures)


# What train and val share


def test_digits_are_split_where_a_sheet_begins():
    train, val = tool.digit_range('train'), tool.digit_range('val')
    target = load_digits().target
    assert [*train, *val] == list(range(len(target)))
    # Every sheet begins with 0 to 9, three times.
    assert target[val[0] : val[0] + 30].tolist() == list(range(10)) * 3


def test_regions_cut_a_photograph_in_two(photos):
    for photo in photos.values():
        height, width = photo.shape[:2]
        uses = np.zeros((height, width), int)
        for x0, y0, x1, y1 in tool.region_boxes(width, height).values():
            uses[y0:y1, x0:x1] += 1
            assert min(x1 - x0, y1 - y0) >= tool.CROP_SIDE[0]
        assert (uses == 1).all()


@pytest.mark.parametrize(
    ('width', 'height', 'val'), [(640, 427, (427, 0, 640, 427)), (300, 451, (0, 301, 300, 451))]
)
def test_region_boxes_cut_the_longer_side(width, height, val):
    assert tool.region_boxes(width, height)['val'] == val


def test_crops_never_share_a_pixel(photos):
    drawn = {
        split: {name: np.zeros(photo.shape[:2], bool) for name, photo in photos.items()}
        for split in tool.SPLITS
    }
    rng = np.random.default_rng(0)
    for split in tool.SPLITS:
        for _ in range(500):
            name, (x0, y0, x1, y1) = tool.draw_crop(rng, photos, split)
            assert x1 - x0 == y1 - y0 == drawn[split][name][y0:y1, x0:x1].shape[0]
            assert tool.CROP_SIDE[0] <= x1 - x0 <= tool.CROP_SIDE[1]
            drawn[split][name][y0:y1, x0:x1] = True
    for name in photos:
        assert drawn['train'][name].any()
        assert drawn['val'][name].any()
        assert not (drawn['train'][name] & drawn['val'][name]).any()


@pytest.mark.parametrize('split', ['train', 'val'])
def test_written_sources_are_those_of_the_split(dataset, photos, split):
    document = read_json(dataset, split)
    target = load_digits().target
    for annotation in document['annotations']:
        assert annotation['digit_index'] in tool.digit_range(split)
        assert annotation['category_id'] == target[annotation['digit_index']] + 1
    for image in document['images']:
        photo = photos[image['photo']]
        x, y, w, h = image['crop']
        x0, y0, x1, y1 = tool.region_boxes(photo.shape[1], photo.shape[0])[split]
        assert x0 <= x < x + w <= x1
        assert y0 <= y < y + h <= y1


@pytest.mark.parametrize('split', ['train', 'val'])
def test_background_is_the_crop_written_down(dataset, photos, split):
    document = read_json(dataset, split)
    seen = 0
    for image in document['images']:
        x, y, w, h = image['crop']
        crop = Image.fromarray(photos[image['photo']][y : y + h, x : x + w])
        plain = np.asarray(crop.resize((64, 64), Image.Resampling.BICUBIC))
        picture = np.asarray(Image.open(dataset / split / image['file_name']))
        far = np.ones((64, 64), bool)
        for annotation in document['annotations']:
            if annotation['image_id'] == image['id']:
                # Where a digit is covered its box may be smaller than it is, but the box of the
                # digit that covers it goes over the rest.
                left, top, width, height = annotation['bbox']
                far[
                    max(0, top - MARGIN) : top + height + MARGIN,
                    max(0, left - MARGIN) : left + width + MARGIN,
                ] = False
        assert (picture == plain)[far].all()
        assert not (picture == plain).all()
        seen += far.sum()
    assert seen > 1000


# Segmentation


def test_segmentation_layout(datasets):
    expected = {f'annotations/pictures_{split}.json' for split in tool.SPLITS}
    for split in tool.SPLITS:
        for kind in ('images', 'labels'):
            expected |= {f'{kind}/{split}/{i:06d}.png' for i in range(SMALL[split])}
    assert set(read_files(datasets['seg'])) == expected


@pytest.mark.parametrize('split', tool.SPLITS)
def test_segmentation_has_the_pictures_and_masks_of_detection(datasets, split):
    coco = pytest.importorskip('pycocotools.coco').COCO(
        datasets['det'] / 'annotations' / f'instances_{split}.json'
    )
    told = {image['id']: image for image in read_json(datasets['seg'], split, 'pictures')['images']}
    for image in coco.loadImgs(coco.getImgIds()):
        name = image['file_name']
        picture = datasets['seg'] / 'images' / split / name
        assert picture.read_bytes() == (datasets['det'] / split / name).read_bytes()
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image['id']))
        expected = np.zeros((64, 64), np.uint8)
        for annotation in annotations:
            expected[coco.annToMask(annotation) == 1] = annotation['category_id']
        labels = read_pixels(datasets['seg'] / 'labels' / split / name)
        assert labels.dtype == np.uint8
        assert (labels == expected).all()
        assert told[image['id']]['digit_indices'] == [a['digit_index'] for a in annotations]


# Classification


def test_classification_layout(datasets):
    expected = {f'annotations/pictures_{split}.json' for split in tool.SPLITS}
    for split in tool.SPLITS:
        expected |= {f'{split}/{i % 10}/{i:06d}.png' for i in range(SMALL[split])}
    assert set(read_files(datasets['cls'])) == expected
    # Folders without pictures too: classes are numbered by their folders.
    for split in tool.SPLITS:
        assert sorted(p.name for p in (datasets['cls'] / split).iterdir()) == list('0123456789')


@pytest.mark.parametrize('split', tool.SPLITS)
def test_classification_pictures_show_a_digit_of_their_class(datasets, photos, split):
    target = load_digits().target
    document = read_json(datasets['cls'], split, 'pictures')
    assert document['info']['task'] == 'cls'
    assert len(document['images']) == SMALL[split]
    for image in document['images']:
        (digit,) = image['digit_indices']
        assert digit in tool.digit_range(split)
        assert image['file_name'].startswith(f'{target[digit]}/')
        photo = photos[image['photo']]
        x, y, w, h = image['crop']
        x0, y0, x1, y1 = tool.region_boxes(photo.shape[1], photo.shape[0])[split]
        assert x0 <= x < x + w <= x1
        assert y0 <= y < y + h <= y1
        picture = read_pixels(datasets['cls'] / split / image['file_name'])
        assert picture.shape == (64, 64, 3)
        changed = (picture != tool.to_bytes(tool.scaled(photo[y : y + h, x : x + w], 64))).any(axis=2)
        assert 0.03 < changed.mean() < 0.6


@pytest.mark.parametrize('size', [32, 64])
def test_largest_single_digits_fit(size):
    side, threshold = tool.SINGLE_SIDE[1] * size, tool.INK_THRESHOLD[0]
    for digit in tool.load_digit_pool('train').images:
        for angle in (-tool.SINGLE_ROTATION, tool.SINGLE_ROTATION):
            assert max(tool.render_digit(digit, side, angle, threshold).shape) <= size


# Masks


@pytest.mark.parametrize('split', ['train', 'val'])
def test_annotations_agree_with_their_masks(dataset, split):
    path = dataset / 'annotations' / f'instances_{split}.json'
    coco = pytest.importorskip('pycocotools.coco').COCO(path)
    assert coco.getCatIds() == list(range(1, 11))
    for image_id in coco.getImgIds():
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image_id))
        assert 1 <= len(annotations) <= 5
        masks = np.stack([coco.annToMask(annotation) for annotation in annotations])
        assert masks.sum(axis=0).max() == 1
        for annotation, mask in zip(annotations, masks, strict=True):
            x, y, w, h = annotation['bbox']
            assert annotation['area'] == mask.sum() == mask[y : y + h, x : x + w].sum() > 0
            inside = mask[y : y + h, x : x + w]
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()


def test_coco_evaluation_of_the_truth_is_perfect(dataset):
    coco_class = pytest.importorskip('pycocotools.coco').COCO
    evaluation = pytest.importorskip('pycocotools.cocoeval').COCOeval
    truth = coco_class(dataset / 'annotations' / 'instances_val.json')
    answers = [
        {
            'image_id': annotation['image_id'],
            'category_id': annotation['category_id'],
            'bbox': annotation['bbox'],
            'segmentation': truth.annToRLE(annotation),
            'score': 0.9,
        }
        for annotation in truth.loadAnns(truth.getAnnIds())
    ]
    for kind in ('bbox', 'segm'):
        judge = evaluation(truth, truth.loadRes(answers), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
        assert judge.stats[0] == pytest.approx(1)


@pytest.mark.parametrize(
    ('rows', 'counts'),
    [
        ([[0, 0], [0, 0]], [4]),
        ([[1, 1], [1, 1]], [0, 4]),
        ([[1, 0], [0, 1]], [0, 1, 2, 1]),
        ([[0, 1, 1], [0, 0, 1]], [2, 1, 1, 2]),
    ],
)
def test_encode_rle(rows, counts):
    mask = np.array(rows, dtype=bool)
    assert tool.encode_rle(mask) == {'size': list(mask.shape), 'counts': counts}


# Scene


@pytest.mark.parametrize('size', [32, 48, 200])
def test_scene_of_any_size(photos, size):
    digits = tool.load_digit_pool('train')
    background = photos['china.jpg'][:100, :100]
    for seed in range(10):
        scene = tool.compose_scene(np.random.default_rng(seed), digits, background, size)
        again = tool.compose_scene(np.random.default_rng(seed), digits, background, size)
        image, instances = scene
        assert image.shape == (size, size, 3)
        assert image.dtype == np.uint8
        assert (image == again[0]).all()
        assert 1 <= len(instances) <= 5
        assert sum(instance.mask.astype(int) for instance in instances).max() == 1
        for instance in instances:
            assert instance.mask.shape == (size, size)
            assert instance.label == digits.labels[instance.digit_index]


def test_digits_stay_readable_under_later_ones(photos, monkeypatch):
    solid = []

    def record(*args, **kwargs):
        alpha = render(*args, **kwargs)
        solid.append(np.count_nonzero(alpha >= 0.5))
        return alpha

    render = tool.render_digit
    monkeypatch.setattr(tool, 'render_digit', record)
    digits = tool.load_digit_pool('val')
    covered = 0
    for seed in range(60):
        solid.clear()
        rng = np.random.default_rng(seed)
        _, instances = tool.compose_scene(rng, digits, photos['grass.png'][:99, :99], 96)
        if len(instances) < len(solid):
            continue  # one found no place: which is which cannot be told
        for whole, instance in zip(solid, instances, strict=True):
            assert tool.MIN_VISIBLE * whole <= instance.mask.sum() <= whole
            covered += instance.mask.sum() < whole
    assert covered > 10


@pytest.mark.parametrize('side', [14, 60])
def test_render_digit_is_upright(side):
    letter = np.zeros((8, 8), np.float32)  # an L
    letter[:, 1:3] = 1
    letter[6:, 1:7] = 1
    alpha = tool.render_digit(letter, side, angle=0, threshold=0.45)
    height, width = alpha.shape
    assert height == pytest.approx(side, rel=0.2)
    assert width == pytest.approx(side * 6 / 8, rel=0.2)
    means = [
        [alpha[rows, columns].mean() for columns in (slice(width // 3), slice(width // 2, None))]
        for rows in (slice(height // 2), slice(-height // 4, None))
    ]
    assert np.greater(means, 0.5).tolist() == [[True, False], [True, True]]
    assert means[0][1] == 0


@pytest.mark.parametrize(('side', 'angle'), [(14, 30), (60, -30)])
@pytest.mark.parametrize('threshold', tool.INK_THRESHOLD)
def test_every_digit_leaves_ink(side, angle, threshold):
    for split in tool.SPLITS:
        for digit in tool.load_digit_pool(split).images[::5]:
            alpha = tool.render_digit(digit, side, angle, threshold)
            assert alpha.min() == 0
            assert alpha.max() == 1
            assert np.mean(alpha >= 0.5) > 0.1
            for edge in (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]):
                assert edge.any()


def test_render_digit_turns_counter_clockwise():
    bar = np.zeros((8, 8), np.float32)
    bar[3:5] = 1
    alpha = tool.render_digit(bar, side=40, angle=30, threshold=0.5)
    rows = np.arange(len(alpha))
    left, right = (rows @ alpha[:, c] / alpha[:, c].sum() for c in (5, -6))
    assert left > right + 10


@pytest.mark.parametrize('level', [0, 128, 255])
def test_colour_can_be_told_from_the_background(level):
    patch = np.full((9, 7, 3), level, np.float32)
    for seed in range(50):
        colour = tool.draw_colour(np.random.default_rng(seed), patch, opacity=0.9)
        assert 0.9 * tool.colour_distance(colour, patch).min() >= tool.MIN_CONTRAST


# Command line


@pytest.mark.parametrize(
    ('name', 'value', 'allowed'),
    [
        ('size', '31', 'from 32 to 1024'),
        ('size', '1025', 'from 32 to 1024'),
        ('size', '64.5', 'from 32 to 1024'),
        ('train', '-1', 'from 1 to 999999'),
        ('train', 'many', 'from 1 to 999999'),
        ('val', '0', 'from 1 to 999999'),
        ('seed', '-3', 'from 0 to 4294967295'),
        ('jobs', '0', 'from 1 to 256'),
        ('task', 'pose', "'det', 'seg', 'cls'"),
    ],
)
def test_bad_argument(tmp_path, capsys, name, value, allowed):
    with pytest.raises(SystemExit) as stop:
        tool.main(arguments(tmp_path / 'set', **{name: value}))
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert f'--{name}' in message
    assert repr(value) in message
    assert allowed in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('task', 'out', 'sizes'),
    [
        ('det', 'data/digits', (1500, 200, 128)),
        ('seg', 'data/digits_seg', (1500, 200, 128)),
        ('cls', 'data/digits_cls', (4000, 500, 64)),
    ],
)
def test_defaults(task, out, sizes):
    args = tool.parse_args([] if task == 'det' else ['--task', task])
    assert (args.task, args.out, args.overwrite, args.seed) == (task, out, False, 0)
    assert (args.train, args.val, args.size) == sizes
    given = tool.parse_args(['--task', task, '--val', '7', '--out', 'x'])
    assert (given.out, given.train, given.val, given.size) == ('x', sizes[0], 7, sizes[2])


@pytest.mark.parametrize('task', tool.TASKS)
def test_rerun_does_nothing(datasets, capsys, task):
    out = datasets[task]
    before = {path: path.stat().st_mtime_ns for path in out.rglob('*')}
    assert tool.main(arguments(out, task=task)) == 0
    assert 'already holds' in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob('*')} == before


@pytest.mark.parametrize(
    'change', [{'seed': 9}, {'size': 65}, {'train': 9}, {'val': 7}], ids=lambda c: next(iter(c))
)
def test_other_arguments_are_refused(dataset, capsys, change):
    before = read_files(dataset)
    assert tool.main(arguments(dataset, **change)) == 1
    assert '--overwrite' in capsys.readouterr().err
    assert read_files(dataset) == before


@pytest.mark.parametrize(
    'path', ['val/000001.png', 'annotations/instances_train.json', 'annotations/instances_val.json']
)
def test_incomplete_is_refused_then_overwritten(dataset, tmp_path, capsys, path):
    out = tmp_path / 'set'
    tool.make_dataset(out, **SMALL)
    (out / path).unlink()
    assert tool.main(arguments(out)) == 1
    assert '--overwrite' in capsys.readouterr().err
    assert tool.main([*arguments(out), '--overwrite']) == 0
    assert read_files(out) == read_files(dataset)
    assert [entry.name for entry in tmp_path.iterdir()] == ['set']


@pytest.mark.parametrize('task', ['seg', 'cls'])
def test_incomplete_other_task_is_refused_then_overwritten(datasets, tmp_path, capsys, task):
    out = tmp_path / 'set'
    tool.make_dataset(out, **SMALL, task=task)
    next(out.glob({'seg': 'labels/val/*.png', 'cls': 'val/3/*.png'}[task])).unlink()
    assert tool.main(arguments(out, task=task)) == 1
    assert '--overwrite' in capsys.readouterr().err
    assert tool.main([*arguments(out, task=task), '--overwrite']) == 0
    assert read_files(out) == read_files(datasets[task])


@pytest.mark.parametrize(
    ('held', 'task', 'first'),
    [
        ('det', 'seg', 'train'),
        ('seg', 'cls', 'images'),
        ('cls', 'det', 'annotations/pictures_train.json'),
    ],
)
def test_data_of_another_task_is_never_replaced(datasets, capsys, held, task, first):
    before = read_files(datasets[held])
    assert tool.main([*arguments(datasets[held], task=task), '--overwrite']) == 1
    message = capsys.readouterr().err
    assert repr(first) in message
    assert f'--task {task}' in message
    assert read_files(datasets[held]) == before


@pytest.mark.parametrize(
    ('task', 'path'),
    [
        ('det', 'annotations/captions_val.json'),
        ('det', 'train/cat.png'),
        ('seg', 'images/train/holiday.jpg'),
        ('cls', 'train/n01440764/000001.png'),
    ],
)
def test_other_peoples_files_inside_are_never_replaced(tmp_path, capsys, task, path):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text('x')
    assert tool.main([*arguments(tmp_path, task=task), '--overwrite']) == 1
    assert 'no part of a digits data set' in capsys.readouterr().err
    assert list(read_files(tmp_path)) == [path]


def test_foreign_entry_is_named_from_the_top(tmp_path):
    for path in ('home/a/1.txt', 'train/000000.png', 'home/b/2.txt'):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text('x')
    assert tool.foreign_entry(tmp_path, 'det') == 'home'


@pytest.mark.parametrize('text', ['', '[]', '{"info": null}', '{"info": {}}'])
def test_broken_json_is_refused(tmp_path, capsys, text):
    (tmp_path / 'annotations').mkdir()
    (tmp_path / 'annotations' / 'instances_train.json').write_text(text)
    assert tool.main(arguments(tmp_path)) == 1
    assert '--overwrite' in capsys.readouterr().err


@pytest.mark.parametrize('flags', [[], ['--overwrite']])
def test_other_peoples_files_are_never_replaced(tmp_path, capsys, flags):
    (tmp_path / 'thesis.txt').write_text('x')
    assert tool.main([*arguments(tmp_path), *flags]) == 1
    assert "'thesis.txt'" in capsys.readouterr().err
    assert read_files(tmp_path) == {'thesis.txt': b'x'}


def test_out_is_a_file(tmp_path, capsys):
    (tmp_path / 'set').write_text('x')
    assert tool.main(arguments(tmp_path / 'set')) == 1
    assert 'is a file' in capsys.readouterr().err


def test_empty_folder_is_filled(tmp_path):
    (tmp_path / 'set').mkdir()
    assert tool.main(arguments(tmp_path / 'set', train=1, val=1)) == 0
    assert len(read_files(tmp_path / 'set')) == 4


@pytest.mark.parametrize('flags', [[], ['--overwrite']])
def test_interruption_leaves_nothing_half_made(tmp_path, monkeypatch, flags):
    out = tmp_path / 'set'
    if flags:
        tool.make_dataset(out, train=1, val=1, size=32, seed=0)
    before = read_files(tmp_path)
    build = tool.build_split

    def interrupted(split, *rest):
        if split.name == 'val':
            raise KeyboardInterrupt
        build(split, *rest)

    monkeypatch.setattr(tool, 'build_split', interrupted)
    with pytest.raises(KeyboardInterrupt):
        tool.main([*arguments(out), *flags])
    assert read_files(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == len(flags)


@pytest.mark.parametrize('package', ['sklearn', 'skimage'])
def test_missing_package_says_what_to_install(tmp_path, package):
    (tmp_path / f'{package}.py').write_text(f'raise ImportError("No module named {package!r}")')
    run = subprocess.run(
        [sys.executable, str(TOOL), *arguments(tmp_path / 'set')],
        env={**os.environ, 'PYTHONPATH': str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert len(run.stderr.splitlines()) == 1
    assert package in run.stderr
    assert 'pip install scikit-learn scikit-image' in run.stderr
    assert not (tmp_path / 'set').exists()


def test_photograph_not_shipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, 'SKIMAGE_PHOTOS', ('nowhere.png',))
    assert tool.main(arguments(tmp_path / 'set')) == 1
    message = capsys.readouterr().err
    assert 'nowhere.png' in message
    assert 'pip install' in message
