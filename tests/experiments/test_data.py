"""Hashes of the data that trainings read: other data have others, copies do not."""

import json
import shutil
from pathlib import Path

from helpers import tiny, tiny_cls
from mmdet_norms.cli.grids import data_by_cell
from mmdet_norms.experiments import Cell


def data_of(config, *options):
    return data_by_cell()(Cell('x', str(config), ('--norm', 'bn', *options)))


def test_annotation_files_count_by_their_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a work dir would be
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
    assert moved == {str(other): before[str(file)]} and not (tmp_path / 'work_dirs').exists()
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


def test_what_is_read_of_a_folder_is_no_content_of_it(tmp_path):
    """Else one cell's list of images would count as another content of the folder that another cell reads."""
    config, root = tiny_cls.write_config(tmp_path), tmp_path / 'data'
    (root / 'one.txt').write_text('disc/0.png disc\n')
    (root / 'two.txt').write_text('disc/0.png disc\nbox/1.png box\n')
    key, whole = 'train_dataloader.dataset', data_of(config)
    choices = [
        *(f'{key}.ann_file={name}' for name in ('one.txt', 'two.txt')),
        *(f'{key}.metainfo.classes={classes}' for classes in ('box,disc', 'box,ring')),
        f'{key}.metainfo.classes={",".join(["box", *(f"c{i}" for i in range(100))])}',
        f'{key}.extensions=.png,.x',
    ]
    for option in choices:
        found = data_of(config, '--cfg-options', option)
        (train,) = (path for path in found if path not in whole and not path.endswith('.txt'))
        assert train.startswith(f'{root / "train"} (') and len(train) < len(str(root)) + 130
        assert whole.setdefault(train, None) is None  # each has a place of its own
    both = data_of(config, '--cfg-options', f'{key}.ann_file=one.txt', 'val_dataloader.dataset.split=train')
    assert len(both) == 3 and both[str(root / 'train')] == whole[str(root / 'train')]


def test_a_link_to_nowhere_leaves_the_others_known(tmp_path):
    config, root = tiny_cls.write_config(tmp_path), tmp_path / 'data'
    before = data_of(config)
    (root / 'train' / 'box' / 'link.png').symlink_to('gone.png')
    dangling = data_of(config)
    assert dangling.keys() == before.keys() and dangling != before
    next(root.glob('train/*/0.png')).unlink()
    assert data_of(config) != dangling


def test_a_folder_may_be_written_in_several_ways(tmp_path, monkeypatch):
    tiny_cls.write_config(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = [
        data_of('tiny_cls.py', '--data-root', root)
        for root in ('data', './data', 'data//', '../' + tmp_path.name + '/data')
    ]
    assert found[0] == found[1] == found[2] and set(found[0]) == {'data/train', 'data/val'}
    assert [*found[3].values()] == [*found[0].values()]


def test_options_of_new_keys_leave_the_data_known(tmp_path):
    config, new = tiny.write_config(tmp_path), ('--cfg-options-new', 'train_dataloader.dataset.foo=1', 'bar=1')
    assert data_of(config, *new) == data_of(config) != {}
    assert data_of(tiny_cls.write_config(tmp_path), *new) == {}  # which cannot be built: for each training to say
