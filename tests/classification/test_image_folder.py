"""Which images and classes ImageFolder finds, and what it says where it finds none."""

import os
import pickle
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS
from PIL import Image
from torch.utils.data import DataLoader

from helpers.digits import write_digits
from mmdet_norms.classification import ImageFolder, classes_of_entry, image_folders, problems_of
from mmdet_norms.errors import UserError

PIPELINE = [dict(type='LoadImageFromFile'), dict(type='PackClsInputs')]


def write(path, size=(6, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(path, 'PNG')


@pytest.fixture
def root(tmp_path):
    """Two classes of two images each, in train and val."""
    for split in ('train', 'val'):
        for name in ('cat', 'dog'):
            for number in range(2):
                write(tmp_path / 'data' / split / name / f'{number}.png')
    return tmp_path / 'data'


def entry(root, **options):
    return dict(type='ImageFolder', data_root=str(root), **options)


def found(data):
    return [(Path(image['img_path']).relative_to(data.folder).as_posix(), image['gt_label']) for image in data]


def test_labels_are_the_places_of_the_sorted_names(root):
    data = ImageFolder(str(root))
    assert found(data) == [('cat/0.png', 0), ('cat/1.png', 0), ('dog/0.png', 1), ('dog/1.png', 1)]
    assert data.metainfo == dict(classes=('cat', 'dog'))
    assert classes_of_entry(entry(root)) == ('cat', 'dog') and problems_of(entry(root)) == []


def test_files_of_every_spelling_and_depth_but_hidden_ones(root):
    for name in ('A.JPEG', 'b.JpG', 'c.webp', 'deep/er/d.png', 'two.dots.PNG', 'with space.bmp'):
        write(root / 'train' / 'ape' / name)
    for name in ('ape/.hidden.png', 'ape/._A.JPEG', 'ape/notes.txt', 'ape/.cache/e.png', '.ipynb_checkpoints/f.png'):
        write(root / 'train' / name)
    (root / 'train' / 'ape' / 'folder.png').mkdir()
    (root / 'train' / 'README.png').touch()  # not in a folder of a class
    names = ['A.JPEG', 'b.JpG', 'c.webp', 'deep/er/d.png', 'two.dots.PNG', 'with space.bmp']
    data = ImageFolder(str(root))
    assert found(data)[:6] == [(f'ape/{name}', 0) for name in names]
    assert data.metainfo['classes'] == ('ape', 'cat', 'dog')


def test_links_are_followed_once(root, tmp_path):
    write(tmp_path / 'elsewhere' / 'x.png')
    os.symlink(tmp_path / 'elsewhere', root / 'train' / 'ape')  # a class
    os.symlink(root / 'train' / 'cat' / '0.png', tmp_path / 'elsewhere' / 'y.png')  # an image
    os.symlink(tmp_path / 'elsewhere', tmp_path / 'elsewhere' / 'circle')
    assert [name for name, label in found(ImageFolder(str(root))) if label == 0] == ['ape/x.png', 'ape/y.png']


def test_images_are_listed_without_asking_for_each(root, monkeypatch):
    asked, stat = [], os.stat
    monkeypatch.setattr(os, 'stat', lambda path, *a, **k: asked.append(str(path)) or stat(path, *a, **k))
    assert len(ImageFolder(str(root))) == 4
    assert not [path for path in asked if path.endswith('.png')]


def test_a_class_without_images_in_val_moves_no_label(root, monkeypatch):
    said = []
    monkeypatch.setattr('mmdet_norms.classification.image_folder.print_log', lambda text, **_: said.append(text))
    shutil.rmtree(root / 'val' / 'cat')
    data = ImageFolder(str(root), split='val')
    assert data.metainfo['classes'] == ('cat', 'dog') and {label for _, label in found(data)} == {1}
    assert said == [f"{root}/val has no folder of 'cat'"]
    assert problems_of(entry(root, split='val')) == []


def test_classes_of_ones_own(root):
    data = ImageFolder(str(root), metainfo=dict(classes=['dog', 'cat']))
    assert found(data)[0] == ('dog/0.png', 0) and list(data.metainfo['classes']) == ['dog', 'cat']
    assert found(ImageFolder(str(root), metainfo=dict(classes=['dog']))) == [('dog/0.png', 0), ('dog/1.png', 0)]
    names = root / 'names.txt'
    names.write_text('dog\ncat\n')
    assert classes_of_entry(entry(root, metainfo=dict(classes=str(names)))) == ('dog', 'cat')


def test_val_alone_has_its_own_classes(root):
    shutil.rmtree(root / 'train')
    assert classes_of_entry(entry(root, split='val')) == ('cat', 'dog')
    assert len(ImageFolder(str(root), split='val')) == 4


@pytest.mark.parametrize('labels', ['0 1', 'cat dog'])
def test_a_flat_folder_with_a_file_of_labels(root, labels):
    cat, dog = labels.split()
    for name in ('a.png', 'b c.png', 'd.png'):
        write(root / 'flat' / name)
    (root / 'meta').mkdir()
    (root / 'meta' / 'val.txt').write_bytes(f'd.png {dog}\r\n\nb c.png {cat}\na.png\t{dog}'.encode())
    data = ImageFolder(str(root), split='flat', ann_file='meta/val.txt')
    assert found(data) == [('d.png', 1), ('b c.png', 0), ('a.png', 1)]
    assert data.metainfo['classes'] == ('cat', 'dog')


def test_classes_named_by_numbers(tmp_path):
    for name in ('1', '2', '10'):  # sorted: 1, 10, 2
        write(tmp_path / 'train' / name / '0.png')
    write(tmp_path / 'val' / 'x.png')
    for text, label in (('x.png 2', 2), ('x.png 10', 1), ('x.png 0', 0), ('x.png 0\nx.png 1', 0)):
        (tmp_path / 'val.txt').write_text(text)
        assert found(ImageFolder(str(tmp_path), split='val', ann_file='val.txt'))[0] == ('x.png', label)


def no_root(root):
    return dict(data_root='')


def other_root(root):
    return dict(data_root=str(root / 'nowhere'))


def folder_above(root):
    return dict(data_root=str(root.parent))


def folder_below(root):
    return dict(data_root=str(root / 'train'))


def other_split(root):
    return dict(split='valid')


def no_folders(root):
    shutil.rmtree(root)
    write(root / 'train' / 'x.png')
    return {}


def flat_val(root):
    shutil.rmtree(root / 'val')
    write(root / 'val' / 'x.png')
    return dict(split='val')


def empty_class(root):
    (root / 'train' / 'eel' / 'sub').mkdir(parents=True)
    (root / 'train' / 'eel' / 'notes.txt').touch()
    return {}


def class_of_val_alone(root):
    write(root / 'val' / 'eel' / '0.png')
    return dict(split='val')


def classes_as_text(root):
    return dict(metainfo=dict(classes='cat'))


def classes_as_number(root):
    return dict(metainfo=dict(classes=2))


def class_twice(root):
    return dict(metainfo=dict(classes=['cat', 'dog', 'cat']))


def classes_of_others(root):
    return dict(metainfo=dict(classes=['ant', 'bee']))


def no_labels(root):
    return dict(ann_file='meta.txt')


def labels_are(text):
    def write_labels(root):
        (root / 'meta.txt').write_text(text)
        return dict(ann_file='meta.txt')

    return write_labels


@pytest.mark.parametrize(
    'break_it, says',
    [
        (no_root, "data_root='': there is no such folder; write the one that holds train/ and val/"),
        (other_root, "data_root='{root}/nowhere': there is no such folder; write the one that holds train/ and val/"),
        (
            folder_above,
            "split='train': there is no such folder in data_root='{above}'; did you mean data_root='{root}'?",
        ),
        (
            folder_below,
            "split='train': there is no such folder in data_root='{root}/train'; did you mean data_root='{root}'?",
        ),
        (other_split, "split='valid': there is no such folder in data_root='{root}'; it has 'train', 'val'"),
        (no_folders, "data_root='{root}': neither train/ nor train/ holds folders of classes"),
        (flat_val, "split='val': {root}/val has no folders of classes; for a flat one write ann_file"),
        (
            empty_class,
            "split='train': no image (.jpg, .jpeg, ",
        ),
        (
            class_of_val_alone,
            "split='val': 'eel' in {root}/val is no class of train/; rename or delete it (the classes: ",
        ),
        (classes_as_text, "metainfo.classes='cat' is no list of names; write ('cat', 'dog')"),
        (classes_as_number, "metainfo.classes=2 is no list of names; write ('cat', 'dog')"),
        (class_twice, "metainfo.classes names 'cat' twice"),
        (classes_of_others, "metainfo.classes='ant', 'bee': none is a folder of {root}/train: 'cat', 'dog'"),
        (no_labels, "ann_file='{root}/meta.txt': No such file or directory"),
        (
            labels_are('cat/0.png 2'),
            "ann_file='{root}/meta.txt', line 1: 'cat/0.png 2' must be NAME LABEL, with a label of",
        ),
        (labels_are('cat/0.png 0\n490'), "ann_file='{root}/meta.txt', line 2: '490' must be NAME LABEL"),
        (
            labels_are('cat/0.png cat\nx.png dog'),
            "ann_file='{root}/meta.txt': names 'x.png', not there in {root}/train",
        ),
        (labels_are('\n'), "ann_file='{root}/meta.txt': is empty"),
    ],
)
def test_bad_data_are_one_error_that_names_key_and_value(root, break_it, says):
    options = {**entry(root), **break_it(root)}
    says = says.format(root=root, above=root.parent)
    [problem] = problems_of(options, 'val_dataloader.dataset')
    assert problem.startswith(f'val_dataloader.dataset.{says}')
    with pytest.raises(UserError) as error:
        DATASETS.build(options)
    assert str(error.value).startswith(f'ImageFolder: {says}')


@pytest.mark.parametrize('kind', ['float32', 'int32'])
def test_pixels_that_opencv_reads_not_as_colours_are_said(root, kind):
    path = root / 'train' / 'cat' / '0.tif'
    Image.fromarray(np.zeros((8, 8), kind)).save(path)
    with pytest.raises(UserError, match=f'{re.escape(str(path))} has pixels that OpenCV does not read as colours'):
        list(ImageFolder(str(root), pipeline=PIPELINE))


def test_a_list_of_images_may_have_a_byte_order_mark_and_names_of_any_bytes(root):
    name = os.fsdecode(b'\xe9.png')
    write(root / 'train' / name)
    (root / 'meta.txt').write_bytes(b'\xef\xbb\xbf\xe9.png dog\n')
    [image] = ImageFolder(str(root), ann_file='meta.txt').load_data_list()
    assert image == dict(img_path=str(root / 'train' / name), gt_label=1)


def test_names_that_no_terminal_can_show(root):
    name = os.fsdecode(b'\xff\x1b[31m')  # no UTF-8, and an escape sequence
    write(root / 'val' / name / 'x.png')
    write(root / name / 'x.png')
    problems = problems_of(entry(root, split='val')) + problems_of(entry(root, split=name))
    path = root / 'train' / 'cat' / f'{name}.png'
    a_text(path)
    with pytest.raises(UserError) as error:
        ImageFolder(str(root), pipeline=PIPELINE)[2]
    for text in (*problems, str(error.value)):
        assert text.isprintable() and '\\udcff' in text and text.encode()


def test_several_problems_of_a_folder_are_told_together(root):
    empty_class(root)
    class_of_val_alone(root)
    (root / 'val' / 'cat' / '0.png').unlink()
    (root / 'val' / 'cat' / '1.png').unlink()
    assert len(problems_of(entry(root, split='val'))) == 1  # eel is a class now, without images in train
    shutil.rmtree(root / 'train' / 'eel')
    assert len(problems_of(entry(root, split='val'))) == 2


def test_rare_classes_can_be_repeated(root):
    (root / 'train' / 'dog' / '1.png').unlink()
    cfg = dict(type='ClassBalancedDataset', oversample_thr=0.5, dataset=entry(root))
    assert [image['gt_label'] for image in DATASETS.build(cfg)] == [0, 0, 1, 1]


def test_entries_are_found_through_wrappers(root):
    inner = entry(root)
    cfg = dict(train_dataloader=dict(dataset=dict(type='RepeatDataset', times=2, dataset=inner)), other=dict(type='X'))
    assert list(image_folders(cfg, 'train', 'val')) == [('train', 'train_dataloader.dataset.dataset', inner)]
    assert problems_of(dict(type='CocoDataset', data_root='nowhere')) == []


# ------------------------------------------------------------------------------------------------ files


def a_text(path):
    path.write_text('no image')


def nothing(path):
    path.write_bytes(b'')


def half(path):
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def a_broken_link(path):
    path.symlink_to('nowhere')


@pytest.mark.parametrize('backend', ['cv2', 'pillow'])
@pytest.mark.parametrize('suffix', ['.jpg', '.png', '.webp'])
@pytest.mark.parametrize(
    'damage, says',
    [
        (a_text, 'is not an image that can be read'),
        (nothing, 'is an empty file'),
        (half, ('cannot be decoded', 'is not an image')),
        (a_broken_link, 'is not there'),
    ],
)
def test_a_file_that_is_no_image_is_named(root, damage, says, suffix, backend):
    path = root / 'train' / 'cat' / f'9{suffix}'
    damage(path)
    data = ImageFolder(str(root), pipeline=[dict(type='LoadImageFromFile', imdecode_backend=backend), PIPELINE[1]])
    assert data[0]['inputs'].shape == (3, 6, 8)
    with pytest.raises(UserError) as error:
        data[2]
    text = str(error.value).removeprefix(f'{path} ')
    assert text.startswith(says) and text.endswith('; replace or delete the file')


def test_a_jpeg_that_was_cut_off_is_named_whoever_reads_it(root):
    half(root / 'train' / 'cat' / '9.jpg')
    data = ImageFolder(str(root), pipeline=[lambda results: 'black'])  # as OpenCV 4.10
    assert data[0] == 'black'
    with pytest.raises(UserError, match='cannot be decoded'):
        data[2]


def test_a_jpeg_with_more_behind_it_is_whole(root):
    path = root / 'train' / 'cat' / '9.jpg'
    cv2.imwrite(str(path), np.zeros((6, 8, 3), np.uint8))
    path.write_bytes(path.read_bytes() + bytes(50))
    assert ImageFolder(str(root), pipeline=PIPELINE)[2]['inputs'].shape == (3, 6, 8)


def test_whole_images_are_decoded_once(root, monkeypatch):
    cv2.imwrite(str(root / 'train' / 'cat' / '9.jpg'), np.zeros((6, 8, 3), np.uint8))
    monkeypatch.setattr('mmdet_norms.classification.image_folder.decode', None)
    assert [image['inputs'].shape for image in ImageFolder(str(root), pipeline=PIPELINE)] == [(3, 6, 8)] * 5


def test_a_worker_gives_the_same_error(root):
    a_text(root / 'train' / 'cat' / '9.jpg')
    loader = DataLoader(
        ImageFolder(str(root), pipeline=PIPELINE), batch_size=5, num_workers=1, collate_fn=pseudo_collate
    )
    with pytest.raises(UserError) as error:
        next(iter(loader))
    path = root / 'train' / 'cat' / '9.jpg'
    assert str(error.value) == f'{path} is not an image that can be read; replace or delete the file'


def test_an_error_of_the_pipeline_stays_what_it_is(root):
    with pytest.raises(ZeroDivisionError):
        ImageFolder(str(root), pipeline=[lambda results: 1 / 0])[0]


def test_images_of_every_kind_have_three_channels(tmp_path):
    rng = np.random.default_rng(0)
    grey = np.kron(rng.integers(0, 256, (3, 4)), np.ones((8, 8))).astype(np.uint8)
    colour = np.kron(rng.integers(0, 256, (3, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    folder = tmp_path / 'train' / 'x'
    folder.mkdir(parents=True)
    Image.fromarray(grey).save(folder / 'grey.jpg')
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / 'grey16.png')
    cv2.imwrite(str(folder / 'colour16.png'), colour[..., ::-1].astype(np.uint16) * 257)
    Image.fromarray(colour).convert('P', palette=Image.Palette.ADAPTIVE).save(folder / 'palette.png')
    Image.fromarray(colour).convert('CMYK').save(folder / 'cmyk.jpg', quality=100)
    Image.fromarray(np.dstack([colour, grey])).save(folder / 'alpha.png')
    Image.fromarray(grey > 127).save(folder / 'one_bit.png')
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by a quarter, clockwise
    Image.fromarray(np.rot90(colour)).save(folder / 'turned.jpg', exif=turned, quality=100, subsampling=0)
    data = ImageFolder(str(tmp_path), pipeline=PIPELINE)
    wanted = dict(grey=grey, grey16=grey, one_bit=(grey > 127) * 255)
    assert len(data) == 8
    for image in data:
        name = Path(image['data_samples'].img_path).stem
        expected = wanted.get(name, colour)
        expected = np.dstack([expected] * 3) if expected.ndim == 2 else expected
        read = image['inputs'].numpy().transpose(1, 2, 0)[..., ::-1]
        assert read.shape == (24, 32, 3), name
        assert np.abs(read.astype(int) - expected).mean() < 6, name


def test_digits_are_real_data(tmp_path):
    write_digits(tmp_path, train=60, val=30)
    data = ImageFolder(str(tmp_path), split='val', pipeline=PIPELINE)
    assert len(data) == 30 and data.metainfo['classes'] == tuple('0123456789')
    assert data[3]['inputs'].shape == (3, 32, 32) and int(data[3]['data_samples'].gt_label) == 2
    assert len(pickle.loads(pickle.dumps(data))) == 30
