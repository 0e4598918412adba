"""Data that are not there: the message says what is expected where, or what makes them; and what make clean deletes."""

import shutil
import subprocess
from pathlib import Path

import pytest

from mmdet_norms.classification import ImageFolder
from mmdet_norms.cli.common import read_config, require_annotations
from mmdet_norms.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    'config, said, unsaid',
    [
        ('demo/mask-rcnn_r50_fpn_bnet5_shapes.py', 'make_shapes.py generates them', 'cocodataset.org'),
        (
            'bnet/faster-rcnn_r50_fpn_bnet5_1x_coco.py',
            'so that data/coco holds annotations/, train2017/ and val2017/',
            'make_shapes',
        ),
    ],
)
def test_the_message_is_about_the_data_of_the_config(config, said, unsaid, tmp_path, monkeypatch):
    cfg = read_config(str(ROOT / 'configs' / config))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r'there is no annotation file data/\w+/annotations/') as error:
        require_annotations(cfg, 'train_dataloader')
    assert said in str(error.value) and unsaid not in str(error.value) and '--data-root DIR' in str(error.value)


def test_the_data_of_the_classifier_say_what_generates_them(tmp_path, monkeypatch):
    cfg = read_config(str(ROOT / 'configs/demo/resnet50_bnet5_shapes-cls.py'))
    monkeypatch.chdir(tmp_path)
    dataset = ImageFolder(**{k: v for k, v in cfg.train_dataloader.dataset.items() if k != 'type'}, lazy_init=True)
    assert dataset.problems() == [
        "data_root='data/shapes-cls/': there is no such folder; python tools/make_shapes.py --classification generates "
        'it; or write the one that holds train/ and val/'
    ]


def test_other_data_are_asked_for_by_the_option(tmp_path):
    cfg = dict(val_dataloader=dict(dataset=dict(type='CocoDataset', data_root=str(tmp_path), ann_file='own.json')))
    with pytest.raises(UserError, match=r'own\.json; name the folder with --data-root DIR'):
        require_annotations(cfg, 'val_dataloader')


@pytest.mark.skipif(not shutil.which('make'), reason='make is not installed')
def test_make_clean_keeps_trained_runs(tmp_path):
    shutil.copy(ROOT / 'Makefile', tmp_path)
    made = ('data/shapes/meta.json', 'data/shapes-cls/meta.json', 'build/x')
    for name in ('work_dirs/run/epoch_1.pth', 'data/coco/a.json', '.venv/y', *made):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for package in ('mmdet_norms', 'mmdet_norms_start', 'tests', 'tools', 'configs'):
        (tmp_path / package / '__pycache__').mkdir(parents=True)

    def make(*arguments, answer=''):
        done = subprocess.run(['make', *arguments], cwd=tmp_path, input=answer, capture_output=True, text=True)
        left = (name for name in tmp_path.rglob('*') if name.is_file() or name.name == '__pycache__')
        return done.returncode, sorted(name.relative_to(tmp_path).as_posix() for name in left)

    kept = ['.venv/y', 'Makefile', 'data/coco/a.json', 'work_dirs/run/epoch_1.pth']
    assert make('clean') == (0, kept)
    assert make('clean-all', answer='n\n')[1] == make('clean-all')[1] == kept
    assert make('clean-all', answer='y\n') == (0, ['Makefile', 'data/coco/a.json'])
