"""tools/analysis/get_flops.py on a published and on a slim detector."""
import re

import pytest
from tool_testing import TINY, TINY_DETECTOR, load_tool

get_flops = load_tool('analysis/get_flops')


class TestGetFlops:

    def count(self, capsys, *arguments):
        """The printed parameters and FLOPs, the latter in G."""
        get_flops.main([str(argument) for argument in arguments])
        printed = capsys.readouterr().out
        parameters = re.search(r'^parameters: ([0-9,]+)$', printed, re.MULTILINE)[1]
        flops = re.search(r'^FLOPs: ([0-9.]+) G$', printed, re.MULTILINE)[1]
        return int(parameters.replace(',', '')), float(flops), printed

    def test_published_detector(self, capsys):
        parameters, flops, printed = self.count(capsys, TINY)
        assert parameters == 46_387_782
        assert flops == pytest.approx(261, rel=0.02)
        assert 'input: 3 x 800 x 1280' in printed
        assert 'not counted (calls): ' in printed
        assert 'mmvssm::' not in re.search('not counted.*', printed)[0]

    def test_shape_and_table(self, capsys, tmp_path):
        (tmp_path / 'config.py').write_text(TINY_DETECTOR)
        _, small, _ = self.count(capsys, tmp_path / 'config.py', '--shape', 64, 64)
        _, large, printed = self.count(
            capsys, tmp_path / 'config.py', '--shape', 128, 128, '--depth', 1)
        assert small < large
        for name in ('backbone', 'neck', 'rpn_head', 'roi_head'):
            assert re.search(rf'^ +[0-9,]+ +[0-9.]+  {name}$', printed, re.MULTILINE)

    def test_bad_shape(self):
        with pytest.raises(SystemExit, match=r'--shape takes two positive numbers, got \[0, 64\]'):
            get_flops.main([str(TINY), '--shape', '0', '64'])
