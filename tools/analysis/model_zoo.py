"""Write the tables of configs/README.md from the metafiles that model-index.yml names."""
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
README = ROOT / 'configs' / 'README.md'
# What stands between the first and the last table.
TABLES = re.compile(r'(?<=<!-- tables -->\n).*(?=<!-- end of tables -->)', re.DOTALL)

# Headers of what was counted with the code of this repository.
OURS = ('config', 'parameters, M', 'FLOPs, G')
# Section, dataset, metrics as in the metafiles.
SECTIONS = (
    ('ImageNet-1K', 'ImageNet-1k', ('Top 1 Accuracy',)),
    ('COCO 2017', 'COCO', ('box AP', 'mask AP')),
    ('ADE20K', 'ADE20K', ('mIoU', 'mIoU(ms+flip)')),
)


def load_metafiles(index=ROOT / 'model-index.yml'):
    """The contents of all metafiles.

    Returns:
        tuple[list[dict], list[dict]]: Collections and models, in the order of the files.
    """
    names = yaml.safe_load(index.read_text())['Import']
    files = [yaml.safe_load((index.parent / name).read_text()) for name in names]
    return [c for file in files for c in file['Collections']], [m for file in files for m in file['Models']]


def render(models):
    """The tables in Markdown: one for each dataset of :data:`SECTIONS`, one for the demos."""
    text = ''
    for title, dataset, metrics in SECTIONS:
        of_dataset = [model for model in models if model['Metadata']['Training Data'] == dataset]
        size, = {model['Metadata']['Input'] for model in of_dataset}
        text += f'## {title}, counts at {size}\n\n' + table(
            (*OURS, '*parameters, M*', '*FLOPs, G*', *(f'*{name}*' for name in metrics), '*source*'),
            [[*ours(model), *theirs(model, metrics)] for model in of_dataset])
    demos = [model for model in models if model['Metadata']['Training Data'] == 'digits']
    return text + '## Demos on digits\n\n' + table(
        (*OURS, 'input'), [[*ours(model), model['Metadata']['Input']] for model in demos])


def ours(model):
    """Cells under :data:`OURS`."""
    metadata = model['Metadata']
    notes = ''.join(f'<sup>{note}</sup>' for note in metadata.get('Notes', ''))
    return (f"[{model['Name']}]({Path(model['Config']).name}){notes}", f"{metadata['Parameters'] / 1e6:.2f}",
            f"{metadata['FLOPs'] / 1e9:.2f}")


def theirs(model, metrics):
    """Cells of what the authors published, '-' where they published nothing."""
    counts = [model['Metadata'].get(f'Published {what}') for what in ('Parameters', 'FLOPs')]
    results = model.get('Results', ())
    values = {name: value for result in results for name, value in result['Metrics'].items()}
    return ['-' if count is None else f'{count / unit:g}' for count, unit in zip(counts, (1e6, 1e9), strict=True)] \
        + [f'{values[name]:.1f}' if name in values else '-' for name in metrics] \
        + [results[0]['Source'] if results else '-']


def table(header, rows):
    lines = [header, ['---'] * len(header), *rows]
    return ''.join(f"| {' | '.join(cells)} |\n" for cells in lines) + '\n'


def main():
    _, models = load_metafiles()
    tables = '\n' + render(models)
    README.write_text(TABLES.sub(lambda _: tables, README.read_text()))


if __name__ == '__main__':
    main()
