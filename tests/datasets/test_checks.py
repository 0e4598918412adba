"""Every kind of fault in the data is found before anything is built, and data without faults make no noise."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mmdet.registry import DATASETS
from mmengine.registry import DefaultScope
from PIL import Image
from pycocotools import mask as mask_utils

from helpers import small
from mmdet_norms.datasets import annotations
from mmdet_norms.datasets.checks import check_config
from mmdet_norms.datasets.columns import decompressed
from mmdet_norms.datasets.complete import Needs, complete

OPTION = 'train_dataloader.dataset'


@pytest.fixture(autouse=True)
def nothing_kept():
    annotations.forget()


def check(root, train=None, val=None, splits=('train', 'val'), full=False, **changes):
    """The report on two splits, of which ``train`` and ``val`` edit the files' content."""
    contents = {split: small.content(prefix=split) for split in ('train', 'val')}
    small.write(root, **contents)
    for split, edit in (('train', train), ('val', val)):
        replaced = edit(contents[split]) if edit is not None else None
        contents[split] = contents[split] if replaced is None else replaced
    for split, content in contents.items():
        small.dump(root, split, content)
    return check_config(small.config(root, **changes), splits, full)


def texts(report, level='error'):
    return '\n'.join(map(str, report.of(level)))


def each(kind, **values):
    """Set (or, for None, take out) keys of every entry of a list."""

    def edit(content):
        for entry in content[kind]:
            for key, value in values.items():
                entry.pop(key, None) if value is None else entry.__setitem__(key, value)

    return edit


def first(kind, **values):
    def edit(content):
        each(kind, **values)({kind: content[kind][:1]})

    return edit


def shift_categories(content):
    for annotation in content['annotations']:
        annotation['category_id'] -= 1


def corners(content):
    for a in content['annotations']:
        x, y, w, h = a['bbox']
        a['bbox'] = [x, y, x + w, y + h]
    # one in the lower right corner, as every data set has
    content['annotations'][0]['bbox'] = content['annotations'][2]['bbox'] = [25, 12, 38, 22]
    content['annotations'][4]['bbox'] = [20, 12, 38, 22]


def without_objects(content):
    content['annotations'] = []


def double_id(content):
    content['images'][1]['id'] = 1


def run_lengths(size, counts=None):
    total = small.WIDTH * small.HEIGHT

    def edit(content):
        for a in content['annotations']:
            a['segmentation'] = dict(size=size, counts=counts or [total - 20, 20])

    return edit


SIZE = [small.HEIGHT, small.WIDTH]
FAULTS = {
    'boxes outside': (each('annotations', bbox=[100, 100, 10, 10]), r'16? of|8 of 8 boxes lie outside their image'),
    'boxes to the right': (each('annotations', bbox=[small.WIDTH, 2, 5, 5]), r'8 of 8 boxes lie outside'),
    'boxes below': (each('annotations', bbox=[2, small.HEIGHT, 5, 5]), r'8 of 8 boxes lie outside'),
    'boxes to the left': (each('annotations', bbox=[-5, 2, 5, 5]), r'8 of 8 boxes lie outside'),
    'boxes above': (each('annotations', bbox=[2, -5, 5, 5]), r'8 of 8 boxes lie outside'),
    'boxes of nan': (first('annotations', bbox=[1, 2, float('nan'), 4]), r'bbox like \[1, 2, nan, 4\].*id 1'),
    'boxes of infinity': (first('annotations', bbox=[1, 2, float('inf'), 4]), r'bbox like'),
    'boxes of text': (each('annotations', bbox=['1', '2', '3', '4']), r"8 annotations have a bbox like \['1'"),
    'boxes of three': (first('annotations', bbox=[1, 2, 3]), r'bbox like \[1, 2, 3\]'),
    'boxes of None, no mask': (first('annotations', bbox=None, segmentation=None), r'bbox like None'),
    'boxes as fractions': (each('annotations', bbox=[0.1, 0.1, 0.5, 0.5]), r'fractions of the image'),
    'boxes as corners': (corners, r'look like corners'),
    'all crowd': (each('annotations', iscrowd=1), r'all 8 annotations have iscrowd=1'),
    'all ignored': (each('annotations', ignore=1), r'no object is left'),
    'odd crowd': (first('annotations', iscrowd='maybe'), r"iscrowd like 'maybe'"),
    'no objects': (without_objects, r'has no annotations'),
    'no list of objects': (lambda c: c.pop('annotations') and None, r'has no annotations'),
    'no images': (lambda c: c.update(images=[]), r'lists no images'),
    'no list of images': (lambda c: c.pop('images') and None, r"no list 'images'"),
    'no list of categories': (lambda c: c.pop('categories') and None, r"no list 'categories'"),
    'no categories': (lambda c: c.update(categories=[]), r'has no categories'),
    'a list': (lambda c: c['annotations'], r'holds a list where'),
    'objects are no dict': (lambda c: c['annotations'].append(3), r'entry 8 of annotations is 3'),
    'another image id': (each('annotations', image_id=99), r'image_id that images does not list \(99\)'),
    'no image id': (first('annotations', image_id=None), r'1 annotations have no image_id'),
    'another category id': (first('annotations', category_id=99), r'category_id that categories does not list \(99\)'),
    'no category id': (first('annotations', category_id=None), r'1 annotations have no category_id'),
    'a list as category id': (first('annotations', category_id=[1]), r'1 annotations have no category_id'),
    'categories off by one': (shift_categories, r'numbered from 1 to 3, the annotations from 0 to 2'),
    'two images of one id': (double_id, r'1 image ids are there twice'),
    'image ids of two kinds': (lambda c: c['images'].append(dict(c['images'][0], id='a')), r'some image ids are text'),
    'an image without id': (first('images', id=None), r'1 images have no id'),
    'an image without file': (first('images', file_name=None), r'1 images have no file_name'),
    'a wrong size': (first('images', width=44), r'1 images.* is 40 x 24, the file says 44 x 24.*id 1'),
    'swapped sizes': (each('images', width=small.HEIGHT, height=small.WIDTH), r'another size than the file says'),
    'a missing image': (first('images', file_name='nosuch.png'), r'1 of 4 image files are not there: .*nosuch\.png'),
    'backslashes': (first('images', file_name='a\\00.png'), r"Write file names with '/'"),
    'no masks': (each('annotations', segmentation=None), r'all 8 annotations have no segmentation'),
    'empty masks': (each('annotations', segmentation=[]), r'all 8 annotations have no segmentation'),
    'masks of two points': (each('annotations', segmentation=[[1, 2, 3, 4]]), r'segmentation that is no mask'),
    'masks of text': (each('annotations', segmentation='poly'), r'segmentation that is no mask'),
    'masks elsewhere': (each('annotations', segmentation=[[30, 15, 38, 15, 38, 22]]), r'masks looked at lie outside'),
    'run lengths of another size': (run_lengths([small.WIDTH, small.HEIGHT]), r'another size than their image'),
    'run lengths too short': (run_lengths(SIZE, [5, 6]), r'do not add up'),
    'run lengths of bytes': (run_lengths(SIZE, dict(a=1)), r'segmentation that is no mask'),
    'two categories of a name': (
        lambda c: c['categories'].append(dict(id=9, name='disc')),
        r'two categories of the name disc',
    ),
    'two categories of an id': (
        lambda c: c['categories'].append(dict(id=1, name='other')),
        r'two categories of the id 1',
    ),
    'a category without name': (first('categories', name=None), r'has no id or no name'),
    'a category less': (
        lambda c: c['categories'].pop() and None,
        r'lacks star: \(disc, box\), not \(disc, box, star\)',
    ),
    'another name': (first('categories', name='Disc'), r"lacks disc \('disc' may be its 'Disc'\)"),
    'another order': (
        lambda c: c['categories'].reverse(),
        r'another order: \(star, box, disc\), not \(disc, box, star\)',
    ),
}
SPLIT_FAULTS = [(split, name) for name in FAULTS for split in ('train', 'val')]


@pytest.mark.parametrize('split, name', SPLIT_FAULTS)
def test_faults_are_errors_in_either_split(tmp_path, split, name):
    edit, pattern = FAULTS[name]
    report = check(tmp_path, **{split: edit})
    assert re.search(pattern, texts(report)), texts(report)
    assert f'{split}.json' in texts(report)


def test_data_without_faults_make_no_noise(tmp_path):
    report = check(tmp_path)
    assert report.findings == [] and report.completed == {}


def test_all_faults_are_listed_at_once(tmp_path):
    names = ('boxes of nan', 'another category id', 'a missing image', 'another order')

    def edit(content):
        for i, name in enumerate(names):
            part = dict(content, annotations=content['annotations'][i : i + 1], images=content['images'][i : i + 1])
            FAULTS[name][0](part)

    report = check(tmp_path, val=edit)
    for name in names:
        pattern = FAULTS[name][1].replace('of 4', r'of \d')
        assert re.search(pattern, texts(report)), (name, texts(report))


@pytest.mark.parametrize(
    'text, pattern',
    [
        ('{"images": [', r'not valid JSON \(.*; 12 bytes\)'),
        ('', r'not valid JSON'),
        ('<html>', r'not valid JSON'),
        (b'\xff\xfe\x00', r'not valid JSON'),
        ('[' * 100_000, r'not valid JSON'),
        ('null', r'holds a NoneType where'),
        ('{"images": {}, "categories": []}', r"no list 'images'"),
        ('{"images": [], "categories": [], "annotations": {}}', r"'annotations' is a dict"),
    ],
)
def test_a_file_that_is_no_annotation_file_is_named(tmp_path, text, pattern):
    check(tmp_path)
    (tmp_path / 'annotations/val.json').write_bytes(text if isinstance(text, bytes) else text.encode())
    report = check_config(small.config(tmp_path))
    assert re.search(pattern, texts(report)) and 'annotations/val.json' in texts(report)


def test_missing_and_unnamed_files_are_named(tmp_path):
    check(tmp_path)
    report = check_config(small.config(tmp_path, **{f'{OPTION}.ann_file': 'annotations/nosuch.json'}))
    assert re.search(r'nosuch\.json: there is no such annotation file.*--data-root', texts(report))
    report = check_config(small.config(tmp_path, **{f'{OPTION}.ann_file': ''}))
    assert f'{OPTION}: has no ann_file' in texts(report)
    report = check_config(small.config(tmp_path, **{f'{OPTION}.data_prefix.img': 'elsewhere/'}))
    assert re.search(r'4 of 4 image files are not there.*There is no folder \S+elsewhere/', texts(report))


@pytest.mark.parametrize('data, why', [(b'', 'is an empty file'), (b'no image', 'is not an image that can be read')])
@pytest.mark.parametrize('split', ['train', 'val'])
def test_broken_images_are_named(tmp_path, split, data, why):
    check(tmp_path)
    (tmp_path / split / f'{split}02.png').write_bytes(data)
    assert re.search(rf'{split}02\.png {why}.*Copy them again', texts(check_config(small.config(tmp_path))))


def test_full_decodes_every_image(tmp_path):
    check(tmp_path)
    path = tmp_path / 'val/val03.png'
    path.write_bytes(path.read_bytes()[:60])
    assert check_config(small.config(tmp_path)).findings == []
    assert 'cannot be decoded' in texts(check_config(small.config(tmp_path), full=True))


# ----------------------------------------------------------------------------------------------------------- classes


@pytest.mark.parametrize(
    'classes, pattern',
    [
        ('disc', r"is the text 'disc', not a list of names. Write \('disc',\), with the comma"),
        ([], r'is \[\], not a list'),
        ([None, ['disc']], r'not a list of names'),
        (['disc', 'box', 'disc'], r'names disc twice'),
        (['box', 'disc', 'star'], r'another order: \(disc, box, star\), not \(box, disc, star\)'),
        (['disc', 'box', 'staar'], r"lacks staar \('staar' may be its 'star'\)"),
        (['disc', 'box', 'star', 'moon'], r'lacks moon'),
        (['star', 'disc'], r'another order: \(disc, star\), not \(star, disc\)'),
    ],
)
def test_classes_of_the_config_that_the_file_does_not_have_in_this_order(tmp_path, classes, pattern):
    check(tmp_path)
    report = check_config(small.config(tmp_path, classes=classes))
    assert re.search(pattern, texts(report)), texts(report)


def test_a_part_of_the_classes_in_the_files_order_is_a_warning_if_objects_are_left_out(tmp_path):
    check(tmp_path)
    report = check_config(small.config(tmp_path, classes=('disc', 'star')))
    assert report.of('error') == [] and re.search(r'objects are not used.*\(box\)', texts(report, 'warning'))


def test_splits_with_classes_in_different_orders(tmp_path):
    reverse = {'val_dataloader.dataset.metainfo.classes': small.CLASSES[::-1]}
    report = check(tmp_path, val=lambda c: c['categories'].reverse(), **reverse)
    assert re.search(
        r'val_dataloader.*another order: \(star, box, disc\), not \(disc, box, star\) as train_dataloader',
        texts(report),
    )


@pytest.mark.parametrize(
    'head, count, says', [('bbox_head', 2, 3), ('mask_head', 4, 3), ('bbox_head', 80, 3), ('mask_head', 'default', 3)]
)
def test_heads_that_count_other_classes(tmp_path, head, count, says):
    check(tmp_path)
    cfg = small.config(tmp_path)
    if count == 'default':  # what FCNMaskHead counts where the config says nothing
        del cfg.model.roi_head[head]['num_classes']
        count = 80
    else:
        cfg.model.roi_head[head].num_classes = count
    assert f'model.roi_head.{head}.num_classes: is {count}, but the data have {says} classes' in texts(
        check_config(cfg)
    )


@pytest.mark.parametrize('order', [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize('ids', [(1, 2, 3), (30, 20, 10)])
def test_what_passes_is_what_mmdet_reads(tmp_path, order, ids):
    def edit(content):
        number = dict(zip((1, 2, 3), ids))
        for category in content['categories']:
            category['id'] = number[category['id']]
        for annotation in content['annotations']:
            annotation['category_id'] = number[annotation['category_id']]
        content['categories'] = [content['categories'][i] for i in order]

    classes = tuple(small.CLASSES[i] for i in order)
    report = check(tmp_path, train=edit, val=edit, classes=classes)
    assert report.findings == []
    content = json.loads((tmp_path / 'annotations/train.json').read_text())
    names = {category['id']: category['name'] for category in content['categories']}
    with DefaultScope.overwrite_default_scope('mmdet'):
        data = DATASETS.build(small.config(tmp_path, classes=classes).train_dataloader.dataset)
    labels = [instance['bbox_label'] for i in range(len(data)) for instance in data.get_data_info(i)['instances']]
    assert [data.metainfo['classes'][label] for label in labels] == [
        names[a['category_id']] for a in content['annotations']
    ]


# ------------------------------------------------------------------------------------------------- what can be filled


@pytest.mark.parametrize(
    'edit, note',
    [
        (each('annotations', area=None), 'area of 8 annotations'),
        (each('annotations', area=0), 'area of 8 annotations'),
        (first('annotations', area='12'), 'area of 1 annotations'),
        (each('annotations', iscrowd=None), 'iscrowd of 8 annotations'),
        (first('annotations', iscrowd='0'), 'iscrowd of 1 annotations'),
        (each('annotations', bbox=None), 'bbox of 8 annotations'),
        (each('images', width=None, height=None), 'width and height of 4 images'),
        (first('images', width='40'), 'width and height of 1 images'),
        (
            lambda c: [a.update(category_id=str(a['category_id'])) for a in c['annotations']] and None,
            'category_id of 8',
        ),
        (lambda c: [a.update(image_id=str(a['image_id'])) for a in c['annotations']] and None, 'image_id of 8'),
        (lambda c: [i.update(id=str(i['id'])) for i in c['images']] and None, 'image_id of 8'),
        (lambda c: [a.update(id=a['id'] - 1) for a in c['annotations']] and None, 'annotation ids from 1'),
        (lambda c: [a.update(id=str(a['id'])) for a in c['annotations']] and None, 'annotation ids from 1'),
        (each('annotations', id=7), 'annotation ids from 1'),
        (each('annotations', id=None), 'annotation ids from 1'),
    ],
)
def test_what_follows_from_the_rest_is_filled_in(tmp_path, edit, note):
    report = check(tmp_path, val=edit)
    assert report.findings == []
    (notes,) = report.completed.values()
    assert any(text.startswith(note) for text in notes), notes
    filled = annotations.read_annotations(tmp_path / 'annotations/val.json')
    filled.pop('_bom', None)
    expected = small.content(prefix='val')
    for image in expected['images']:
        image['id'] = type(filled['images'][0]['id'])(image['id'])
    for a in expected['annotations']:
        a['image_id'] = type(filled['images'][0]['id'])(a['image_id'])
    assert filled == expected


def test_a_byte_order_mark_is_taken_off(tmp_path):
    check(tmp_path)
    path = tmp_path / 'annotations/train.json'
    path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes())
    report = check_config(small.config(tmp_path))
    assert report.findings == [] and report.completed == {str(path): ['a byte order mark taken off']}


def test_objects_without_a_mask_are_ignored_in_training_and_an_error_in_evaluation(tmp_path):
    report = check(tmp_path, train=first('annotations', segmentation=[]))
    assert report.of('error') == [] and 'marked to be ignored' in str(report.completed)
    report = check(tmp_path, val=first('annotations', segmentation=[]))
    assert '1 of 8 annotations have no segmentation, which the config loads and evaluates' in texts(report)
    report = check(tmp_path, val=each('annotations', segmentation=None), masks=False)
    assert report.findings == []


def test_an_annotation_id_of_zero_matters_only_where_it_is_evaluated(tmp_path):
    def from_zero(content):
        for annotation in content['annotations']:
            annotation['id'] -= 1

    assert check(tmp_path, train=from_zero).completed == {}


# -------------------------------------------------------------------------------------------------------- EXIF, sizes


def turn(root, split, orientation, size=None):
    """Save the images of a split as JPEG with an orientation."""
    content = json.loads((root / f'annotations/{split}.json').read_text())
    exif = Image.Exif()
    exif[0x0112] = orientation
    for image in content['images']:
        path = root / split / image['file_name']
        image['file_name'] = path.with_suffix('.jpg').name
        Image.new('RGB', size or (small.WIDTH, small.HEIGHT)).save(path.with_suffix('.jpg'), exif=exif.tobytes())
    small.dump(root, split, content)


@pytest.mark.parametrize('orientation', [5, 6, 7, 8])
def test_turned_photos_described_as_stored_are_an_error_that_names_the_option(tmp_path, orientation):
    check(tmp_path)
    turn(tmp_path, 'val', orientation)
    report = check_config(small.config(tmp_path))
    option = 'val_dataloader.dataset.pipeline.0.color_type'
    assert re.search(rf'EXIF orientation.*--cfg-options {option}=color_ignore_orientation', texts(report))
    flags = {
        f'{split}_dataloader.dataset.pipeline.0.color_type': 'color_ignore_orientation' for split in ('val', 'test')
    }
    assert check_config(small.config(tmp_path, **flags)).findings == []


@pytest.mark.parametrize('orientation', [2, 3, 4])
def test_orientations_that_the_size_does_not_show_are_a_warning(tmp_path, orientation):
    check(tmp_path)
    turn(tmp_path, 'train', orientation)
    report = check_config(small.config(tmp_path))
    assert report.of('error') == []
    assert re.search(rf'4 photos have an EXIF.*{OPTION}.pipeline.0.color_type', texts(report, 'warning'))


def test_turned_photos_described_as_turned_are_right_and_an_error_where_they_are_read_as_stored(tmp_path):
    check(tmp_path)
    turn(tmp_path, 'train', 6, (small.HEIGHT, small.WIDTH))
    assert check_config(small.config(tmp_path)).findings == []
    report = check_config(small.config(tmp_path, **{f'{OPTION}.pipeline.0.color_type': 'color_ignore_orientation'}))
    assert re.search(r'described as turned, but read as stored.*color_type=color', texts(report))


def test_sizes_are_filled_in_as_the_photo_is_read(tmp_path):
    check(tmp_path)
    turn(tmp_path, 'train', 6, (small.HEIGHT, small.WIDTH))
    content = json.loads((tmp_path / 'annotations/train.json').read_text())
    each('images', width=None, height=None)(content)
    small.dump(tmp_path, 'train', content)
    assert check_config(small.config(tmp_path)).findings == []
    images = annotations.read_annotations(tmp_path / 'annotations/train.json')['images']
    assert {(image['width'], image['height']) for image in images} == {(small.WIDTH, small.HEIGHT)}


# ---------------------------------------------------------------------------------------- evaluators, filters, wrappers


def test_an_evaluator_that_reads_other_images_than_the_loader(tmp_path):
    check(tmp_path)
    other = small.content(images=2, prefix='val')
    small.dump(tmp_path, 'other', other)
    cfg = small.config(tmp_path, **{'val_evaluator.ann_file': f'{tmp_path}/annotations/other.json'})
    assert re.search(r'other\.json has other images \(2\) than \S+val\.json \(4\)', texts(check_config(cfg)))
    small.dump(tmp_path, 'other', small.content(prefix='val'))
    assert check_config(cfg).findings == []
    small.dump(tmp_path, 'other', small.content(prefix='val', classes=small.CLASSES[::-1]))
    assert 'other.json: lists the classes in another order' in texts(check_config(cfg))
    cfg = small.config(tmp_path, **{'val_evaluator.ann_file': f'{tmp_path}/annotations/gone.json'})
    assert re.search(r'gone\.json: there is no such.*val_evaluator.ann_file=', texts(check_config(cfg)))


def test_nothing_left_after_filtering(tmp_path):
    report = check(tmp_path, **{f'{OPTION}.filter_cfg.min_size': 32})
    assert re.search(r'no image is left for train_dataloader.*min_size', texts(report))


def test_a_part_of_the_images_with_an_evaluator_of_all_is_a_warning(tmp_path):
    report = check(tmp_path, **{'val_dataloader.dataset.indices': 2})
    assert 'counts the objects of all as missed' in texts(report, 'warning')


def test_a_test_without_ground_truth_that_only_writes_detections(tmp_path):
    form = {'val_evaluator.format_only': True, 'val_evaluator.outfile_prefix': 'a'}
    assert check(tmp_path, val=without_objects, **form).findings == []
    assert check(tmp_path, val=lambda c: c.pop('annotations') and None, **form).findings == []


def test_images_without_objects_beside_others_are_trained_on(tmp_path):
    check(tmp_path)
    small.dump(tmp_path, 'unlabeled', dict(small.content(prefix='train'), annotations=[]))
    cfg = small.config(tmp_path)
    labeled = cfg.train_dataloader.dataset
    unlabeled = dict(labeled, ann_file='annotations/unlabeled.json', filter_cfg=dict(filter_empty_gt=False))
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[labeled, unlabeled])
    assert check_config(cfg).findings == []
    cfg.train_dataloader.dataset = unlabeled
    assert 'has no annotations' in texts(check_config(cfg))


@pytest.mark.parametrize('wrapper', ['RepeatDataset', 'ConcatDataset', 'ClassBalancedDataset', 'MultiImageMixDataset'])
def test_data_sets_within_wrappers_are_checked(tmp_path, wrapper):
    check(tmp_path, train=each('annotations', iscrowd=1))
    cfg = small.config(tmp_path)
    inner = cfg.train_dataloader.dataset
    key = 'datasets' if wrapper == 'ConcatDataset' else 'dataset'
    cfg.train_dataloader.dataset = {'type': wrapper, key: [inner] if key == 'datasets' else inner}
    assert 'iscrowd=1' in texts(check_config(cfg))


@pytest.mark.parametrize('kind', ['mmdet.CocoDataset', 'CityscapesDataset', 'mmdet.datasets.coco.CocoDataset'])
def test_other_spellings_and_subclasses_are_checked(tmp_path, kind):
    report = check(tmp_path, train=each('annotations', iscrowd=1), **{f'{OPTION}.type': kind})
    assert 'iscrowd=1' in texts(report)


@pytest.mark.parametrize('kind', ['VOCDataset', 'CocoPanopticDataset', 'LVISV1Dataset', 'V3DetDataset'])
def test_other_formats_pass_with_a_word(tmp_path, kind):
    metainfo = {f'{OPTION}.metainfo': None} if kind == 'V3DetDataset' else {}
    report = check(tmp_path, train=each('annotations', iscrowd=1), **{f'{OPTION}.type': kind}, **metainfo)
    assert report.of('error') == [] and f'{OPTION}: not checked: {kind}' in texts(report, 'note')


# ---------------------------------------------------------------------------------------------------------- properties


@st.composite
def data_sets(draw):
    """A data set without faults: random sizes, ids, boxes and order of categories."""
    names = draw(st.lists(st.text('abcdefgh[]/ {}', min_size=1, max_size=6), min_size=1, max_size=5, unique=True))
    ids = draw(st.lists(st.integers(0, 1000), min_size=len(names), max_size=len(names), unique=True))
    images, found = [], []
    kind = draw(st.sampled_from([int, str]))
    for i in range(draw(st.integers(1, 4))):
        width, height = draw(st.integers(16, 64)), draw(st.integers(16, 64))
        images.append(dict(id=kind(i * 7), file_name=f'{i}.png', width=width, height=height))
        for _ in range(draw(st.integers(1, 4))):
            x, y = draw(st.integers(0, width - 8)), draw(st.integers(0, height - 8))
            w, h = draw(st.integers(4, width - x)), draw(st.integers(4, height - y))
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            if any(a['image_id'] == images[-1]['id'] and a['bbox'] == [x, y, w, h] for a in found):
                continue  # one that is there twice is a fault
            found.append(
                dict(
                    id=len(found) + 1,
                    image_id=images[-1]['id'],
                    category_id=draw(st.sampled_from(ids)),
                    bbox=[x, y, w, h],
                    area=w * h,
                    iscrowd=0,
                    segmentation=[polygon],
                )
            )
    return dict(images=images, annotations=found, categories=[dict(id=i, name=n) for i, n in zip(ids, names)])


def small_report(root, content):
    annotations.forget()
    listed = content['categories'] if isinstance(content['categories'], list) else []
    names = tuple(c['name'] for c in listed if isinstance(c, dict) and isinstance(c.get('name'), str))
    small.dump(root, 'train', content)
    small.dump(root, 'val', content)
    return check_config(small.config(root, classes=names or ('a',)), ('train', 'val'))


def write_images(root, content):
    for split in ('train', 'val'):
        for image in content['images']:
            Image.fromarray(np.zeros((image['height'], image['width'], 3), np.uint8)).save(
                root / split / image['file_name']
            )


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    return small.write(root, small.content(), small.content())


@given(content=data_sets())
def test_random_data_without_faults_are_clean(folder, content):
    write_images(folder, content)
    report = small_report(folder, content)
    assert report.findings == [] and report.completed == {}


# Faults that any data set can have; several at once do not hide each other.
PLANTED = {
    name: FAULTS[name]
    for name in (
        'boxes of infinity', 'boxes of three', 'odd crowd', 'no image id', 'no category id', 'a list as category id',
        'an image without file', 'a missing image', 'a category without name', 'masks of text',
    )
}  # fmt: skip


@given(content=data_sets(), names=st.sets(st.sampled_from(sorted(PLANTED)), min_size=1, max_size=4))
def test_every_planted_fault_is_found(folder, content, names):
    if {'boxes of infinity', 'boxes of three'} <= names or {'no category id', 'a list as category id'} <= names:
        names = names - {'boxes of three', 'a list as category id'}  # the same field
    if {'an image without file', 'a missing image'} <= names:
        names = names - {'a missing image'}
    write_images(folder, content)
    for name in names:
        PLANTED[name][0](content)
    report = small_report(folder, content)
    for name in names:
        pattern = re.sub(r'\b\d+ of \d\b|\\\[1, 2, 3\\\]', r'.*', PLANTED[name][1])
        assert re.search(pattern, texts(report)), (name, texts(report))


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 10**20), st.floats(), st.text(max_size=3), st.just([]), st.just({}),
    st.just([[]]), st.just([[1, 2, 3, 4, 5, 6]]), st.just(dict(size=[2, 2], counts='x')), st.just([None] * 4),
    st.just(dict(size=[24, 40], counts=[1, 'a'])), st.just(dict(size=[24, 40], counts=[])),
)  # fmt: skip


@given(content=data_sets(), data=st.data())
def test_no_content_ends_in_a_traceback(folder, content, data):
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(['images', 'annotations', 'categories']))
        listed = content[kind] if isinstance(content[kind], list) else []
        entry = data.draw(st.sampled_from(listed)) if listed else {}
        if not isinstance(entry, dict) or not entry or data.draw(st.integers(0, 20)) == 0:
            content[kind] = data.draw(JUNK)
        else:
            entry[data.draw(st.sampled_from(sorted(entry)))] = data.draw(JUNK)
    report = small_report(folder, content)
    assert all(isinstance(str(finding), str) for finding in report.findings)


@given(content=data_sets(), data=st.data())
def test_what_exporters_leave_out_is_filled_in_as_it_was(content, data):
    whole = json.loads(json.dumps(content))
    left_out = data.draw(st.sets(st.sampled_from(['area', 'iscrowd', 'bbox', 'id']), min_size=1))
    for annotation in content['annotations']:
        for key in left_out:
            del annotation[key]
    notes = complete(content, Needs(evaluated=True), lambda image: None)
    assert content == whole and len(notes) == len(left_out)


def compressed(text):
    return each('annotations', segmentation=dict(size=SIZE, counts=text))


def named(*names):
    def edit(content):
        for category, name in zip(content['categories'], names):
            category['name'] = name

    return edit


def copies(content):
    content['annotations'] += [dict(a, id=a['id'] + 100) for a in content['annotations']]


def one_file_twice(content):
    content['images'][1]['file_name'] = content['images'][0]['file_name']


def in_capitals(content):
    for image in content['images']:
        image['file_name'] = image['file_name'].upper()


MORE = {
    'run lengths of nonsense': ('error', compressed('hello'), r'8 masks in run lengths do not add up'),
    'run lengths of an empty text': ('error', compressed(''), r'8 masks in run lengths do not add up'),
    'run lengths printed as bytes': ('error', compressed("b'`12'"), r'8 masks in run lengths do not add up'),
    'run lengths that go on': ('error', compressed('0o'), r'8 masks in run lengths do not add up'),
    'a name with a blank behind': ('error', named('disc '), r"lacks 'disc' \('disc' may be its 'disc '\)"),
    'a name with accents split': ('error', named('di\u0301sc'), r'lacks disc'),
    'a name with a mark that is not seen': ('error', named('disc\u200b'), r"also has 'disc\\u200b'"),
    'objects twice': ('warning', copies, r'8 of 16 objects are there twice.*\(id 101, '),
    'an image file twice': ('warning', one_file_twice, r'1 image files are listed twice, like (train|val)00.png'),
    'file names in capitals': ('error', in_capitals, r'train00.png is there, which is written in another way'),
}


@pytest.mark.parametrize('name', MORE)
def test_faults_that_one_does_not_see(tmp_path, name):
    level, edit, said = MORE[name]
    assert re.search(said, texts(check(tmp_path, train=edit, val=edit), level))


def test_names_that_are_numbers_are_told_from_texts(tmp_path):
    report = check(tmp_path, train=named(1, 2, 3), val=named(1, 2, 3), classes=('1', '2', '3'))
    assert "lacks '1', '2', '3' and also has 1, 2, 3" in texts(report)


def test_run_lengths_as_cocos_own_tools_write_them_are_whole():
    random = np.random.RandomState(0)
    for _ in range(50):
        height, width = random.randint(1, 300, 2)
        mask = (random.rand(height, width) < random.rand() ** 3).astype(np.uint8)
        runs = decompressed(mask_utils.encode(np.asfortranarray(mask))['counts'].decode())
        assert sum(runs) == height * width
        assert sum(runs[1::2]) == mask.sum()


def test_a_width_of_zero_is_read_from_the_image(tmp_path):
    report = check(tmp_path, train=each('images', width=0, height=0))
    assert not report.findings and 'width and height of 4 images' in str(report.completed)


def test_images_of_both_splits_are_said(tmp_path):
    def twice(content):
        content['images'] += [
            dict(image, id=image['id'] + 50) for image in small.content(prefix='../train/train')['images']
        ]

    said = texts(check(tmp_path, val=twice), 'warning')
    assert '4 of 8 images are trained on as well' in said and 'train/train00.png' in said


def test_images_that_the_loader_leaves_out_and_the_metric_counts(tmp_path):
    filters = dict(test_mode=False, filter_cfg=dict(filter_empty_gt=True))
    report = check(
        tmp_path, val=lambda c: c.update(annotations=c['annotations'][:4]), **{'val_dataloader.dataset': filters}
    )
    assert 'val_dataloader.dataset leaves out 2 of 4 images' in texts(report, 'warning')


def test_classes_that_nobody_named_are_pointed_out(tmp_path):
    contents = [small.content(prefix=split) for split in ('train', 'val')]
    cfg = small.config(small.write(tmp_path, *contents))
    for split in ('train', 'val', 'test'):
        del cfg[f'{split}_dataloader'].dataset.metainfo
    assert 'name them in train_dataloader.dataset.metainfo.classes' in texts(check_config(cfg))
