"""Tilings are searched only when asked for, once, and kept."""
import contextlib
import json
import os

import pytest
import torch

from mmvssm.kernels._core import tuning

CANDIDATES = (4, 8), (8, 8), (8, 16)
TENSOR = torch.empty(1)


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    """An imaginary GPU; returns what was timed. The second candidate is the fastest."""
    timed = []

    def milliseconds(function):
        timed.append(function())
        return {CANDIDATES[1]: 1.0}.get(timed[-1], 2.0)

    monkeypatch.setattr(tuning, '_device', lambda tensor: 0)
    monkeypatch.setattr(tuning, '_file', lambda device: tmp_path / 'cache' / 'tilings.json')
    monkeypatch.setattr(tuning, '_milliseconds', milliseconds)
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: False)
    monkeypatch.setattr(torch.cuda, 'device', lambda device: contextlib.nullcontext())
    monkeypatch.delenv('MMVSSM_TUNE', raising=False)
    forget(monkeypatch)
    yield timed
    tuning._choices.cache_clear()


def forget(monkeypatch):
    """As in another process."""
    monkeypatch.setattr(tuning, '_known', {})
    tuning._choices.cache_clear()


def choose(shape_class=(128, 5), candidates=CANDIDATES):
    return tuning.tiling('scan', shape_class, candidates, TENSOR, lambda tiles: tiles)


def test_default_unless_asked_for(gpu):
    assert choose() == CANDIDATES[0]
    assert not gpu


def test_search_is_done_once_for_a_class(gpu, monkeypatch, capsys):
    monkeypatch.setenv('MMVSSM_TUNE', '1')
    assert choose() == choose() == CANDIDATES[1]
    assert gpu == list(CANDIDATES)
    assert 'scan 128 5 torch.float32: tiling (8, 8) takes 1.000 ms, the default 2.000 ms' in capsys.readouterr().out
    choose((64, 5))
    assert len(gpu) == 2 * len(CANDIDATES)


def test_found_tilings_are_kept(gpu, monkeypatch):
    monkeypatch.setenv('MMVSSM_TUNE', '1')
    choose()
    monkeypatch.delenv('MMVSSM_TUNE')
    forget(monkeypatch)
    assert choose() == CANDIDATES[1]
    assert choose((64, 5)) == CANDIDATES[0]
    assert len(gpu) == len(CANDIDATES)


def test_tilings_that_no_longer_exist_are_forgotten(monkeypatch):
    monkeypatch.setenv('MMVSSM_TUNE', '1')
    choose()
    monkeypatch.delenv('MMVSSM_TUNE')
    forget(monkeypatch)
    assert choose(candidates=CANDIDATES[::2]) == CANDIDATES[0]


@pytest.mark.parametrize('content', ['{', '{"scan 128 5 torch.float32": [1, 2, 3]}', '[1]', '{"scan": 4}'],
                         ids=['broken', 'other', 'list', 'number'])
def test_unusable_file(monkeypatch, content, recwarn):
    file = tuning._file(0)
    file.parent.mkdir()
    file.write_text(content)
    assert choose() == CANDIDATES[0]
    assert len(recwarn) == ('[1, 2, 3]' not in content)
    forget(monkeypatch)
    monkeypatch.setenv('MMVSSM_TUNE', '1')
    assert choose() == CANDIDATES[1]
    assert json.loads(file.read_text())['scan 128 5 torch.float32'] == list(CANDIDATES[1])


def test_unwritable_folder_is_said(monkeypatch):
    tuning._file(0).parent.write_text('a file')
    monkeypatch.setenv('MMVSSM_TUNE', '1')
    with pytest.warns(UserWarning, match='searched again in the next run, .* cannot be written'):
        assert choose() == CANDIDATES[1]


@pytest.mark.parametrize(('umask', 'mode'), [(0o022, 0o644), (0o027, 0o640)], ids=['022', '027'])
def test_file_has_the_usual_mode(monkeypatch, umask, mode):
    monkeypatch.setenv('MMVSSM_TUNE', '1')
    before = os.umask(umask)
    try:
        choose()
    finally:
        os.umask(before)
    assert tuning._file(0).stat().st_mode & 0o777 == mode


def test_failure_leaves_no_file_behind(monkeypatch):
    tuning._file(0).mkdir(parents=True)
    monkeypatch.setenv('MMVSSM_TUNE', '1')
    with pytest.warns(UserWarning, match='cannot be written'):
        choose()
    assert list(tuning._file(0).parent.iterdir()) == [tuning._file(0)]


def test_nothing_is_timed_while_a_graph_is_captured(gpu, monkeypatch):
    monkeypatch.setenv('MMVSSM_TUNE', '1')
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    assert choose() == CANDIDATES[0]
    assert not gpu


@pytest.mark.parametrize(('number', 'expected'), [(1, 0), (2, 1), (3, 1), (4, 2), (1023, 9), (1024, 10)])
def test_size_class(number, expected):
    assert tuning.size_class(number) == expected
