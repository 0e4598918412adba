"""Hashes of the data that trainings read: other data have others, copies do not."""

import json
import shutil
from pathlib import Path

from helpers import tiny, tiny_cls
from mmdet_norms.cli.grids import data_by_cell
from mmdet_norms.experiments import Cell


def data_of(config, *options):
    return data_by_cell()(Cell('x', str(config), ('--norm', 'bn', *options)))


def test_annotation_files_count_by_their_content(tmp_path):
    config, file = tiny.write_config(tmp_path), tmp_path / 'data' / 'annotations.json'
    before = data_of(config)
    assert list(before) == [str(file)]
    text = file.read_text()
    file.unlink()
    file.write_text(text)  # at another time
    assert data_of(config, '--batch-size', '4', '--cfg-options', 'model.neck.norm_cfg.type=BN') == before
    content = json.loads(text)
    content['annotations'][0]['bbox'][0] += 1
    other = shutil.copytree(tmp_path / 'data', tmp_path / 'other') / 'annotations.json'
    file.write_text(json.dumps(content))
    assert data_of(config) != before
    moved = data_of(config, '--data-root', str(other.parent), '--val-fraction', '0.5')
    assert moved == {str(other): before[str(file)]} and not list(tmp_path.glob('work_dirs'))
    file.unlink()
    assert data_of(config) == {}  # for each training to say


def test_folders_of_classes_count_by_names_and_sizes(tmp_path):
    config, root = tiny_cls.write_config(tmp_path), tmp_path / 'data'
    before = data_of(config)
    assert set(before) == {str(root / 'train'), str(root / 'val')}
    image = next(Path(root, 'train').glob('*/0.png'))
    image.write_bytes(image.read_bytes() + b'0')
    changed = data_of(config)
    assert [path for path in before if changed[path] != before[path]] == [str(root / 'train')]
    image.rename(image.with_name('new.png'))
    assert data_of(config)[str(root / 'train')] != changed[str(root / 'train')]
