import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def test_every_package_is_installed():
    """They are listed by name, since ``kernels/`` is installed under another one; a wheel lacks what is forgotten."""
    tomllib = pytest.importorskip('tomllib')  # of Python 3.11 and newer
    tools = tomllib.loads((ROOT / 'pyproject.toml').read_text())['tool']['setuptools']
    found = {name: [path.parent for path in (ROOT / folder).rglob('__init__.py')]
             for name, folder in tools['package-dir'].items()}
    packages = {'.'.join((name, *path.relative_to(ROOT / tools['package-dir'][name]).parts))
                for name, paths in found.items() for path in paths}
    assert sorted(tools['packages']) == sorted(packages)
