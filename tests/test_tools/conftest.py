import pytest
from mmengine.logging import MessageHub, MMLogger
from mmengine.visualization import Visualizer
from tool_testing import TINY_DETECTOR, load_tool, make_coco


@pytest.fixture(scope='session', autouse=True)
def _unformatted_configs():
    """MMEngine formats the config for every log and checkpoint, which takes as long as the short trainings here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('yapf.yapflib.yapf_api.FormatCode', lambda text, **options: (text, True))
        yield


@pytest.fixture(autouse=True)
def _no_instances_of_other_runs():
    """MMEngine keeps loggers and visualizers by name while the process lives, and names runs by the second:
    a run would write into the log of one before it, or draw with its visualizer."""
    for kind in (MMLogger, MessageHub, Visualizer, *Visualizer.__subclasses__()):
        kind._instance_dict.clear()


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """The folder of a run of one epoch, with config.py and the data under coco/."""
    folder = tmp_path_factory.mktemp('trained')
    make_coco(folder / 'coco')
    (folder / 'config.py').write_text(TINY_DETECTOR)
    load_tool('train').main([
        str(folder / 'config.py'), '--work-dir', str(folder / 'run'), '--seed', '1',
        '--cfg-options', f'data_root={folder / "coco"}'])
    return folder
