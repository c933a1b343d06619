"""tools/benchmarks/scaling.py with a slim detector, on the CPU in one and two processes."""
import importlib
import json

import pytest
from pycocotools.coco import COCO
from test_launchers import TWO_PROCESSES, on_cpus
from tool_testing import ROOT


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools' / 'benchmarks'))
    return importlib.import_module('scaling')  # by the name that its processes know


def test_rows(scaling, tmp_path, monkeypatch, capsys):
    for key, value in on_cpus().items():
        monkeypatch.setenv(key, str(value))
    config, out = tmp_path / 'tiny.py', tmp_path / 'out.json'
    config.write_text(TWO_PROCESSES)
    monkeypatch.setattr(scaling, 'TARGETS', {2: 0.01})
    monkeypatch.setattr(scaling, 'MOST_WAITING', 1)
    options = ['--config', str(config), '--iterations', '2', '--warmup', '1', '--interval', '1', '--amp', 'none',
               '--size', '48', '64', '--folder', str(tmp_path / 'runs'), '--out', str(out)]
    assert scaling.main([*options, '--gpus', '1', '2']) == 0
    assert '>= 1% of linear' in capsys.readouterr().out
    run = json.loads(out.read_text())[-1]
    assert run['system']['command'].startswith('tools/benchmarks/scaling.py --config')
    one, two = run['rows']
    assert (one['gpus'], two['gpus'], one['linear'], one['iterations'], two['iterations']) == (1, 2, 1, 3, 3)
    assert two['rate'] == pytest.approx(4e3 / two['ms'][1])  # 2 images for each
    assert two['linear'] == pytest.approx(two['rate'] / one['rate'] / 2, abs=1e-4)
    assert 0 < two['waiting'] < 1

@pytest.mark.parametrize('second, waiting, reached', [(190, 0.05, True), (189, 0, False), (200, 0.051, False)])
def test_what_is_wanted(scaling, tmp_path, monkeypatch, second, waiting, reached):
    rates = {1: 100, 2: second}
    monkeypatch.setattr(scaling, 'make_photographs', lambda *_: None)
    monkeypatch.setattr(scaling, 'measure', lambda args, gpus, *_: dict(
        gpus=gpus, dtype='bf16', rate=rates[gpus], unit='img/s', waiting=waiting, ms=[1, 1, 1]))
    assert scaling.main(['--folder', str(tmp_path), '--gpus', '1', '2']) == (0 if reached else 1)


def test_photographs(scaling, tmp_path):
    scaling.make_photographs(tmp_path, 3, (48, 64))
    coco = COCO(str(tmp_path / 'annotations.json'))
    assert len(coco.imgs) == 3
    assert len(coco.anns) == 21
    for annotation in coco.anns.values():
        left, top, width, height = annotation['bbox']
        assert left >= 0
        assert top >= 0
        assert left + width <= 64
        assert top + height <= 48
        assert coco.annToMask(annotation).any()


@pytest.mark.parametrize('options, message', [
    (['--config', 'gone.py'], '--config: no such file: gone.py'),
    (['--gpus', '0'], "argument --gpus: expected a whole number above 0, got '0'"),
])
def test_bad_options(scaling, options, message, capsys):
    with pytest.raises(SystemExit) as caught:
        scaling.main(options)
    assert message in f'{caught.value}{capsys.readouterr().err}'


def test_failed_training(scaling, tmp_path):
    (tmp_path / 'config.py').write_text(f"_base_ = {str(ROOT / 'configs' / 'mask_rcnn_spatialmamba_t_1x.py')!r}\n")
    with pytest.raises(SystemExit, match='training with --gpus 1 ended with status 1:(.|\n)*no_such'):
        scaling.main(['--config', str(tmp_path / 'config.py'), '--gpus', '1', '--iterations', '1', '--warmup', '1',
                      '--folder', str(tmp_path), '--size', '48', '64', '--amp', 'none',
                      '--cfg-options', 'pretrained=no_such.pth'])
