"""Configs, metafiles and the tables of configs/README.md say the same."""
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import modelindex
import pytest
from mmengine.config import Config

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / 'configs'


def load_tool(name):
    return SimpleNamespace(**runpy.run_path(str(ROOT / 'tools' / 'analysis' / f'{name}.py')))


get_flops, model_zoo = load_tool('get_flops'), load_tool('model_zoo')
COLLECTIONS, MODELS = model_zoo.load_metafiles()
BY_NAME = {model['Name']: model for model in MODELS}
DATASETS = {'ImageNet-1k': 'mmpretrain', 'COCO': 'mmdet', 'ADE20K': 'mmseg'}
# Notes that explain counts further than 3% from the published.
EXPLAINED = set('abe')
#: Parameters by model; configs of several schedules have the same.
_parameters = {}


def build(name):
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    return cfg, get_flops.build_model(cfg)


def test_one_entry_per_config():
    assert sorted(model['Config'] for model in MODELS) == sorted(
        f'configs/{path.name}' for path in CONFIGS.glob('*.py'))


def test_index_is_valid():
    index = modelindex.load(str(ROOT / 'model-index.yml'))
    assert index.check(silent=True) == []
    assert [model.name for model in index.models] == [model['Name'] for model in MODELS]
    assert all(model.full_model.paper for model in index.models)


def test_tables_are_those_of_the_metafiles():
    tables = model_zoo.TABLES.search(model_zoo.README.read_text())[0]
    assert tables == '\n' + model_zoo.render(MODELS), 'run tools/analysis/model_zoo.py'


def test_notes_are_explained():
    listed = re.findall(r'^- \*\*(\w)\*\* ', model_zoo.README.read_text(), re.MULTILINE)
    assert listed == sorted({note for model in MODELS for note in model['Metadata'].get('Notes', '')})


@pytest.mark.parametrize('name', BY_NAME)
class TestEntry:

    def test_names_and_data(self, name):
        model = BY_NAME[name]
        cfg = Config.fromfile(CONFIGS / f'{name}.py')
        assert model['Config'] == f'configs/{name}.py'
        assert cfg.model.backbone.type == model['In Collection'].replace('-', '')
        data = model['Metadata']['Training Data']
        if data == 'digits':
            assert name.endswith('_digits')
            assert 'Results' not in model
        else:
            assert cfg.default_scope == DATASETS[data]
            assert model['Metadata']['Input'] == '{}x{}'.format(*get_flops.SHAPES[cfg.default_scope])
            assert {result['Dataset'] for result in model.get('Results', ())} <= {data}

    def test_parameters(self, name):
        cfg = Config.fromfile(CONFIGS / f'{name}.py')
        key = str(cfg.model)
        if key not in _parameters:
            _, model = build(name)
            _parameters[key] = sum(parameter.numel() for parameter in model.parameters())
        assert BY_NAME[name]['Metadata']['Parameters'] == _parameters[key]


@pytest.mark.parametrize('name', ['spatialmamba_t_in1k', 'quadmamba_li_in1k'])
def test_flops(name):
    cfg, model = build(name)
    flops = get_flops.count_flops(model, cfg.default_scope, get_flops.SHAPES[cfg.default_scope]).total()
    assert BY_NAME[name]['Metadata']['FLOPs'] == round(flops, -7)


@pytest.mark.parametrize('what', ['Parameters', 'FLOPs'])
@pytest.mark.parametrize('name', [model['Name'] for model in MODELS if 'Results' in model])
def test_published_counts(name, what):
    metadata = BY_NAME[name]['Metadata']
    if not EXPLAINED & set(metadata.get('Notes', '')):
        assert metadata[what] == pytest.approx(metadata[f'Published {what}'], rel=0.03)
