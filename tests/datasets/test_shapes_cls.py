"""The generated ``shapes-cls`` data set: balance, determinism, no clue but the outline, folder handling."""

import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from helpers import warm
from mmdet_norms.classification import ImageFolder
from mmdet_norms.classification.image_folder import problems_of
from mmdet_norms.cli.shapes import main
from mmdet_norms.datasets import shapes_cls
from mmdet_norms.datasets.shapes import CLASSES, ShapesConfig, ShapesError, make_shapes
from mmdet_norms.datasets.shapes_cls import SHAPES_CLS, SHAPES_CLS_HARD, make_shapes_cls, render_image

TRAIN, VAL = 30, 12
SCRIPT = Path(__file__).resolve().parents[2] / 'tools' / 'make_shapes.py'


def tiny(root, **kwargs):
    return make_shapes_cls(root, TRAIN, VAL, size=32, seed=3, **kwargs)


def digest(folder):
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob('*') if p.is_file()):
        total.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp('data') / 'shapes-cls')


# ---------------------------------------------------------------------------------------------------------- content


def test_every_class_has_as_many_images_as_any_other(root):
    for split, count in (('train', TRAIN), ('val', VAL)):
        dataset = ImageFolder(data_root=str(root), split=split)
        assert dataset.metainfo['classes'] == tuple(sorted(CLASSES))
        labels = [dataset.get_data_info(i)['gt_label'] for i in range(len(dataset))]
        assert np.bincount(labels).tolist() == [count // 6] * 6
        pixels = cv2.imread(dataset.get_data_info(0)['img_path'])
        assert pixels.shape == (32, 32, 3)


@pytest.mark.parametrize('size', [32, 48, 64])
def test_one_object_of_the_class_that_the_folder_says(size):
    config = ShapesConfig(size=size, min_object=0.4, max_object=0.9)
    for index in range(24):
        scene = render_image(config, 0, 'train', index)
        (found,) = scene.objects
        assert scene.image.shape == (size, size, 3)
        assert found.label == index % 6 and found.visible > 0.5 and found.mask.sum() > 30


def test_the_same_arguments_give_the_same_bytes(root, tmp_path):
    assert digest(tiny(tmp_path / 'other')) == digest(root)


def test_images_of_splits_and_seeds_differ_and_are_none_of_the_detection_data():
    from mmdet_norms.datasets.shapes import render_scene

    drawn = [render_image(SHAPES_CLS, seed, split, 0).image for seed in (0, 1) for split in ('train', 'val')]
    drawn += [render_scene(SHAPES_CLS, seed, split, 0).image for seed in (0, 1) for split in ('train', 'val')]
    assert len({image.tobytes() for image in drawn}) == 8


def test_an_image_does_not_depend_on_the_number_of_images(root, tmp_path):
    few = make_shapes_cls(tmp_path / 'few', 8, 6, size=32, seed=3)
    found = [path for path in few.rglob('*.png')]
    assert len(found) == 14
    for path in found:
        assert path.read_bytes() == (root / path.relative_to(few)).read_bytes()


def test_only_the_outline_tells_the_class():
    """A linear classifier of colours, sizes and places is at chance; one of the outline's moments is not."""
    config = ShapesConfig(size=32, min_object=0.4, max_object=0.9)
    scenes = [render_image(config, 0, split, i) for split in ('train', 'val') for i in range(900)]
    labels = np.array([scene.objects[0].label for scene in scenes])
    clues, outlines = [], []
    for scene in scenes:
        mask = scene.objects[0].mask
        ys, xs = np.nonzero(mask)
        image = scene.image.astype(float)
        inside, outside = image[mask], image[~mask]
        spread = np.hypot(xs - xs.mean(), ys - ys.mean())
        contrast = np.linalg.norm(inside.mean(0) - outside.mean(0))
        place = (xs.mean(), ys.mean(), xs.max() + ys.max())
        clues.append([*image.mean((0, 1)), *inside.mean(0), *outside.mean(0), contrast, *place])
        outlines.append([mask.sum() / spread.max() ** 2, spread.min() / spread.max()])
    chance = 1 / 6 + 4 * np.sqrt(1 / 6 * 5 / 6 / 900)
    assert accuracy(np.array(clues), labels, 900) < chance
    assert accuracy(np.array(outlines), labels, 900) > 0.4


def accuracy(features, labels, train):
    """Of linear least squares on one-hot labels, on what it was not fitted to."""
    features = (features - features[:train].mean(0)) / features[:train].std(0)
    features = np.c_[features, np.ones(len(features))]
    weights = np.linalg.lstsq(features[:train], np.eye(6)[labels[:train]], rcond=None)[0]
    return ((features[train:] @ weights).argmax(1) == labels[train:]).mean()


# ------------------------------------------------------------------------------------------------------- the folder


def test_a_finished_data_set_is_left_alone(root, monkeypatch):
    before = digest(root)
    monkeypatch.setattr(shapes_cls, 'render_image', lambda *_: pytest.fail('drawn again'))
    assert tiny(root) == tiny(root, overwrite=True) == root
    assert digest(root) == before


@pytest.mark.parametrize('change', ['seed', 'version', 'lost image', 'other pixels', 'another image', 'moved image'])
def test_a_data_set_that_differs_is_replaced_only_with_overwrite(root, tmp_path, monkeypatch, change):
    other = tiny(tmp_path / 'shapes-cls')
    image, kwargs = other / 'train' / 'star' / '000003.png', {}
    if change == 'seed':
        kwargs = dict(config=ShapesConfig(size=32, min_object=0.4, max_object=0.9, noise=0))
    elif change == 'version':
        monkeypatch.setattr(shapes_cls, 'VERSION', shapes_cls.VERSION + 1)
    elif change == 'lost image':
        image.unlink()
    elif change == 'other pixels':
        image.write_bytes((other / 'train' / 'star' / '000009.png').read_bytes())
    elif change == 'another image':
        (other / 'train' / 'star' / 'x.png').write_bytes(image.read_bytes())
    else:
        image.rename(other / 'train' / 'ring' / image.name)
    before = digest(other)
    with pytest.raises(ShapesError, match='--overwrite'):
        make_shapes_cls(other, TRAIN, VAL, size=32, seed=3, **kwargs)
    assert digest(other) == before
    if change in ('another image', 'moved image'):  # not of the data set: it may be somebody's
        with pytest.raises(ShapesError, match='not part of the dataset'):
            tiny(other, overwrite=True)
        assert digest(other) == before
        return
    tiny(other, overwrite=True)
    if change != 'version':
        assert digest(other) == digest(root)
    assert [path.name for path in tmp_path.iterdir()] == ['shapes-cls']


@pytest.mark.parametrize('overwrite', [False, True])
@pytest.mark.parametrize('content', ['photos', 'detection data'])
def test_a_foreign_folder_is_never_touched(tmp_path, overwrite, content):
    folder = tmp_path / 'data'
    if content == 'photos':
        folder.mkdir()
        (folder / 'holiday.jpg').write_bytes(b'precious')
    else:
        make_shapes(folder, 1, 1, size=64)
    before = digest(folder)
    with pytest.raises(ShapesError, match='not a shapes-cls dataset'):
        tiny(folder, overwrite=overwrite)
    assert digest(folder) == before


def test_after_a_killed_run_the_next_one_completes_and_clears_up(root, tmp_path):
    command = [str(SCRIPT), '--classification', '--train', '100000', '--val', '6', '--out', str(tmp_path / 'data')]
    process = warm.Popen([sys.executable, *command], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob('.data.new-*/train/ring/*.png')):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    (part,) = tmp_path.iterdir()
    os.utime(part, (1, 1))
    try:
        handle = os.open(part, os.O_RDONLY)
        with pytest.raises(BlockingIOError):  # of a living process: nobody's to remove
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(handle)
        make_shapes_cls(tmp_path / 'data', 6, 6, size=32)
        assert part.is_dir()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    os.utime(part, (1, 1))
    assert digest(tiny(tmp_path / 'data', overwrite=True)) == digest(root)
    assert [path.name for path in tmp_path.iterdir()] == ['data']


@pytest.mark.parametrize('existing', [False, True])
def test_an_interrupted_run_leaves_nothing_behind(tmp_path, monkeypatch, existing):
    target = tmp_path / 'shapes-cls'
    before = digest(make_shapes_cls(target, 6, 6, size=32)) if existing else None

    def interrupt(cfg, seed, split, index):
        if split == 'val':
            raise KeyboardInterrupt
        return render_image(cfg, seed, split, index)

    monkeypatch.setattr(shapes_cls, 'render_image', interrupt)
    with pytest.raises(KeyboardInterrupt):
        tiny(target, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == (['shapes-cls'] if existing else [])
    if existing:
        assert digest(target) == before


# ----------------------------------------------------------------------------------------------- arguments, command


@pytest.mark.parametrize('kwargs', [dict(num_train=5), dict(num_val=5), dict(seed=-1), dict(size=16)])
def test_arguments_out_of_range_are_named(tmp_path, kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        make_shapes_cls(tmp_path / 'data', **kwargs)
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_it_wrote_and_fails_with_one_line(tmp_path, capsys):
    command = ['--classification', '--out', str(tmp_path / 'data'), '--train', '12', '--val', '6', '--size', '32']
    assert main(command) == 0
    out, _ = capsys.readouterr()
    assert 'shapes-cls dataset' in out and '12 images' in out and '6 images' in out
    assert main([*command, '--seed', '1']) == 2
    out, err = capsys.readouterr()
    assert out == '' and err.count('\n') == 1 and '--overwrite' in err
    assert main([*command, '--seed', '1', '--overwrite']) == 0
    capsys.readouterr()
    assert main([*command[:3], '--val', '5']) == 2
    assert 'num_val must be at least 6' in capsys.readouterr().err


def test_hard_images_have_a_folder_of_their_own_and_are_of_classification(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(['--classification', '--hard', '--train', '6', '--val', '6']) == 0
    easy = make_shapes_cls(tmp_path / 'data' / 'shapes-cls', 6, 6)
    hard = make_shapes_cls(tmp_path / 'own', 6, 6, config=SHAPES_CLS_HARD)
    assert digest(tmp_path / 'data' / 'shapes-cls-hard') == digest(hard) != digest(easy)
    with pytest.raises(SystemExit):
        main(['--hard'])
    assert '--hard is for --classification' in capsys.readouterr().err


def test_the_folder_that_a_config_lacks_is_named_with_the_options_that_write_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, options in (('shapes-cls', '--classification'), ('shapes-cls-hard', '--classification --hard')):
        said = problems_of(dict(type='ImageFolder', data_root=f'data/{name}/'))[0]
        assert f'{options} generates it' in said
    assert 'generates' not in problems_of(dict(type='ImageFolder', data_root='data/others'))[0]
