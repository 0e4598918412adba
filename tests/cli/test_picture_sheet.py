"""tools/picture_sheet.py: what it reads, what it refuses, and what it never replaces."""

import json
from pathlib import Path

import cv2
import pytest
from pycocotools.coco import COCO

from helpers import tiny
from mmdet_norms.cli import picture_sheet
from mmdet_norms.engine.picture import is_sheet


@pytest.fixture
def made(tmp_path):
    """A config with its data, and detections that are the annotations, in COCO's format."""
    config = tiny.write_config(tmp_path)
    content = json.loads((tmp_path / 'data' / 'annotations.json').read_text())
    coco = COCO(str(tmp_path / 'data' / 'annotations.json'))
    entries = []
    for annotation in content['annotations']:
        rle = coco.annToRLE(annotation)
        counts = rle['counts'].decode() if isinstance(rle['counts'], bytes) else rle['counts']
        entry = {key: annotation[key] for key in ('image_id', 'category_id', 'bbox')}
        entries.append(dict(entry, score=0.9, segmentation=dict(size=rle['size'], counts=counts)))
    results = tmp_path / 'results.json'
    results.write_text(json.dumps(entries))
    return config, results, entries


def draw(made, out, *more):
    picture_sheet.main([str(made[0]), str(made[1]), '--out', str(out), *map(str, more)])


def refused(capsys, made, out, *more):
    with pytest.raises(SystemExit) as end:
        draw(made, out, *more)
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.startswith('error: ') and message.count('\n') == 1
    return message


@pytest.mark.parametrize('suffix', ['.png', '.jpg', '.JPEG'])
def test_a_sheet_is_drawn_from_cocos_format_and_may_be_drawn_again(made, suffix, tmp_path):
    out = tmp_path / 'new' / f'sheet{suffix}'
    for _ in range(2):
        draw(made, out)
        assert is_sheet(out) and cv2.imread(str(out)).shape[1] > 500


@pytest.mark.parametrize('suffix', ['', '.svg', '.tiff'])
def test_an_unknown_format_is_named(made, suffix, tmp_path, capsys):
    assert 'name the picture *.png or *.jpg' in refused(capsys, made, tmp_path / f'sheet{suffix}')


@pytest.mark.parametrize('num', [0, -1])
def test_the_number_of_images_is_positive(made, num, tmp_path, capsys):
    assert f'--num {num}: must be at least 1' in refused(capsys, made, tmp_path / 'a.png', '--num', num)


def test_nothing_but_a_sheet_is_replaced(made, tmp_path, capsys):
    mine = tmp_path / 'mine.png'
    cv2.imwrite(str(mine), cv2.imread(str(tmp_path / 'data' / 'images' / '000.png')))
    before = mine.read_bytes()
    assert 'is there and no picture sheet' in refused(capsys, made, mine)
    assert mine.read_bytes() == before
    draw(made, mine, '--overwrite')
    assert is_sheet(mine)


@pytest.mark.parametrize('name', ['000.png', '002.png'])  # the sheet shows the first only
def test_a_test_image_is_not_replaced_even_if_asked(made, name, tmp_path, capsys):
    image = tmp_path / 'data' / 'images' / name
    before = image.read_bytes()
    assert 'is a test image' in refused(capsys, made, image, '--overwrite', '--num', 1)
    assert image.read_bytes() == before


@pytest.mark.parametrize('names', [(1, 2), ('a\nb', '[/b]'), ('$x_{', '{0}')])
def test_names_of_classes_may_be_anything(made, names, tmp_path):
    path = tmp_path / 'data' / 'annotations.json'
    content = json.loads(path.read_text())
    for category, name in zip(content['categories'], names):
        category['name'] = name
    path.write_text(json.dumps(content))
    with made[0].open('a') as file:
        file.write(f"test_dataloader['dataset']['metainfo'] = dict(classes={names!r})\n")
    draw(made, tmp_path / 'a.png')
    assert is_sheet(tmp_path / 'a.png')


@pytest.mark.parametrize(
    'entries, said',
    [
        ('{', 'does not hold detections'),
        ('[1]', 'entry 0'),
        ('{"bbox_mAP": 0.5}', 'results.json of a work dir has the metrics'),
        ('[{"bbox": [1, 2, 3], "score": 1, "image_id": 1, "category_id": 1}]', 'entry 0'),
        ('[{"bbox": [1, 2, 3, 4], "score": "high", "image_id": 1, "category_id": 1}]', 'entry 0'),
        ('[{"bbox": [1, 2, 3, 4], "score": 1, "image_id": 99, "category_id": 1}]', 'not of the test data'),
        ('[{"bbox": [1, 2, 3, 4], "score": 1, "image_id": 1, "category_id": 9}]', 'not of the test data'),
        ('[{"bbox": [1, 2, 3, 4], "score": 1, "image_id": [1], "category_id": 1}]', 'entry 0'),
    ],
)
def test_what_is_no_list_of_detections_is_one_message(made, entries, said, tmp_path, capsys):
    made[1].write_text(entries)
    assert said in refused(capsys, made, tmp_path / 'a.png')


def test_an_image_that_is_gone_is_named(made, tmp_path, capsys):
    (tmp_path / 'data' / 'images' / '001.png').unlink()
    assert '001.png' in refused(capsys, made, tmp_path / 'a.png')


def test_the_inputs_are_not_replaced(made, tmp_path, capsys):
    link = tmp_path / 'link.png'
    link.symlink_to(made[1])
    before = Path(made[1]).read_bytes()
    assert 'is an input' in refused(capsys, made, link, '--overwrite')
    assert Path(made[1]).read_bytes() == before


def test_data_without_the_fields_that_exporters_leave_out_are_drawn(made, tmp_path):
    path = tmp_path / 'data' / 'annotations.json'
    content = json.loads(path.read_text())
    for annotation in content['annotations']:
        del annotation['area']
    path.write_text(json.dumps(content))
    draw(made, tmp_path / 'a.png')
    assert is_sheet(tmp_path / 'a.png')
