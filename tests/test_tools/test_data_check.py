"""Checks of the data and checkpoints that a config names, before anything is built."""
import json
import os
from pathlib import Path

import pytest
import torch
from mmdet.datasets import CocoDataset
from mmengine.config import Config, ConfigDict
from tool_testing import TINY, load_tool, make_coco

from mmvssm.engine.config import UsageError, load_config
from mmvssm.engine.data_check import check_checkpoint, check_data, check_load_from

train = load_tool('train')


@pytest.fixture
def coco(tmp_path):
    """A good COCO folder and the arguments of ``load_config`` that use it."""
    make_coco(tmp_path / 'coco')
    return tmp_path / 'coco', (str(TINY), dict(data_root=str(tmp_path / 'coco')))


def edit(path, change):
    """Rewrite a JSON file after ``change(content)``."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


class TestDataCheck:

    def test_missing_folder_comes_before_the_model(self, monkeypatch):
        monkeypatch.setattr(train.Runner, 'from_cfg', lambda cfg: pytest.fail('built'))
        with pytest.raises(SystemExit, match='no such file or folder: /gone; .*data_root=FOLDER'):
            train.main([str(TINY), '--cfg-options', 'data_root=/gone'])

    def test_good_data(self, coco):
        check_data(load_config(*coco[1]), ('train', 'val', 'test'))

    @pytest.mark.parametrize('change, message', [
        (lambda coco: coco.update(images=[]), 'names no images'),
        (lambda coco: coco.update(annotations=[]),
         'no image has annotations of the classes to train on'),
        (lambda coco: [item.update(image_id=99) for item in coco['annotations']],
         'no image has annotations of the classes to train on'),
        (lambda coco: coco['categories'][0].update(name='digit'),
         '1 of the 80 classes are no categories of .*json: person; it has digit, bicycle'),
        (lambda coco: coco['images'][1].update(file_name='gone.jpg'),
         '1 of the 2 images .* are not in .*train2017: gone.jpg'),
        (lambda coco: [image.update(height=20) for image in coco['images']],
         'min_size=32: all 2 annotated images of .* are smaller'),
        (lambda coco: coco.update(images={}), 'images is a dict, not a list: .*train2017.json'),
        (lambda coco: coco.pop('images'), 'images is missing'),
        (lambda coco: coco.update(annotations='x'), 'annotations is a str, not a list'),
        (lambda coco: coco['images'].append(3), r'images\[2\] is a int, not an object'),
        (lambda coco: coco['images'][1].pop('file_name'), r'images\[1\] lacks file_name: /.*json'),
        (lambda coco: [coco['images'][0].pop(key) for key in ('id', 'width', 'height')],
         r'images\[0\] lacks id, width, height'),
        (lambda coco: [coco['annotations'][1].pop(key) for key in ('image_id', 'category_id')],
         r'annotations\[1\] lacks image_id, category_id'),
        (lambda coco: coco['annotations'][0].pop('id'), r'annotations\[0\] lacks id'),
        (lambda coco: coco['categories'][4].pop('name'), r'categories\[4\] lacks name'),
    ])
    def test_bad_annotations(self, coco, change, message):
        edit(coco[0] / 'annotations' / 'instances_train2017.json', change)
        with pytest.raises(UsageError, match=message):
            check_data(load_config(*coco[1]), ['train'])

    def test_not_json(self, coco):
        (coco[0] / 'annotations' / 'instances_train2017.json').write_text('{"images": [')
        with pytest.raises(UsageError, match='not valid JSON'):
            check_data(load_config(*coco[1]), ['train'])

    def test_a_list_is_no_annotation_file(self, coco):
        (coco[0] / 'annotations' / 'instances_train2017.json').write_text('[]')
        with pytest.raises(UsageError, match='holds a list, not an object with images'):
            check_data(load_config(*coco[1]), ['train'])

    def test_format_of_its_own(self, coco):
        cfg = load_config(*coco[1])
        cfg.train_dataloader.dataset.type = 'BaseDetDataset'
        edit(coco[0] / 'annotations' / 'instances_train2017.json',
             lambda coco: coco['images'][1].pop('file_name'))
        check_data(cfg, ['train'])

    def test_lvis_names_images_by_url(self, coco):
        cfg = load_config(*coco[1])
        cfg.train_dataloader.dataset.type = 'LVISV1Dataset'
        cfg.train_dataloader.dataset.metainfo = dict(classes=('person',))
        edit(coco[0] / 'annotations' / 'instances_train2017.json',
             lambda coco: [image.pop('file_name') for image in coco['images']])
        check_data(cfg, ['train'])

    def test_file_names_need_not_be_normal(self, coco):
        edit(coco[0] / 'annotations' / 'instances_train2017.json', lambda coco: coco['images'][1].update(
            file_name='./' + coco['images'][1]['file_name']))
        check_data(load_config(*coco[1]), ['train'])

    def test_empty_image(self, coco):
        image = coco[0] / 'train2017' / f'{2:012}.jpg'
        image.write_bytes(b'')
        with pytest.raises(UsageError, match=rf'1 of the 2 images are empty files .* {image}'):
            check_data(load_config(*coco[1]), ['train'])

    def test_broken_link(self, coco):
        image = coco[0] / 'train2017' / f'{2:012}.jpg'
        image.unlink()
        image.symlink_to('/gone.jpg')
        with pytest.raises(UsageError, match='1 of the 2 images .* are not in'):
            check_data(load_config(*coco[1]), ['train'])

    def test_missing_annotation_file(self, coco):
        path = coco[0] / 'annotations' / 'instances_val2017.json'
        path.unlink()
        message = rf'val_dataloader.dataset.ann_file: .*{path}; .*data_root=FOLDER'
        with pytest.raises(UsageError, match=message):
            check_data(load_config(*coco[1]), ('train', 'val'))

    def test_missing_annotation_file_of_the_evaluator(self, coco):
        cfg = load_config(coco[1][0], {**coco[1][1], 'val_evaluator.ann_file': '/gone.json'})
        with pytest.raises(UsageError, match='val_evaluator.ann_file=PATH'):
            check_data(cfg, ['val'])

    def test_empty_image_folder(self, coco):
        for image in (coco[0] / 'train2017').iterdir():
            image.unlink()
        with pytest.raises(UsageError, match='data_prefix.img: empty folder: .*train2017'):
            check_data(load_config(*coco[1]), ['train'])

    def test_wrapped_datasets(self, coco):
        cfg = load_config(*coco[1])
        inner = cfg.train_dataloader.dataset
        gone = ConfigDict(inner, data_root='/gone/')
        cfg.train_dataloader.dataset = dict(
            type='RepeatDataset', times=2,
            dataset=dict(type='ConcatDataset', datasets=[inner, gone]))
        with pytest.raises(UsageError, match=r'dataset.dataset.datasets.1.data_root: .* /gone;'):
            check_data(cfg, ['train'])

    def test_config_of_classes(self, coco):
        cfg = load_config(*coco[1])
        cfg.train_dataloader.dataset.type = CocoDataset
        edit(coco[0] / 'annotations' / 'instances_train2017.json',
             lambda coco: coco.update(categories=[]))
        with pytest.raises(UsageError, match='80 of the 80 classes'):
            check_data(cfg, ['train'])

    @pytest.mark.parametrize('dataset', [dict(type='CIFAR10', data_root='/gone/'), {}], ids=['fetched', 'no type'])
    def test_left_to_others(self, dataset):
        check_data(Config(dict(train_dataloader=dict(dataset=dataset))), ['train'])


class TestCheckpointCheck:

    def test_missing(self):
        with pytest.raises(UsageError, match='checkpoint not found: .*/gone.pth'):
            check_checkpoint('gone.pth', 'checkpoint')

    def test_truncated(self, tmp_path):
        path = tmp_path / 'cut.pth'
        torch.save(dict(state_dict=dict(a=torch.zeros(1000))), path)
        path.write_bytes(path.read_bytes()[:2000])
        with pytest.raises(UsageError, match=rf'^my file {path} \(2000 bytes\) cannot be read: .*; try X$'):
            check_checkpoint(str(path), 'my file', 'try X')

    def test_truncated_where_others_are(self, tmp_path):
        """The newest of those that can be read is named."""
        paths = [tmp_path / f'iter_{i}.pth' for i in range(4)]
        for i, path in enumerate(paths):
            torch.save(dict(state_dict={}, optimizer={}), path)
            if i >= 2:
                path.write_bytes(b'')
            os.utime(path, (i, i))
        cfg = Config(dict(work_dir=str(tmp_path)))
        with pytest.raises(UsageError, match=rf'iter_3.pth .*cannot be read: .*; --resume {paths[1]} goes on'):
            check_load_from(cfg, str(paths[3]))
        for path in paths[:2]:
            path.unlink()
        with pytest.raises(UsageError, match='cannot be read') as caught:
            check_load_from(cfg, str(paths[3]))
        assert '--resume' not in str(caught.value)

    @pytest.mark.parametrize('content', [b'', b'abc', b'\x80\x02}', b'\x80\x04\x95'])
    def test_damaged(self, tmp_path, content):
        (tmp_path / 'damaged.pth').write_bytes(content)
        with pytest.raises(UsageError, match='cannot be read'):
            check_checkpoint(str(tmp_path / 'damaged.pth'), 'checkpoint')

    def test_not_a_checkpoint(self, tmp_path):
        path = tmp_path / 'page.pth'
        path.write_text('<html>404</html>')
        with pytest.raises(UsageError, match='cannot be read'):
            check_checkpoint(str(path), 'checkpoint')

    def test_not_a_dict(self, tmp_path):
        torch.save([1, 2], tmp_path / 'list.pth')
        with pytest.raises(UsageError, match='holds a list'):
            check_checkpoint(str(tmp_path / 'list.pth'), 'checkpoint')

    def test_code_is_not_run(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (Path.touch, (tmp_path / 'ran',))

        torch.save(dict(state_dict=Evil()), tmp_path / 'evil.pth')
        with pytest.raises(UsageError, match='cannot be read'):
            check_checkpoint(str(tmp_path / 'evil.pth'), 'checkpoint')
        assert not (tmp_path / 'ran').exists()
