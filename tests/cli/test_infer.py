"""tools/infer.py: the detections of a test, on images and videos of no data set; what it refuses and never replaces."""

import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.apis import DetInferencer
from PIL import Image
from pycocotools import mask as rle_codec

from helpers import tiny
from mmdet_norms.cli import export, infer, test, weights
from mmdet_norms.engine.inference import displayable
from mmdet_norms.engine.pictures import MARK


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    """A folder with a config, its data, the checkpoint of a model, and the same fused."""
    folder = tmp_path_factory.mktemp('detector')
    config = tiny.write_config(folder, "model['roi_head']['bbox_head']['init_cfg'] = None\n")
    torch.manual_seed(0)
    model = weights.built(weights.read_config(str(config)).model, device='cpu')
    for module in model.modules():  # so that folding changes weights
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1), module.running_var.uniform_(0.5, 2)
    meta = dict(dataset_meta=dict(classes=tiny.CLASSES, palette=[(0, 0, 255), (0, 255, 0)]))
    torch.save(dict(meta=meta, state_dict=model.state_dict()), folder / 'mine.pth')
    export.main([str(config), str(folder / 'mine.pth'), str(folder / 'fused.pth')])
    return folder


def run(folder, *arguments, checkpoint='mine.pth'):
    infer.main([str(folder / 'tiny.py'), str(folder / checkpoint), *map(str, arguments)])


def read(out):
    return json.loads((Path(out) / 'detections.json').read_text())


def fails(capsys, folder, *arguments, **options):
    with pytest.raises(SystemExit) as stopped:
        run(folder, *arguments, **options)
    assert stopped.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
    assert len(said) == 1
    return said[0]


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob('*') if p.is_file() and p.name != MARK)


@pytest.mark.parametrize('checkpoint, fuse', [('mine.pth', []), ('mine.pth', ['--fuse']), ('fused.pth', [])])
def test_detections_are_those_of_a_test(detector, tmp_path, checkpoint, fuse):
    common = [str(detector / 'tiny.py'), str(detector / checkpoint), *fuse]
    test.main([*common, '--work-dir', str(tmp_path), '--out', str(tmp_path / 'tested.json')])
    run(detector, detector / 'data/images', *fuse, '--out', tmp_path, '--score-thr', 0, checkpoint=checkpoint)
    tested = json.loads((tmp_path / 'tested.json').read_text())
    found = read(tmp_path)
    assert found['fused'] == (checkpoint == 'fused.pth' or bool(fuse)) and len(found['images']) == 4
    for number, image in enumerate(found['images'], 1):
        expected = sorted((e for e in tested if e['image_id'] == number), key=lambda e: -e['score'])
        assert len(image['detections']) == len(expected) > 3
        for one, other in zip(image['detections'], expected):
            x, y, width, height = other['bbox']
            assert one['box'] == pytest.approx([x, y, x + width, y + height], abs=0.02)
            assert one['score'] == pytest.approx(other['score'], abs=2e-6)
            assert one['label'] + 1 == other['category_id'] and one['class'] == tiny.CLASSES[one['label']]
            assert one['mask'] == other['segmentation'] and rle_codec.decode(one['mask']).shape == (64, 64)


def test_the_python_version_of_the_readme_finds_the_same(detector, tmp_path):
    image = str(detector / 'data/images/000.png')
    inferencer = DetInferencer(str(detector / 'tiny.py'), str(detector / 'mine.pth'), device='cpu', show_progress=False)
    theirs = inferencer(image)['predictions'][0]
    run(detector, image, '--out', tmp_path, '--score-thr', 0)
    ours = read(tmp_path)['images'][0]['detections']
    assert [d['score'] for d in ours] == pytest.approx(sorted(theirs['scores'], reverse=True), abs=2e-6)
    assert len(ours) == len(theirs['labels']) > 3


@pytest.fixture
def photos(detector, tmp_path):
    """One image in many forms, in a folder with a sub-folder."""
    folder = tmp_path / 'photos'
    (folder / 'sub').mkdir(parents=True)
    image = Image.open(detector / 'data/images/000.png').convert('RGB')
    for mode, name in (
        ('L', 'grey.png'),
        ('CMYK', 'cmyk.jpg'),
        ('RGBA', 'alpha.png'),
        ('L', 'a.pgm'),
        ('1', 'bit.png'),
    ):
        image.convert(mode).save(folder / name)
    exif = image.getexif()
    exif[0x0112] = 6
    image.resize((64, 32)).save(folder / 'turned.jpg', exif=exif)
    cv2.imwrite(str(folder / 'deep.png'), np.asarray(image).astype(np.uint16) * 257)
    image.save(folder / 'sub' / 'grey.png')
    (folder / 'notes.txt').write_text('no image')
    return folder


def test_images_of_every_kind_are_drawn_at_their_places(detector, photos, tmp_path):
    run(detector, photos, '--out', tmp_path / 'out', '--score-thr', 0.3)
    names = ['a.pgm.png', 'alpha.png', 'bit.png', 'cmyk.jpg', 'deep.png', 'grey.png', 'sub/grey.png', 'turned.jpg']
    assert files(tmp_path / 'out') == sorted([*names, 'detections.json'])
    sizes = {os.path.basename(i['file']): (i['width'], i['height']) for i in read(tmp_path / 'out')['images']}
    assert sizes['turned.jpg'] == (32, 64) == Image.open(tmp_path / 'out/turned.jpg').size
    assert all(picture in names for picture in (i['picture'] for i in read(tmp_path / 'out')['images']))
    assert all(d['score'] >= 0.3 for i in read(tmp_path / 'out')['images'] for d in i['detections'])


def test_what_cannot_be_read_is_a_warning_and_the_status(detector, photos, tmp_path, capsys):
    whole = photos / 'whole.jpg'
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)).save(whole)
    (photos / 'cut.jpg').write_bytes(whole.read_bytes()[:-9000])
    (photos / 'empty.png').touch()
    (photos / 'text.jpg').write_text('no image')
    Image.new('RGB', (3000, 2)).save(photos / 'thin.png')
    with pytest.raises(SystemExit) as stopped:
        run(detector, photos, '--out', tmp_path / 'out', '--batch-size', 3)
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and 'error: 4 of 13 files' in said
    for name in ('cut.jpg', 'empty.png', 'text.jpg', 'thin.png'):
        assert said.count(f'warning: {photos / name}: ') == 1
    assert {os.path.basename(f['file']) for f in read(tmp_path / 'out')['failed']} == {
        'cut.jpg',
        'empty.png',
        'text.jpg',
        'thin.png',
    }
    assert 'fails at 3000 x 2 pixels' in said
    assert 'image file is truncated' in said and 'is an empty file' in said
    assert len(read(tmp_path / 'out')['images']) == 9 and 'text.jpg' not in files(tmp_path / 'out')
    assert 'the file could not be read' in fails(capsys, detector, photos / 'text.jpg', '--out', tmp_path / 'other')


def test_pictures_may_be_drawn_again_whatever_their_names(detector, tmp_path):
    image = tmp_path / 'two\nlines [1].png'
    shutil.copy(detector / 'data/images/000.png', image)
    for _ in range(2):
        run(detector, image, '--out', tmp_path / 'out')
    assert image.name in files(tmp_path / 'out')


def test_files_folders_and_patterns_are_taken_once(detector, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    run(detector, 'sub/grey.png', './sub', '*.png', 'grey.png', '--out', 'out', '--no-pictures')
    names = [image['file'] for image in read('out')['images']]
    assert names == ['sub/grey.png', 'alpha.png', 'bit.png', 'deep.png', 'grey.png']
    run(detector, '.', '--out', 'drawn', '--no-json')
    assert files('drawn') == [
        str(p.with_name('a.pgm.png') if p.name == 'a.pgm' else p) for p in sorted(map(Path, files('drawn')))
    ]
    run(detector, '.', '--out', 'drawn')  # of its own pictures none is taken for an image
    assert len(read('drawn')['images']) == 8


def test_no_file_of_the_user_is_replaced(detector, photos, tmp_path, capsys):
    before = {path: path.read_bytes() for path in photos.rglob('*.*') if path.is_file()}
    assert 'is an input' in fails(capsys, detector, photos, '--out', photos)
    assert 'is an input' in fails(capsys, detector, photos / 'sub/grey.png', '--out', photos / 'sub')
    assert 'which no run has drawn' in fails(capsys, detector, photos / 'sub/grey.png', '--out', photos)
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/detections.json').write_text('[]')
    assert 'did not write' in fails(capsys, detector, photos, '--out', tmp_path / 'out')
    shutil.copy(photos / 'deep.png', tmp_path / 'other.png')
    run(detector, tmp_path / 'other.png', '--out', photos)  # among images, but of a name of its own
    assert 'which no run has drawn' in fails(capsys, detector, photos / 'sub/grey.png', '--out', photos)
    run(detector, tmp_path / 'other.png', '--out', photos)
    assert before == {path: path.read_bytes() for path in before}
    assert 'is a file' in fails(capsys, detector, photos, '--out', photos / 'notes.txt')


@pytest.fixture
def video(tmp_path):
    path = tmp_path / 'clip.avi'
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), 5, (64, 48))
    noise = np.random.default_rng(0)
    for _ in range(5):
        writer.write(noise.integers(0, 255, (48, 64, 3), np.uint8))
    writer.release()
    return path


def test_a_video_becomes_a_video_and_detections_by_frame(detector, video, tmp_path):
    run(
        detector,
        video,
        detector / 'data/images/001.png',
        '--out',
        tmp_path / 'out',
        '--batch-size',
        2,
        '--score-thr',
        0,
    )
    (entry,) = read(tmp_path / 'out')['videos']
    assert [frame['frame'] for frame in entry['frames']] == list(range(5)) and entry['fps'] == 5
    assert all(frame['detections'] for frame in entry['frames']) and len(read(tmp_path / 'out')['images']) == 1
    drawn = cv2.VideoCapture(str(tmp_path / 'out' / entry['video']))
    assert [drawn.get(key) for key in (cv2.CAP_PROP_FRAME_COUNT, cv2.CAP_PROP_FRAME_WIDTH)] == [5, 64]


def test_a_video_that_cannot_be_read_leaves_no_file(detector, video, tmp_path, capsys):
    cut = tmp_path / 'cut.avi'
    cut.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    (tmp_path / 'bad.mp4').write_bytes(b'no video')
    with pytest.raises(SystemExit) as stopped:
        run(detector, cut, tmp_path / 'bad.mp4', '--out', tmp_path / 'out')
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and f'{tmp_path / "bad.mp4"}: not a video' in said
    assert 'cut.avi: ends after' in said
    found = len(read(tmp_path / 'out')['videos'][0]['frames'])
    assert 0 < found < 5 and 'bad.mp4' not in files(tmp_path / 'out')


@pytest.mark.parametrize(
    'arguments, said',
    [
        (['nowhere.png'], 'there is no image, video or folder nowhere.png'),
        (['0'], 'cameras are not read'),
        (['rtsp://camera/1'], 'addresses and streams are not read'),
        (['*.xyz'], 'no file has a name of this pattern'),
        (['.'], 'there is no image in this folder'),
        (['clip.avi', '--device', 'cuda:77'], '--device cuda:77'),
        (['clip.avi', '--device', 'gpu'], '--device gpu'),
        (['clip.avi', '--out', ''], '--out'),
        (['clip.avi', '--score-thr', 'nan'], '--score-thr nan: must be between 0 and 1'),
        (['clip.avi', '--score-thr', '30'], '--score-thr 30.0: must be between 0 and 1'),
        (['clip.avi', '--cfg-options', 'model.test_cfg.rcnn.socre_thr=0.1'], 'score_thr'),
        (['clip.avi', '--norm', 'mabn'], 'does not fit the model'),
    ],
)
def test_a_mistake_is_one_message(detector, video, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    arguments = arguments if '--out' in arguments else [*arguments, '--out', 'out']
    assert said in fails(capsys, detector, *arguments)
    assert not (tmp_path / 'out').exists()


def test_a_folder_of_videos_says_how_to_name_them(detector, video, tmp_path, capsys):
    assert f'are to be named, e.g. {video}' in fails(capsys, detector, tmp_path, '--out', tmp_path / 'out')


def test_classes_are_those_of_the_checkpoint(detector, tmp_path):
    cfg = weights.read_config(str(detector / 'tiny.py')).model
    cfg.roi_head.bbox_head.num_classes = cfg.roi_head.mask_head.num_classes = 3
    meta = dict(dataset_meta=dict(classes=('disk', '[/b]', 'a\nb'), palette='random'))
    torch.save(dict(meta=meta, state_dict=weights.built(cfg, device='cpu').state_dict()), tmp_path / 'three.pth')
    image = detector / 'data/images/000.png'
    run(detector, image, '--out', tmp_path / 'out', '--score-thr', 0, checkpoint=tmp_path / 'three.pth')
    assert read(tmp_path / 'out')['classes'] == ['disk', '[/b]', 'a\nb']
    found = read(tmp_path / 'out')['images'][0]['detections']
    assert found and {d['class'] for d in found} <= {'disk', '[/b]', 'a\nb'}


@pytest.mark.parametrize('channels', [1, 3, 4])
@pytest.mark.parametrize('dtype, top', [(np.uint8, 255), (np.uint16, 65535), (np.float32, 255)])
def test_whatever_was_read_can_be_shown(channels, dtype, top):
    image = np.zeros((4, 5, channels), dtype)
    image[..., 0] = top  # blue, or grey
    shown = displayable(image)
    assert shown.dtype == np.uint8 and shown.shape == (4, 5, 3)
    assert shown[0, 0].tolist() == ([255, 255, 255] if channels == 1 else [0, 0, 255])
    assert displayable(image[..., 0]).tolist() == np.full((4, 5, 3), 255).tolist()
