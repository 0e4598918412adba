"""--show-dir: no picture is lost, and none of the user's files is drawn over."""

import os
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.structures import InstanceData

from mmdet_norms.engine.picture import class_colours
from mmdet_norms.engine.pictures import MARK, PicturesHook
from mmdet_norms.errors import UserError


class Images:
    def __init__(self, paths):
        self.paths = [str(path) for path in paths]

    def __len__(self):
        return len(self.paths)

    def get_data_info(self, index):
        return dict(img_path=self.paths[index])


def write_images(root, names):
    paths = []
    for i, name in enumerate(names):
        paths.append(root / name)
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(paths[-1]), np.full((16, 16, 3), 20 * i, np.uint8))
    return paths


def show(paths, folder):
    DetLocalVisualizer.get_instance('visualizer')
    hook = PicturesHook(draw=True, test_out_dir=str(folder))
    runner = SimpleNamespace(test_dataloader=SimpleNamespace(dataset=Images(paths)), rank=0)
    hook.before_test(runner)
    for path in paths:
        sample = DetDataSample(metainfo=dict(img_path=str(path)))
        sample.pred_instances = InstanceData(bboxes=np.zeros((0, 4)), scores=np.zeros(0), labels=np.zeros(0, int))
        hook.after_test_iter(runner, 0, {}, [sample])


def drawn(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file() and p.name != MARK)


@pytest.mark.parametrize(
    'names',
    [
        [f'camera{i}/frame.png' for i in range(6)],
        ['a.png', 'b.png'],
        ['a.png', 'sub/a.png', 'sub/sub/a.png'],
        ['one.png'],
        ['x/val/0.png', 'y/val/0.png'],
    ],
)
def test_every_image_has_a_picture_of_its_own(names, tmp_path):
    paths = write_images(tmp_path / 'data', names)
    show(paths, tmp_path / 'shown')
    assert len(drawn(tmp_path / 'shown')) == len(names)
    show(paths, tmp_path / 'shown')  # again: these are ours
    assert len(drawn(tmp_path / 'shown')) == len(names)
    if 'camera0/frame.png' in names:
        assert drawn(tmp_path / 'shown') == names


@pytest.mark.parametrize('way', ['itself', 'link', 'relative', 'parent of a sub-folder'])
def test_images_are_not_drawn_over(way, tmp_path, monkeypatch):
    names = ['a.png', 'sub/b.png'] if way == 'parent of a sub-folder' else ['a.png', 'b.png']
    paths = write_images(tmp_path / 'data', names)
    before = [path.read_bytes() for path in paths]
    folder = tmp_path / 'data'
    if way == 'link':
        (tmp_path / 'link').symlink_to(folder)
        folder = tmp_path / 'link'
    if way == 'relative':
        monkeypatch.chdir(tmp_path / 'data')
        folder = os.curdir
    with pytest.raises(UserError, match='is a test image'):
        show(paths, folder)
    assert [path.read_bytes() for path in paths] == before and not (tmp_path / 'data' / MARK).exists()


def test_a_users_picture_of_the_same_name_stays(tmp_path):
    paths = write_images(tmp_path / 'data', ['a.png', 'b.png'])
    (tmp_path / 'holiday').mkdir()
    (tmp_path / 'holiday' / 'b.png').write_bytes(b'mine')
    with pytest.raises(UserError, match=r'holds b\.png'):
        show(paths, tmp_path / 'holiday')
    assert drawn(tmp_path / 'holiday') == ['b.png'] and (tmp_path / 'holiday' / 'b.png').read_bytes() == b'mine'


@pytest.mark.parametrize('palette', [None, 'red', (), [(1, 2, 3)] * 4, ['red', 'green', 'blue'], [(1, 2)] * 3])
def test_a_palette_counts_if_it_is_one_of_these_classes(palette):
    classes = ('a', 'b', 'c')
    assert class_colours(classes, palette) == class_colours(classes)
    assert class_colours(classes, [[1, 2, 3]] * 3) == [(name, (1, 2, 3)) for name in classes]
