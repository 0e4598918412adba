"""Folders as annotation tools export them, a split held back from one file, and what options say about it."""

import argparse
import json
import os
import shutil
from pathlib import Path

import pytest
from mmengine.config import Config

from helpers import small
from mmdet_norms.cli.common import UserError, move_and_merge
from mmdet_norms.cli.options import Options
from mmdet_norms.datasets.locate import DataRootError, use_data_root
from mmdet_norms.datasets.parts import held_back
from mmdet_norms.datasets.sources import sources

SPLITS = ('train', 'val', 'test')


def other_config(tmp_path, **changes) -> Config:
    """Of other data, which are elsewhere."""
    return small.config(tmp_path / 'elsewhere', classes=('cat', 'dog'), **changes)


def export(root, ann_file, folder, content):
    """One annotation file and its images, which are empty files."""
    path = root / ann_file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    for image in content['images']:
        image_path = root / folder / image['file_name']
        image_path.parent.mkdir(parents=True, exist_ok=True)
        image_path.touch()
    return path


def read(cfg):
    """Names of the images that each split reads, all of which must be there."""
    names = {}
    for source in sources(cfg):
        listed = [image['file_name'] for image in json.loads(Path(source.ann_file).read_text())['images']]
        assert all(Path(source.images, name).is_file() for name in listed), source.images
        names[source.split] = listed
    return names


LAYOUTS = {
    'coco': ('annotations/instances_{split}2017.json', '{split}2017', 'val'),
    'roboflow': ('{split}/_annotations.coco.json', '{split}', 'valid'),
    'mmdet tutorial': ('{split}/annotation_coco.json', '{split}', 'val'),
    'fiftyone': ('{split}/labels.json', '{split}/data', 'validation'),
    'label studio': ('{split}/result.json', '{split}', 'val'),
    'cvat tasks': ('{split}/annotations/instances_default.json', '{split}/images/default', 'val'),
    'cvat subsets': ('annotations/instances_{split}.json', 'images/{split}', 'Validation'),
    'own names': ('{split}_2026.json', 'images', 'val'),
}


@pytest.mark.parametrize('name', LAYOUTS)
def test_layouts_of_common_tools_are_read(tmp_path, name):
    ann, images, val = LAYOUTS[name]
    train = 'Train' if val[0].isupper() else 'train'
    for split, prefix in ((train, 'a'), (val, 'b')):
        export(tmp_path, ann.format(split=split), images.format(split=split), small.content(prefix=prefix))
    cfg = other_config(tmp_path)
    use_data_root(cfg, str(tmp_path))
    names = read(cfg)
    assert [names[split][0][0] for split in SPLITS] == ['a', 'b', 'b']
    assert cfg.val_evaluator.ann_file == sources(cfg, ('val',))[0].ann_file
    assert all(source.classes == small.CLASSES for source in sources(cfg))


def test_a_labelled_test_split_is_tested_and_one_without_labels_is_not(tmp_path):
    for split in ('train', 'valid', 'test'):
        export(tmp_path, f'{split}/_annotations.coco.json', split, small.content(prefix=split))
    cfg = other_config(tmp_path)
    use_data_root(cfg, str(tmp_path))
    assert read(cfg)['test'][0].startswith('test') and 'test/_ann' in cfg.test_evaluator.ann_file
    export(tmp_path, 'test/_annotations.coco.json', 'test', dict(small.content(), annotations=[]))
    cfg = other_config(tmp_path)
    use_data_root(cfg, str(tmp_path))
    assert read(cfg)['test'][0].startswith('valid')


@pytest.mark.parametrize(
    'ann, images',
    [('annotations.json', 'images'), ('annotations/instances_default.json', 'images/default'), ('result.json', '.'),
     ('mine.json', 'data'), ('a.json', 'PNGImages'), ('a.json', 'a/b c'),
     ('train/_annotations.coco.json', 'train')],
)  # fmt: skip
def test_one_file_is_divided_the_same_way_every_time(tmp_path, ann, images):
    path = export(tmp_path / 'data', ann, images, small.content(images=20))
    before = path.read_bytes(), sorted(os.listdir(tmp_path / 'data'))
    names = []
    for work in ('one', 'two', 'two'):
        cfg = other_config(tmp_path)
        notes = use_data_root(cfg, str(tmp_path / 'data'), SPLITS, 0.25, tmp_path / work)
        names.append(read(cfg))
    assert names[0] == names[1] == names[2]
    assert len(names[0]['val']) == 5 and names[0]['val'] == names[0]['test']
    assert sorted(names[0]['train'] + names[0]['val']) == [f'{i:02d}.png' for i in range(20)]
    assert len(os.listdir(tmp_path / 'two')) == 2
    assert '5 of the 20 images' in ' '.join(notes)
    assert cfg.val_evaluator.ann_file == sources(cfg, ('val',))[0].ann_file
    assert (path.read_bytes(), sorted(os.listdir(tmp_path / 'data'))) == before
    content = json.loads(Path(sources(cfg, ('val',))[0].ann_file).read_text())
    assert {a['image_id'] for a in content['annotations']} == {image['id'] for image in content['images']}


def test_neither_order_nor_seed_nor_ids_change_who_is_held_back():
    content = small.content(images=40)
    names = {content['images'][i]['file_name'] for i in held_back(content, 0.2)}
    other = small.content(images=40)
    other['images'].reverse()
    for i, image in enumerate(other['images']):
        image['id'] = 1000 - i
    assert {other['images'][i]['file_name'] for i in held_back(other, 0.2)} == names
    more = small.content(images=44)
    assert len(names - {more['images'][i]['file_name'] for i in held_back(more, 0.2)}) <= 1


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(lambda i: f'photo{i // 3}_jpg.rf.{i:032x}.jpg', id='copies that Roboflow makes'),
        pytest.param(lambda i: f'{("", "./", "there/../")[i % 3]}{i // 3}.jpg', id='ways to write one path'),
    ],
)
def test_entries_of_one_photo_stay_together(name):
    content = small.content(images=30)
    for i, image in enumerate(content['images']):
        image['file_name'] = name(i)
    val = held_back(content, 0.2)
    assert len(val) == 6 and {i // 3 for i in val}.isdisjoint(i // 3 for i in range(30) if i not in val)


@pytest.mark.parametrize('fraction', [0, 1, 1.5, -0.2, float('nan')])
def test_a_fraction_that_is_none_is_one_message(tmp_path, fraction):
    export(tmp_path, 'annotations.json', 'images', small.content())
    with pytest.raises(DataRootError, match=r'^--val-fraction \S+: must be between 0 and 1, such as 0\.2'):
        use_data_root(other_config(tmp_path), str(tmp_path), SPLITS, fraction, tmp_path / 'work')
    assert not (tmp_path / 'work').exists()


@pytest.mark.parametrize(
    'images, fraction, said',
    [(4, 0.1, 'leaves 0 to validate and 4 to train'), (4, 0.9, 'leaves 4 to validate'), (1, 0.5, 'there is one image'),
     (0, 0.5, 'there is one image, or none')],
)  # fmt: skip
def test_a_split_that_would_be_empty_is_one_message(tmp_path, images, fraction, said):
    export(tmp_path, 'annotations.json', 'images', small.content(images=images))
    with pytest.raises(DataRootError, match=said):
        use_data_root(other_config(tmp_path), str(tmp_path), SPLITS, fraction, tmp_path / 'work')


def test_a_folder_with_a_validation_split_is_not_divided(tmp_path):
    for split in ('train', 'valid'):
        export(tmp_path, f'{split}/_annotations.coco.json', split, small.content(prefix=split))
    with pytest.raises(DataRootError, match=r'there is a split to validate with, \S+valid/_annotations.*leave the opt'):
        use_data_root(other_config(tmp_path), str(tmp_path), SPLITS, 0.2, tmp_path / 'work')


def test_one_file_alone_asks_for_the_fraction_and_its_classes_do_without(tmp_path):
    export(tmp_path, 'annotations.json', 'images', small.content())
    for needed in (('train', 'val'), ('test',)):
        with pytest.raises(DataRootError, match=r'annotations for val, .* of annotations\.json: --val-fraction 0\.2'):
            use_data_root(other_config(tmp_path), str(tmp_path), needed)
    cfg = other_config(tmp_path)
    use_data_root(cfg, str(tmp_path), ('train',))
    assert cfg.model.roi_head.bbox_head.num_classes == 3


def test_two_files_are_a_question(tmp_path):
    for name in ('one', 'two'):
        export(tmp_path, f'{name}.json', 'images', small.content())
    (tmp_path / 'notes.json').write_text('{"by": "me"}')
    with pytest.raises(DataRootError, match=r'has 2 annotation files, one\.json, two\.json, and no name says which; n'):
        use_data_root(other_config(tmp_path), str(tmp_path))


def roboflow(names, group='animals'):
    """As Roboflow lists categories: the group of them first."""
    content = small.content(classes=names)
    for category in content['categories']:
        category['supercategory'] = group
    content['categories'].insert(0, dict(id=0, name=group, supercategory='none'))
    return content


@pytest.mark.parametrize('names, group', [(('cat', 'cow'), 'animals'), (('cat',), 'cat')])
def test_roboflows_group_of_classes_is_no_class(tmp_path, names, group):
    for split in ('train', 'valid'):
        export(tmp_path / 'data', f'{split}/_annotations.coco.json', split, roboflow(names, group))
    cfg = other_config(tmp_path)
    notes = use_data_root(cfg, str(tmp_path / 'data'), ('train', 'val'), None, tmp_path / 'work')
    assert any(f'without the first category, {group}' in note for note in notes)
    assert cfg.model.roi_head.bbox_head.num_classes == cfg.model.roi_head.mask_head.num_classes == len(names)
    from mmdet.datasets import CocoDataset

    entry = {k: v for k, v in cfg.train_dataloader.dataset.items() if k not in ('type', 'pipeline')}
    dataset = CocoDataset(**entry, pipeline=[])
    assert dataset.metainfo['classes'] == names
    labels = {o['bbox_label'] for i in range(len(dataset)) for o in dataset.get_data_info(i)['instances']}
    assert labels == set(range(len(names)))


def test_a_group_with_objects_is_a_class_and_so_is_one_that_an_option_names(tmp_path):
    content = roboflow(('cat', 'cow'))
    content['annotations'][0]['category_id'] = 0
    export(tmp_path, 'train.json', 'images', content), export(tmp_path, 'val.json', 'images', roboflow(('cat', 'cow')))
    cfg = other_config(tmp_path)
    use_data_root(cfg, str(tmp_path))
    assert sources(cfg)[0].classes == ('animals', 'cat', 'cow')
    export(tmp_path, 'train.json', 'images', roboflow(('cat', 'cow')))
    cfg, named = other_config(tmp_path), ('animals', 'cat', 'cow')
    use_data_root(cfg, str(tmp_path), options={'train_dataloader.dataset.metainfo.classes': named})
    assert [source.classes for source in sources(cfg)][1:] == [named, named]


VOC = '<annotation><filename>a.jpg</filename><object><name>cat</name></object></annotation>'
LABELME = json.dumps(dict(shapes=[], imagePath='a.jpg', imageData=None))


@pytest.mark.parametrize(
    'files, said',
    [({'Annotations/a.xml': VOC, 'JPEGImages/a.jpg': ''}, r"VOC \(Annotations/a\.xml\).*voc\('JPEGImages', 'Ann"),
     ({'train/a.xml': VOC}, r"from_pascal_voc\('train', 'train'\)"),
     ({'a.json': LABELME, 'b.json': LABELME}, r'LabelMe \(a\.json\).*labelme2coco \S+ --export_dir \S+/annotations'),
     ({'data.yaml': 'nc: 1', 'labels/a.txt': '0 .5 .5 .1 .1'}, 'YOLO'),
     ({'readme.txt': ''}, r'looked for annotations/train\.json, .*train/annotation_coco\.json.*give a folder in COCO')],
)  # fmt: skip
def test_a_folder_of_another_format_says_how_to_convert_it(tmp_path, files, said):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(DataRootError, match=rf'has no annotations for train, .*{said}'):
        use_data_root(other_config(tmp_path), str(tmp_path))


def test_what_labelme2coco_writes_is_read(tmp_path):
    folder = tmp_path / 'photos'  # it names images from the folder above
    export(folder, 'annotations/dataset.json', '..', small.content(images=8, prefix='photos/'))
    (folder / 'a.json').write_text(LABELME)
    cfg = other_config(tmp_path)
    use_data_root(cfg, str(folder), SPLITS, 0.25, tmp_path / 'work')
    assert len(read(cfg)['val']) == 2


def test_a_missing_image_does_not_hide_where_the_others_are(tmp_path):
    export(tmp_path, 'train.json', 'images', small.content()), export(tmp_path, 'val.json', 'images', small.content())
    (tmp_path / 'images' / '00.png').unlink()
    cfg = other_config(tmp_path)
    use_data_root(cfg, str(tmp_path))
    assert all(source.images == f'{tmp_path}/images/' for source in sources(cfg))


# ------------------------------------------------------------------------------------------------------------- options


def moved(tmp_path, root, *options, fraction=None):
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=Options)
    args = parser.parse_args(['--cfg-options', *options] if options else [])
    vars(args).update(data_root=str(root), val_fraction=fraction, copies=tmp_path / 'work')
    cfg = other_config(tmp_path)
    move_and_merge(cfg, args)
    return cfg


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / 'data'
    for split in ('train', 'val'):
        export(root, f'annotations/{split}.json', split, small.content(prefix=split))
        export(root, f'{split}/mine.json', split, small.content(prefix=split, images=3))
    return root


@pytest.mark.parametrize('written', ['in the folder', 'from here', 'absolute', 'in a dict'])
def test_a_file_named_by_option_wins_wherever_it_is(tmp_path, folder, written, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if written in ('from here', 'absolute'):
        (folder / 'val' / 'mine.json').rename(tmp_path / 'mine.json')
    name = {'from here': 'mine.json', 'absolute': f'{tmp_path}/mine.json'}.get(written, 'val/mine.json')
    option = f'val_dataloader.dataset.ann_file={name}'
    cfg = moved(tmp_path, folder, option)
    assert [len(names) for names in read(cfg).values()] == [4, 3, 4]
    assert Path(cfg.val_evaluator.ann_file) == Path(sources(cfg, ('val',))[0].ann_file)
    assert cfg.test_evaluator.ann_file == f'{folder}/annotations/val.json'


def test_it_is_enough_where_nothing_else_would_be_found(tmp_path, folder):
    shutil.rmtree(folder / 'annotations')
    names = [f'{split}_dataloader.dataset.ann_file={"train" if split == "train" else "val"}/mine.json'
             for split in SPLITS]  # fmt: skip
    assert [len(names) for names in read(moved(tmp_path, folder, *names)).values()] == [3, 3, 3]


def test_a_file_that_is_not_there_is_one_message(tmp_path, folder):
    with pytest.raises(UserError, match=r'^--cfg-options train_dataloader\.dataset\.ann_file=x\.json: there is no'):
        moved(tmp_path, folder, 'train_dataloader.dataset.ann_file=x.json')


def test_the_images_and_the_evaluators_file_by_option_stay(tmp_path, folder):
    (folder / 'val').rename(folder / 'photos')
    cfg = moved(tmp_path, folder, 'val_dataloader.dataset.data_prefix.img=photos/',
                'test_dataloader.dataset.data_prefix={\'img\': \'photos/\'}',
                f'test_evaluator.ann_file={folder}/annotations/train.json')  # fmt: skip
    assert read(cfg)['val'] == read(cfg)['test']
    assert cfg.test_evaluator.ann_file == f'{folder}/annotations/train.json'


def test_the_root_of_one_data_set_by_option_stays(tmp_path, folder):
    shutil.move(folder, tmp_path / 'other')
    export(folder, 'annotations/train.json', 'train', small.content(images=5))
    cfg = moved(tmp_path, folder, *[f'{split}_dataloader.dataset.data_root={tmp_path}/other/' for split in SPLITS[1:]])
    assert [len(names) for names in read(cfg).values()] == [5, 4, 4]


def test_classes_by_option_are_those_of_every_split_and_of_the_heads(tmp_path, folder):
    cfg = moved(tmp_path, folder, "train_dataloader.dataset.metainfo.classes=['box','star']")
    assert [tuple(source.classes) for source in sources(cfg)] == [('box', 'star')] * 3
    assert cfg.model.roi_head.bbox_head.num_classes == 2


def test_a_file_by_option_is_divided(tmp_path, folder):
    for split in ('train', 'val'):
        (folder / 'annotations' / f'{split}.json').unlink()
    cfg = moved(tmp_path, folder, 'train_dataloader.dataset.ann_file=train/mine.json', fraction=0.3)
    assert [len(names) for names in read(cfg).values()] == [2, 1, 1]


def test_a_fraction_without_a_folder_is_one_message(tmp_path):
    args = argparse.Namespace(cfg_options=None, data_root=None, val_fraction=0.2)
    with pytest.raises(UserError, match=r'--val-fraction 0\.2: divides the images of a --data-root; give that'):
        move_and_merge(other_config(tmp_path), args)
