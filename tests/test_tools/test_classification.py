"""Classification through the tools, and image folders whose layout is not what MMPretrain reads."""
import pickle
import re

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from tool_testing import ROOT, load_tool

from mmvssm.engine.config import UsageError, load_config
from mmvssm.engine.imagefolder_check import check_image_folder

train, test, get_flops = map(load_tool, ('train', 'test', 'analysis/get_flops'))

CLASSES = ('ant', 'bee', 'cat')
CONFIG = ROOT / 'configs' / 'spatialmamba_t_in1k.py'

# The ImageNet recipe on images of 32x32 with three classes and a few channels, for four epochs.
SMALL = f'''
_base_ = {str(CONFIG)!r}
load, pack = dict(type='LoadImageFromFile'), dict(type='PackInputs')
dataset = dict(metainfo=dict(classes={CLASSES}), pipeline=[load, dict(type='Resize', scale=32), pack])
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dataset)
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dataset)
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1, ))
test_evaluator = val_evaluator
model = dict(
    data_preprocessor=dict(num_classes=3),
    backbone=dict(arch=dict(_delete_=True, embed_dims=8, depths=[1, 1, 1, 1])),
    head=dict(in_channels=64, num_classes=3))
param_scheduler = []
train_cfg = dict(max_epochs=4)
'''


def make_folder(root, classes=CLASSES, splits=('train', 'val'), images=2):
    """Class folders of small random images."""
    rng = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(images):
                picture = rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)
                assert cv2.imwrite(str(root / split / name / f'{name}_{i}.png'), picture)


def authors_file(path):
    """A checkpoint as the authors write them, of the model of ``SMALL``; returns its weights by our names."""
    torch.manual_seed(1)
    cfg = Config.fromfile(path.parent / 'config.py')
    weights = MODELS.build(dict(cfg.model, _scope_='mmpretrain')).state_dict()
    renamed = {'backbone.outnorm3.': 'norm.', 'head.fc.': 'head.', 'backbone.': ''}

    def authors(name):
        own = next(own for own in renamed if name.startswith(own))
        return renamed[own] + name[len(own):]
    torch.save({'model': {authors(name): value for name, value in weights.items()}}, path)
    return weights


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The folder of a run with EMA and MESA, with config.py and images/."""
    folder = tmp_path_factory.mktemp('classification')
    make_folder(folder / 'images')
    (folder / 'config.py').write_text(SMALL)
    train.main([str(folder / 'config.py'), '--work-dir', str(folder / 'run'), '--seed', '1',
                '--cfg-options', f'data_root={folder / "images"}/'])
    return folder


def evaluate(trained, checkpoint, out, *options):
    """Predicted scores (image, class) of ``tools/test.py``."""
    test.main([str(trained / 'config.py'), str(checkpoint), '--work-dir', str(out), '--out',
               str(out / 'predictions.pkl'), *options, '--cfg-options', f'data_root={trained / "images"}/'])
    with open(out / 'predictions.pkl', 'rb') as file:
        return torch.stack([sample['pred_score'] for sample in pickle.load(file)])


def log_of(folder):
    return ''.join(path.read_text() for path in sorted(folder.rglob('*.log')))


class TestTools:

    def test_training(self, trained):
        log = log_of(trained / 'run')
        assert 'loss_mesa' not in ''.join(line for line in log.splitlines() if 'Epoch(train) [1]' in line)
        assert re.search(r'Epoch\(train\) +\[4\].*loss_mesa: \d', log)
        assert len(re.findall(r'accuracy/top1: \d', log)) == 4

    def test_resume(self, trained, tmp_path):
        train.main([str(trained / 'config.py'), '--work-dir', str(tmp_path), '--resume',
                    str(trained / 'run' / 'epoch_3.pth'), '--cfg-options', f'data_root={trained / "images"}/'])
        assert re.search(r'Epoch\(train\) +\[4\].*loss_mesa: \d', log_of(tmp_path))

    @pytest.mark.parametrize('options', [(), ('--tta',)], ids=['plain', 'tta'])
    def test_evaluates_the_averaged_weights(self, trained, tmp_path, options):
        """With and without test-time augmentation, and whether or not the file has more than weights."""
        checkpoint = trained / 'run' / 'epoch_4.pth'
        weights = torch.load(checkpoint, weights_only=False)
        averaged = weights['ema_state_dict']['module.head.fc.weight']
        assert not torch.equal(weights['state_dict']['head.fc.weight'], averaged)
        bare = tmp_path / 'bare.pth'
        torch.save({'state_dict': weights['state_dict']}, bare)
        full = evaluate(trained, checkpoint, tmp_path / 'full', *options)
        assert torch.equal(full, evaluate(trained, bare, tmp_path / 'bare', *options))

    @pytest.mark.parametrize('options', [(), ('--tta',)], ids=['plain', 'tta'])
    def test_authors_checkpoint(self, trained, tmp_path, options):
        (tmp_path / 'config.py').write_text(SMALL)
        weights = authors_file(tmp_path / 'authors.pth')
        torch.save({'state_dict': weights}, tmp_path / 'own.pth')
        authors = evaluate(trained, tmp_path / 'authors.pth', tmp_path / 'authors', *options)
        assert torch.equal(authors, evaluate(trained, tmp_path / 'own.pth', tmp_path / 'own', *options))

    def test_training_starts_from_the_authors_checkpoint(self, trained, tmp_path):
        (tmp_path / 'config.py').write_text(SMALL)
        authors_file(tmp_path / 'authors.pth')
        train.main([str(trained / 'config.py'), '--work-dir', str(tmp_path / 'run'), '--cfg-options',
                    f'data_root={trained / "images"}/', f'load_from={tmp_path / "authors.pth"}',
                    'train_cfg.max_epochs=1'])
        assert re.search(r'load_from: (\d+) of the \1 weights', log_of(tmp_path / 'run'))

    def test_unfit_checkpoint(self, trained, tmp_path):
        (tmp_path / 'config.py').write_text(SMALL)
        authors_file(tmp_path / 'authors.pth')
        checkpoint = torch.load(tmp_path / 'authors.pth', weights_only=True)
        del checkpoint['model']['norm.bias']
        torch.save(checkpoint, tmp_path / 'authors.pth')
        with pytest.raises(SystemExit, match='not one of this model.*outnorm3.bias'):
            evaluate(trained, tmp_path / 'authors.pth', tmp_path / 'out')

    def test_pictures(self, trained, tmp_path):
        evaluate(trained, trained / 'run' / 'epoch_4.pth', tmp_path, '--show-dir', str(tmp_path / 'pictures'))
        assert len(list((tmp_path / 'pictures').glob('*.png'))) == len(CLASSES) * 2

    def test_mesa_needs_ema(self, trained, tmp_path):
        with pytest.raises(SystemExit, match='^error: MESAHook: the config has no EMAHook'):
            train.main([str(trained / 'config.py'), '--work-dir', str(tmp_path), '--cfg-options',
                        f'data_root={trained / "images"}/', 'custom_hooks=[]'])

    def test_flops(self, capsys):
        get_flops.main([str(CONFIG)])
        printed = capsys.readouterr().out
        assert 'parameters: 26,748,862' in printed
        assert float(re.search(r'FLOPs: ([\d.]+) G', printed)[1]) == pytest.approx(4.5, rel=0.03)


@pytest.fixture
def check(tmp_path):
    """A function that checks val in a folder like ImageNet with ``CLASSES``, changed by what it is given."""
    def run(**options):
        cfg = load_config(str(CONFIG), {'data_root': f'{tmp_path}/'})
        cfg.train_dataloader.dataset.metainfo = dict(classes=CLASSES)
        cfg.val_dataloader.dataset = dict(cfg.train_dataloader.dataset, **dict(dict(split='val'), **options))
        check_image_folder(cfg, 'val_dataloader.dataset', cfg.val_dataloader.dataset)
    return run


def flat(root):
    """All images of val directly in its folder."""
    for image in list((root / 'val').rglob('*.png')):
        image.rename(root / 'val' / image.name)
    for name in CLASSES:
        (root / 'val' / name).rmdir()


def nested(root):
    (root / 'val').rename(root / 'inner')
    (root / 'val').mkdir()
    (root / 'inner').rename(root / 'val' / 'val')


def listed(root, line):
    (root / 'meta').mkdir()
    (root / 'meta' / 'val.txt').write_text(line)


class TestImageFolder:

    @pytest.mark.parametrize('change, dataset', [
        (lambda root: None, dict()),
        (lambda root: None, dict(split='', data_prefix='val')),
        (lambda root: None, dict(split='', data_prefix=dict(img_path='val'))),
        (lambda root: (root / 'val' / 'notes.txt').write_text('x'), dict()),
        (lambda root: (root / 'val' / 'bee' / 'more').mkdir() or (root / 'val' / 'bee' / 'bee_0.png').rename(
            root / 'val' / 'bee' / 'more' / 'x.png'), dict()),
        (lambda root: [image.unlink() for image in (root / 'val' / 'bee').iterdir()], dict()),
        (lambda root: [(root / 'val' / name).rename(root / 'val' / f'class {name}') for name in CLASSES], dict()),
        (lambda root: flat(root) or listed(root, 'ant_0.png 0\nbee_0.png 1'), dict()),
        (lambda root: listed(root, 'ant/ant_0.png 0'), dict()),
        (flat, dict(with_label=False)),
        (flat, dict(type='CIFAR10')),
    ], ids=['class folders', 'prefix', 'prefix by key', 'file beside', 'subfolder', 'class without images',
            'other names', 'flat with list', 'list', 'without labels', 'other dataset'])
    def test_good(self, check, tmp_path, change, dataset):
        make_folder(tmp_path)
        change(tmp_path)
        check(**dataset)

    @pytest.mark.parametrize('change, message', [
        (lambda root: (root / 'val').rename(root / 'valid'),
         'there is no folder .*/val; .* has train, valid; .*--cfg-options data_root=FOLDER'),
        (flat, '/val has ant_0.png, .* but no class folders; expected .*/val/CLASS/IMAGE.*ann_file=FILE'),
        (nested, 'one level too deep, in .*/val/val; .*data_prefix=val/val'),
        (lambda root: [image.rename(image.with_suffix('.tar')) for image in root.rglob('*.png')],
         'no images .*.jpeg.* in the 3 class folders of .*/val; .*/ant has ant_0.tar'),
        (lambda root: make_folder(root, ['dog'], ['val']), 'has 4 class folders .*expected 3 .*metainfo.classes='),
        (lambda root: (root / 'val' / 'cat').rename(root / 'val' / 'cow'),
         'not those of training: 1 only in .*/train .cat.; 1 only in .*/val .cow.'),
        (lambda root: listed(root, 'ant_0.png 0'), 'val.txt names ant_0.png, which is not there; .*/val has ant'),
        (lambda root: listed(root, 'ant/ant_0.png'), "begins with 'ant/ant_0.png', expected lines of an image"),
        (lambda root: listed(root, ''), "begins with '', expected"),
    ], ids=['missing', 'flat', 'nested', 'no images', 'too many', 'other folders', 'stale list', 'no numbers',
            'empty list'])
    def test_bad(self, check, tmp_path, change, message):
        make_folder(tmp_path)
        change(tmp_path)
        with pytest.raises(UsageError, match=f'^val_dataloader.dataset.*{message}') as raised:
            check()
        assert '\n' not in str(raised.value)

    def test_classes_of_imagenet(self, tmp_path):
        make_folder(tmp_path)
        cfg = load_config(str(CONFIG), {'data_root': f'{tmp_path}/'})
        with pytest.raises(UsageError, match='has 3 class folders .*expected 1000'):
            check_image_folder(cfg, 'train_dataloader.dataset', cfg.train_dataloader.dataset)

    def test_hints_help(self, check, tmp_path):
        make_folder(tmp_path)
        nested(tmp_path)
        check(data_prefix='val/val')
