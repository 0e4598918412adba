"""The options of the tools on configs that spell their classes in other ways: with a scope, as classes, by paths."""

import json

import pytest
from mmdet.datasets import CocoDataset
from mmdet.evaluation import CocoMetric
from mmdet.registry import DATASETS, HOOKS, METRICS, OPTIM_WRAPPERS
from mmengine.config import Config
from mmengine.hooks import LoggerHook
from mmengine.optim import OptimWrapper

from helpers import tiny
from helpers.python_style import with_classes, write_python_style
from mmdet_norms.cli import test, train
from mmdet_norms.cli.common import UserError, read_config
from mmdet_norms.datasets.locate import DataRootError, use_data_root
from mmdet_norms.entries import class_of, is_a, name_of, path_of


def scoped(node):
    """Every type with its scope."""
    if isinstance(node, dict):
        return type(node)(
            {
                key: _scoped(value) if key == 'type' and isinstance(value, str) else scoped(value)
                for key, value in node.items()
            }
        )
    return type(node)(map(scoped, node)) if isinstance(node, (list, tuple)) else node


def _scoped(name):
    return f'mmengine.{name}' if name in ('AdamW', 'LoggerHook', 'OptimWrapper', 'Pretrained') else f'mmdet.{name}'


def dotted(node):
    return with_classes(node, path_of)


@pytest.fixture(scope='module', params=['plain', 'scoped', 'paths', 'classes'])
def spelled(request, tmp_path_factory):
    """The tiny config in one of the spellings."""
    folder = tmp_path_factory.mktemp(request.param)
    config = tiny.write_config(folder)
    cfg = Config.fromfile(config)
    cfg.test_evaluator = dict(cfg.test_evaluator, classwise=False)
    if request.param == 'classes':
        return write_python_style(cfg, folder / 'spelled.py')
    entries = cfg.to_dict()
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader', 'test_evaluator', 'optim_wrapper'):
        entries[name] = {'plain': lambda node: node, 'scoped': scoped, 'paths': dotted}[request.param](entries[name])
    hooks = entries['default_hooks']
    entries['default_hooks'] = {'plain': lambda node: node, 'scoped': scoped, 'paths': dotted}[request.param](hooks)
    Config(entries).dump(folder / 'spelled.py')
    return folder / 'spelled.py'


@pytest.fixture
def folder(tmp_path):
    """A data set with three other classes."""
    tiny.write_dataset(tmp_path / 'data')
    for split in ('train', 'val'):
        content = json.loads((tmp_path / 'data' / 'annotations.json').read_text())
        content['categories'] = [dict(id=i + 1, name=name) for i, name in enumerate(('cat', 'dog', 'cow'))]
        (tmp_path / 'data' / f'{split}.json').write_text(json.dumps(content))
    (tmp_path / 'data' / 'annotations.json').unlink()
    return tmp_path / 'data'


def train_config(*arguments):
    return train.train_config(train.parse_args([str(argument) for argument in arguments]))


def test_config_of(*arguments):
    return test.test_config(test.parse_args([str(argument) for argument in arguments]))


test_config_of.__test__ = False


def runs_again(cfg, folder):
    """What lands in the work dir is a config with the same meaning."""
    path = folder / 'dumped.py'
    cfg.dump(path)
    assert name_of(read_config(str(path)).train_dataloader.dataset, DATASETS) == 'CocoDataset'


def test_another_data_root_reaches_paths_classes_and_heads(spelled, folder, tmp_path):
    cfg = train_config(spelled, '--data-root', folder)
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert class_of(dataset, DATASETS) is CocoDataset and dataset.data_root == f'{folder}/'
        assert tuple(dataset.metainfo['classes']) == ('cat', 'dog', 'cow')
    assert cfg.model.roi_head.bbox_head.num_classes == cfg.model.roi_head.mask_head.num_classes == 3
    runs_again(cfg, tmp_path)


def test_mixed_precision_takes_the_place_of_the_optimizer_wrapper(spelled, tmp_path):
    cfg = train_config(spelled, '--amp')
    assert name_of(cfg.optim_wrapper, OPTIM_WRAPPERS) in ('CPUAmpOptimWrapper', 'AmpOptimWrapper')
    assert name_of(cfg.default_hooks.logger, HOOKS) == 'TimedLoggerHook'
    runs_again(cfg, tmp_path)


def test_hooks_that_the_config_has_are_not_added_again(spelled, tmp_path):
    hooks = [
        dict(type='mmdet.NormHook'),
        dict(type='mmdet_norms.engine.ResultsHook', filename='r.json'),
        dict(type='mmdet_norms.engine.fuse.FuseHook', fuse=False),
    ]
    config = tmp_path / 'more.py'
    config.write_text(f'{spelled.read_text()}\ncustom_hooks = {hooks!r}\n')
    cfg = test_config_of(config, spelled, '--fuse')
    assert [name_of(hook, HOOKS) for hook in cfg.custom_hooks] == ['NormHook', 'ResultsHook', 'FuseHook']
    assert cfg.custom_hooks[-1].fuse is True


def test_the_options_of_testing_act_on_the_metric_and_the_drawing_hook(spelled, tmp_path):
    cfg = test_config_of(spelled, spelled, '--eval', 'segm', '--per-class', '--show-dir', tmp_path / 'shown')
    assert cfg.test_evaluator.metric == ['segm'] and name_of(cfg.test_evaluator, METRICS) == 'PerClassCocoMetric'
    assert is_a(cfg.default_hooks.visualization, 'DetVisualizationHook', HOOKS)
    assert cfg.default_hooks.visualization.test_out_dir == str(tmp_path / 'shown')
    runs_again(cfg, tmp_path)


class OwnCoco(CocoDataset):
    METAINFO = dict(classes=('disc', 'box'), palette=[(0, 0, 0)] * 2)


class OwnMetric(CocoMetric):
    pass


class OwnLogger(LoggerHook):
    pass


class OwnWrapper(OptimWrapper):
    pass


@pytest.fixture
def own(tmp_path):
    """The tiny config with a user's subclasses, which are in no registry but that of a python-style config."""
    cfg = Config.fromfile(tiny.write_config(tmp_path))
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.type = OwnCoco
        cfg[f'{split}_dataloader'].dataset.pop('metainfo')
    cfg.test_evaluator.type = OwnMetric
    cfg.optim_wrapper.type = OwnWrapper
    cfg.default_hooks.logger.type = OwnLogger
    return cfg


def test_subclasses_are_moved_and_evaluated_and_keep_their_code(own, folder, monkeypatch):
    use_data_root(own, str(folder))
    assert own.train_dataloader.dataset.metainfo['classes'] == ('cat', 'dog', 'cow')
    assert own.model.roi_head.bbox_head.num_classes == 3
    monkeypatch.setattr(test, 'load_config', lambda args: own)
    cfg = test_config_of('x.py', __file__, '--eval', 'segm', '--per-class')
    assert cfg.test_evaluator.type is OwnMetric
    assert cfg.test_evaluator.metric == ['segm'] and cfg.test_evaluator.classwise is True


def test_a_logger_and_an_optimizer_wrapper_of_the_users_own_are_left_to_them(own, monkeypatch):
    monkeypatch.setattr('mmdet_norms.cli.common.read_config', lambda name: own)
    assert 'OwnLogger' in train_config('x.py').default_hooks.logger.type
    with pytest.raises(UserError, match=r"--amp replaces OptimWrapper, but .* optim_wrapper\.type='OwnWrapper'"):
        train_config('x.py', '--amp')


@pytest.mark.parametrize(
    'name, reads',
    [
        ('pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py', 'VOCDataset'),
        ('openimages/retinanet_r50_fpn_32xb2-1x_openimages.py', 'OpenImagesDataset'),
        ('faster_rcnn/faster-rcnn_r50_fpn_8xb8-amp-lsj-200e_coco.py', None),
        ('cityscapes/faster-rcnn_r50_fpn_1x_cityscapes.py', None),
    ],
)
@pytest.mark.parametrize('style', ['strings', 'classes'])
def test_what_does_not_read_the_format_of_coco_is_refused_in_words(name, reads, style, folder):
    cfg = read_config(f'mmdet::{name}')
    cfg = with_classes(cfg) if style == 'classes' else cfg
    if reads is None:
        use_data_root(cfg, str(folder))
        compile(cfg.dump(), 'config', 'exec')
        return
    before = cfg.copy()
    with pytest.raises(DataRootError, match=f'train_dataloader reads a {reads}, which is no CocoDataset'):
        use_data_root(cfg, str(folder))
    assert cfg.train_dataloader == before.train_dataloader


def test_a_dataset_that_nobody_registered_is_said_to_be_so(folder, tmp_path):
    cfg = Config.fromfile(tiny.write_config(tmp_path))
    cfg.train_dataloader.dataset.type = 'NoSuchCoco'
    with pytest.raises(DataRootError, match=r'reads a NoSuchCoco, which nobody registered; .*custom_imports'):
        use_data_root(cfg, str(folder))


@pytest.mark.slow
def test_a_python_style_config_without_a_scope_trains_and_is_tested(tmp_path, folder):
    (tmp_path / 'tiny').mkdir()
    cfg = Config.fromfile(tiny.write_config(tmp_path / 'tiny'))
    cfg.default_scope = None  # as in mmdet's own
    config = str(write_python_style(cfg, tmp_path / 'classes.py'))
    run, more = tmp_path / 'run', ['--data-root', str(folder), '--norm', 'bnet3']
    train.main([config, '--work-dir', str(run), '--amp', *more])
    # the config that lies in the work dir, and the one that it was made from
    for path, options in ((str(run / 'classes.py'), ['--fuse', '--show-dir', str(tmp_path / 'shown')]), (config, more)):
        work_dir = tmp_path / f'tested{len(options)}'
        arguments = [path, str(run / 'epoch_1.pth'), '--work-dir', str(work_dir), '--per-class', '--eval', 'bbox']
        test.main([*arguments, *options])
        assert 'bbox_cat_precision' in json.loads((work_dir / 'results.json').read_text())
    assert len(list((tmp_path / 'shown').rglob('*.png'))) == 4
