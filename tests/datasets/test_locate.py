"""One config, any folder in COCO format: paths, layout and classes follow ``--data-root``."""

import json
from pathlib import Path

import pytest
from mmengine.config import Config

from mmdet_norms.datasets.locate import DataRootError, use_data_root

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / 'configs' / 'demo' / 'mask-rcnn_r50_fpn_bnet5_shapes.py'
COCO = ROOT / 'configs' / 'bnet' / 'cascade-mask-rcnn_r50_fpn_bnet5_1x_coco.py'
SHARED = ROOT.parent / 'shared' / 'data'


def write_folder(root, annotations, images, classes):
    """A data set of one image; ``{split}`` in the names is replaced."""
    for split in ('train', 'val'):
        ann, folder = root / annotations.format(split=split), root / images.format(split=split)
        ann.parent.mkdir(parents=True, exist_ok=True), folder.mkdir(parents=True, exist_ok=True)
        (folder / f'{split}.jpg').touch()
        content = dict(
            images=[dict(id=1, file_name=f'{split}.jpg', width=64, height=64)],
            annotations=[],
            categories=[dict(id=i * 10, name=name) for i, name in reversed(list(enumerate(classes)))],
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
            lambda root: write_folder(root, 'annotations/{split}.json', 'nowhere', ('cat',)),
            r'image train.jpg of .* is in',
        ),
    ],
)
def test_a_folder_without_the_data_is_one_error_that_says_what_was_looked_for(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(DataRootError, match=message):
        use_data_root(Config.fromfile(DEMO), str(tmp_path))


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
