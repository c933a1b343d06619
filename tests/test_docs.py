"""What a slip of an editor breaks in the documents."""
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = sorted(path.relative_to(ROOT) for folder in ('.', 'configs', 'kernels', 'tools')
                   for path in (ROOT / folder).glob('*.md' if folder == '.' else '**/*.md'))


def cells(row):
    return len(re.findall(r'(?<!\\)\|', re.sub('`[^`]*`', '', row)))


@pytest.mark.parametrize('document', DOCUMENTS, ids=str)
def test_rows_of_a_table_have_as_many_cells_as_its_head(document):
    lines = (ROOT / document).read_text().splitlines()
    for number, line in enumerate(lines):
        if re.fullmatch(r'\|[-:| ]+\|', line):
            assert cells(lines[number - 1]) == cells(line), lines[number - 1]
            for row in lines[number + 1:]:
                if not row.startswith('|'):
                    break
                assert cells(row) == cells(line), row


@pytest.mark.parametrize('section', ['Training and evaluation', 'Speed on a CPU', 'On a GPU', 'Where things are'])
def test_readme_has_section(section):
    assert re.search(f'^## .*{section}', (ROOT / 'README.md').read_text(), re.MULTILINE)
