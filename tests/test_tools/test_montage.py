import importlib.util
from pathlib import Path

import cv2
import numpy as np
import pytest

TOOL = Path(__file__).parents[2] / 'tools' / 'analysis' / 'montage.py'
spec = importlib.util.spec_from_file_location('montage_tool', TOOL)
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def test_pictures_lie_side_by_side():
    red, green = (np.full((10, 20, 3), c, np.uint8) for c in ((0, 0, 255), (0, 255, 0)))
    sheet = tool.montage([red, green, red], columns=2, height=10, gap=2)
    assert sheet.shape == (22, 42, 3)
    assert (sheet[:10, :20] == red).all()
    assert (sheet[:10, 22:] == green).all()
    assert (sheet[12:, 22:] == 255).all()


def test_writes_a_picture_of_a_folder(tmp_path):
    for i in range(5):
        cv2.imwrite(str(tmp_path / f'{i}.png'), np.full((8, 8, 3), 50 * i, np.uint8))
    tool.main([str(tmp_path), str(tmp_path / 'sub' / 'out.jpg'), '--columns', '2', '--rows', '1', '--height', '16'])
    assert cv2.imread(str(tmp_path / 'sub' / 'out.jpg')).shape == (16, 38, 3)


@pytest.mark.parametrize('args, words', [(['--rows', '0'], '--rows'), ([], 'no pictures')])
def test_bad_input(tmp_path, args, words):
    with pytest.raises(SystemExit, match=words):
        tool.main([str(tmp_path), str(tmp_path / 'out.jpg'), *args])
