"""One config, any folder in COCO format: paths, layout and classes follow ``--data-root``."""

import json
from pathlib import Path

import pytest
from mmengine.config import Config

from mmdet_norms.cli import test, train
from mmdet_norms.cli.common import UserError, move_data_root
from mmdet_norms.datasets.locate import DataRootError, use_data_root

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / 'configs' / 'demo' / 'mask-rcnn_r50_fpn_bnet5_shapes.py'
COCO = ROOT / 'configs' / 'bnet' / 'cascade-mask-rcnn_r50_fpn_bnet5_1x_coco.py'
SHARED = ROOT.parent / 'shared' / 'data'


def write_folder(root, annotations, images, classes):
    """A data set of one image, the ids of whose classes fall; ``{split}`` in the names is replaced."""
    for split in ('train', 'val'):
        ann, folder = root / annotations.format(split=split), root / images.format(split=split)
        ann.parent.mkdir(parents=True, exist_ok=True), folder.mkdir(parents=True, exist_ok=True)
        (folder / f'{split}.jpg').touch()
        content = dict(
            images=[dict(id=1, file_name=f'{split}.jpg', width=64, height=64)],
            annotations=[],
            categories=[dict(id=100 - i, name=name) for i, name in enumerate(classes)],
        )
        ann.write_text(json.dumps(content))
    return root


def read_back(cfg, split):
    dataset = cfg[f'{split}_dataloader'].dataset
    return Path(dataset.data_root, dataset.ann_file), Path(dataset.data_root, dataset.data_prefix['img'])


@pytest.mark.parametrize('config', [DEMO, COCO])
@pytest.mark.parametrize(
    'annotations, images',
    [
        ('annotations/instances_{split}2017.json', '{split}2017'),
        ('annotations/{split}.json', 'images'),
        ('annotations/instances_{split}.json', 'images/{split}'),
        ('{split}.json', '.'),
        ('{split}/_annotations.coco.json', '{split}'),
    ],
)
def test_paths_follow_common_layouts_and_classes_follow_the_annotations(tmp_path, config, annotations, images):
    write_folder(tmp_path, annotations, images, ('cat', 'dog', 'cow'))
    cfg = Config.fromfile(config)
    use_data_root(cfg, str(tmp_path))
    for split in ('train', 'val', 'test'):
        ann, folder = read_back(cfg, split)
        assert ann.is_file() and any(folder.glob('*.jpg'))
        assert cfg[f'{split}_dataloader'].dataset.metainfo['classes'] == ('cat', 'dog', 'cow')
    assert Path(cfg.val_evaluator.ann_file).samefile(read_back(cfg, 'val')[0])
    heads = cfg.model.roi_head.bbox_head
    for head in heads if isinstance(heads, list) else [heads]:
        assert head.num_classes == 3
    assert 'num_classes' not in cfg.model.rpn_head


def test_a_folder_like_the_configs_own_changes_paths_only(tmp_path):
    cfg = Config.fromfile(DEMO)
    classes = cfg.metainfo.classes
    write_folder(tmp_path, 'annotations/{split}.json', '{split}', classes)
    model = cfg.model.copy()
    assert use_data_root(cfg, f'{tmp_path}/') == []
    assert cfg.model == model and cfg.train_dataloader.dataset.data_root == f'{tmp_path}/'


def test_datasets_inside_wrappers_move_too(tmp_path):
    write_folder(tmp_path, 'annotations/{split}.json', 'images', ('cat',))
    cfg = Config.fromfile(DEMO)
    inner = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=2, dataset=inner)
    use_data_root(cfg, str(tmp_path))
    assert cfg.train_dataloader.dataset.dataset.data_prefix['img'] == 'images/'


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda root: None, r'has no annotations for train, looked for annotations/train\.json, '),
        (
            lambda root: write_folder(root, 'annotations/{split}.json', '../nowhere', ('cat',)),
            r'image train.jpg of .* is in',
        ),
    ],
)
def test_a_folder_without_the_data_is_one_error_that_says_what_was_looked_for(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(DataRootError, match=message):
        use_data_root(Config.fromfile(DEMO), str(tmp_path))


@pytest.mark.parametrize('config', [DEMO, COCO])
@pytest.mark.parametrize('lacks', ['train.json', 'train'])
def test_a_test_folder_needs_no_training_images(tmp_path, config, lacks, capsys):
    root = write_folder(tmp_path, '{split}.json', '{split}', ('cat', 'dog', 'cow'))
    (root / lacks).rename(root.with_name(f'{root.name}.gone'))
    with pytest.raises(UserError, match=r'for train|image train\.jpg'):
        move_data_root(Config.fromfile(config), str(root), train.parse_args(['CONFIG']).reads)
    cfg = Config.fromfile(config)
    move_data_root(cfg, str(root), test.parse_args(['CONFIG', 'CKPT']).reads)
    assert 'train: not there as a whole' in capsys.readouterr().out
    for split in ('train', 'val', 'test'):
        assert cfg[f'{split}_dataloader'].dataset.metainfo['classes'] == ('cat', 'dog', 'cow')
        assert read_back(cfg, split)[0].is_relative_to(root)
        assert read_back(cfg, split)[0].is_file() == (split != 'train' or lacks == 'train')


def test_a_training_needs_no_test_split_and_leaves_none_of_the_old_one_behind(tmp_path):
    root = write_folder(tmp_path / 'new', '{split}.json', '{split}', ('cat', 'dog', 'cow'))
    old = write_folder(tmp_path / 'old', '{split}.json', '{split}', ('cat',))
    cfg = Config.fromfile(DEMO)
    cfg.val_dataloader.dataset.update(ann_file='train.json', data_prefix=dict(img='train/'))
    cfg.test_dataloader.dataset.update(ann_file=f'{old}/val.json', data_prefix=dict(img=f'{old}/val/'))
    for name in ('val.json', 'val'):
        (root / name).rename(root / f'{name}.gone')
    move_data_root(cfg, str(root), train.parse_args(['CONFIG']).reads)
    assert all(path.is_relative_to(root) and not path.exists() for path in read_back(cfg, 'test'))
    assert str(old) not in str(cfg.to_dict())


def test_a_folder_without_any_split_is_an_error_whatever_is_read(tmp_path):
    with pytest.raises(DataRootError, match='no annotations for train'):
        use_data_root(Config.fromfile(DEMO), str(tmp_path), ())


def test_a_config_without_data_root_says_what_to_set():
    with pytest.raises(DataRootError, match=r'set train_dataloader\.dataset\.data_root'):
        use_data_root(Config(dict(model=dict())), '.')


@pytest.mark.parametrize('name, classes', [('coco_mini', 80), ('pennfudan', 1)])
def test_real_photos_beside_the_checkout_are_read(name, classes):
    if not (SHARED / name).is_dir():
        pytest.skip(f'{name} is not beside this checkout')
    from mmdet.registry import DATASETS
    from mmengine.registry import DefaultScope

    cfg = Config.fromfile(DEMO)
    use_data_root(cfg, str(SHARED / name))
    assert cfg.model.roi_head.bbox_head.num_classes == classes
    with DefaultScope.overwrite_default_scope('mmdet'):
        for split in ('train', 'val'):
            dataset = DATASETS.build(cfg[f'{split}_dataloader'].dataset)
            assert len(dataset) > 30 and dataset[0]['inputs'].shape[0] == 3


def relist(root, split, edit):
    path = root / f'annotations/{split}.json'
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    'edit, said',
    [
        (lambda c: c['categories'].reverse(), r'another order: \(cow, dog, cat\), not \(cat, dog, cow\) as .*train'),
        (lambda c: c['categories'].pop(), r'lacks cow: \(cat, dog\), not \(cat, dog, cow\)'),
    ],
)
def test_splits_that_list_their_classes_differently_are_refused_with_both_orders(tmp_path, edit, said):
    write_folder(tmp_path, 'annotations/{split}.json', '{split}', ('cat', 'dog', 'cow'))
    relist(tmp_path, 'val', edit)
    with pytest.raises(DataRootError, match=rf'val\.json .*{said}'):
        use_data_root(Config.fromfile(DEMO), str(tmp_path))


@pytest.mark.parametrize('ids', [[1, 2, 3], [3, 2, 1], [30, 7, 12]])
def test_classes_are_in_the_order_of_the_list_whatever_their_ids(tmp_path, ids):
    write_folder(tmp_path, 'annotations/{split}.json', '{split}', ('cat', 'dog', 'cow'))
    for split in ('train', 'val'):
        relist(tmp_path, split, lambda c: [k.update(id=i) for k, i in zip(c['categories'], ids)])
    cfg = Config.fromfile(DEMO)
    use_data_root(cfg, str(tmp_path))
    assert cfg.test_dataloader.dataset.metainfo['classes'] == ('cat', 'dog', 'cow')


def test_the_configs_own_classes_take_the_order_of_the_files(tmp_path):
    cfg = Config.fromfile(DEMO)
    listed = cfg.metainfo.classes[::-1]
    write_folder(tmp_path, 'annotations/{split}.json', '{split}', (*listed, 'another'))
    (note,) = use_data_root(cfg, str(tmp_path))
    assert note.startswith('classes: in the order of the annotations')
    assert cfg.val_dataloader.dataset.metainfo['classes'] == listed


@pytest.mark.parametrize('what', ['ann_file', 'data_prefix', 'data_root', 'evaluator'])
def test_absolute_paths_of_other_data_do_not_stay_behind(tmp_path, what):
    old, new = (write_folder(tmp_path / n, 'annotations/{split}.json', '{split}', ('cat',)) for n in ('old', 'new'))
    cfg = Config.fromfile(DEMO)
    dataset = cfg.val_dataloader.dataset
    if what == 'ann_file':
        dataset.ann_file = f'{old}/annotations/val.json'
    elif what == 'data_prefix':
        dataset.data_prefix = dict(img=f'{old}/val/')
    elif what == 'data_root':
        dataset.data_root = f'{old}/'
    else:
        cfg.val_evaluator.ann_file = f'{old}/annotations/val.json'
    use_data_root(cfg, str(new))
    ann, images = read_back(cfg, 'val')
    assert ann.samefile(new / 'annotations/val.json') and images.samefile(new / 'val')
    assert Path(cfg.val_evaluator.ann_file).samefile(ann)


@pytest.mark.parametrize(
    'name, said', [('nosuch', 'does not exist'), ('a/annotations/val.json', 'is a file; give the folder')]
)
def test_a_folder_that_is_none_is_said_to_be_none(tmp_path, name, said):
    write_folder(tmp_path / 'a', 'annotations/{split}.json', '{split}', ('cat',))
    with pytest.raises(DataRootError, match=rf'the folder \S+ {said}'):
        use_data_root(Config.fromfile(DEMO), str(tmp_path / name))


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    write_folder(tmp_path / 'a', 'annotations/{split}.json', '{split}', ('cat',))
    monkeypatch.setenv('HOME', str(tmp_path))
    cfg = Config.fromfile(DEMO)
    use_data_root(cfg, '~/a')
    assert read_back(cfg, 'val')[0].is_file()


def test_roboflow_calls_val_valid(tmp_path):
    write_folder(tmp_path, '{split}/_annotations.coco.json', '{split}', ('cat', 'dog'))
    (tmp_path / 'val').rename(tmp_path / 'valid')
    cfg = Config.fromfile(DEMO)
    use_data_root(cfg, str(tmp_path))
    ann, folder = read_back(cfg, 'val')
    assert ann == tmp_path / 'valid' / '_annotations.coco.json' and (folder / 'val.jpg').is_file()
    (tmp_path / 'train').rename(tmp_path / 'gone')
    with pytest.raises(DataRootError, match='no annotations for train'):  # those of val are none
        use_data_root(Config.fromfile(DEMO), str(tmp_path))


@pytest.mark.parametrize(
    ('categories', 'said'),
    [
        ([], 'has no categories'),
        ([dict(id=1)], 'category 0 of the list has no name, but None'),
        ([dict(id=1, name='a'), dict(id=2, name=['b'])], r"category 1 of the list has no name, but \['b'\]"),
        ([dict(id=1, name='a'), dict(id=2, name='a')], 'two categories of the name a'),
    ],
)
def test_categories_without_names_are_one_message(tmp_path, categories, said):
    write_folder(tmp_path, '{split}.json', '.', ('cat', 'dog'))
    path = tmp_path / 'train.json'
    path.write_text(json.dumps(dict(json.loads(path.read_text()), categories=categories)))
    with pytest.raises(DataRootError, match=said):
        use_data_root(Config.fromfile(DEMO), str(tmp_path))
