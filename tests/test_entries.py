"""What a config entry is, however it names its class."""

import re

import pytest
from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config, ConfigDict
from mmengine.config.lazy import LazyObject
from mmengine.hooks import LoggerHook
from mmengine.registry import DATASETS as ROOT_DATASETS
from mmengine.registry import HOOKS, OPTIM_WRAPPERS, OPTIMIZERS, DefaultScope
from torch import nn
from torch.optim import AdamW

from mmdet_norms.cli.common import command
from mmdet_norms.entries import class_of, explain_unregistered, is_a, name_of, parameter_of, path_of, spell_out
from mmdet_norms.layers import BNET


class OwnCoco(CocoDataset):
    """Of a user, registered by the test that needs the name."""


@pytest.fixture
def own_coco():
    DATASETS.register_module(module=OwnCoco)
    yield OwnCoco
    del DATASETS._module_dict['OwnCoco']


SPELLINGS = [
    'CocoDataset',
    'mmdet.CocoDataset',
    'mmdet.datasets.CocoDataset',
    'mmdet.datasets.coco.CocoDataset',
    CocoDataset,
    LazyObject('mmdet.datasets', 'CocoDataset'),
]


@pytest.mark.parametrize('registry', [DATASETS, ROOT_DATASETS], ids=['mmdet', 'mmengine'])
@pytest.mark.parametrize('kind', SPELLINGS, ids=str)
def test_every_spelling_of_a_class_is_that_class(kind, registry):
    for entry in (kind, dict(type=kind, ann_file='a.json'), ConfigDict(type=kind)):
        assert class_of(entry, registry) is CocoDataset
        assert name_of(entry, registry) == 'CocoDataset'
        assert is_a(entry, 'CocoDataset', registry) and is_a(entry, CocoDataset, registry)
        assert is_a(entry, ('VOCDataset', 'mmdet.CocoDataset'), registry)
        assert not is_a(entry, 'VOCDataset', registry)


@pytest.mark.parametrize(
    'registry, name, cls', [(OPTIMIZERS, 'AdamW', AdamW), (HOOKS, 'LoggerHook', LoggerHook), (MODELS, 'BNET', BNET)]
)
def test_a_scope_is_that_of_the_registry_that_has_the_class(registry, name, cls):
    assert class_of(name, registry) is cls and class_of(f'mmengine.{name}', registry) is cls
    assert class_of(f'mmdet.{name}', registry) is None
    with DefaultScope.overwrite_default_scope('mmdet'), pytest.raises(KeyError):
        registry.build(dict(type=f'mmdet.{name}', params=[]))


@pytest.mark.parametrize('kind', ['OwnCoco', 'mmdet.OwnCoco', OwnCoco, 'CityscapesDataset', 'mmdet.LVISV1Dataset'])
def test_a_subclass_is_what_its_base_is_and_not_the_other_way_round(kind, own_coco):
    assert is_a(dict(type=kind), 'CocoDataset', DATASETS) and is_a(kind, 'BaseDetDataset', DATASETS)
    assert not is_a('CocoDataset', kind, DATASETS)
    assert name_of(kind, DATASETS) == getattr(kind, '__name__', str(kind)).rpartition('.')[2]


def test_what_somebody_registered_in_the_place_of_a_class_still_is_one():
    class Replaced(CocoDataset):
        pass

    try:
        DATASETS.register_module(name='CocoDataset', module=Replaced, force=True)
        assert is_a(CocoDataset, 'CocoDataset', DATASETS) and is_a('CocoDataset', CocoDataset, DATASETS)
    finally:
        DATASETS.register_module(name='CocoDataset', module=CocoDataset, force=True)


@pytest.mark.parametrize('entry', ['NoSuch', 'mmdet.NoSuch', 'no_such_package.CocoDataset', 'this', 'json.dumps'])
def test_what_nobody_registered_has_a_name_and_no_class(entry):
    # 'this' is a module that an import would execute, json.dumps a function that a path may name
    assert class_of(entry, DATASETS) is None or entry == 'json.dumps'
    assert name_of(entry, DATASETS) == entry.rpartition('.')[2]
    assert is_a(entry, entry, DATASETS) and not is_a(entry, 'VOCDataset', DATASETS)


@pytest.mark.parametrize('entry', [None, {}, dict(ann_file='a.json'), dict(type=None)])
def test_an_entry_without_a_type_is_nothing(entry):
    assert class_of(entry, DATASETS) is None and not is_a(entry, 'CocoDataset', DATASETS)


@pytest.mark.parametrize(
    'kind, name',
    [
        (nn.BatchNorm2d, 'BN'),
        ('BN2d', 'BN'),
        ('torch.nn.BatchNorm2d', 'BN'),
        (nn.SyncBatchNorm, 'SyncBN'),
        (nn.GroupNorm, 'GN'),
        ('torch.nn.modules.normalization.GroupNorm', 'GN'),
        ('mmengine.GN', 'GN'),
        (nn.LayerNorm, 'LN'),
        (nn.InstanceNorm2d, 'IN'),
        ('mmdet.ResNet', 'ResNet'),
    ],
    ids=str,
)
def test_names_of_norms_are_those_of_a_norm_cfg(kind, name):
    assert name_of(dict(type=kind)) == name


def test_an_argument_is_found_through_the_keyword_arguments_of_subclasses():
    assert parameter_of('PAAHead', 'norm_cfg', MODELS).default['type'] == 'GN'
    assert parameter_of('AmpOptimWrapper', 'clip_grad', OPTIM_WRAPPERS) is not None
    assert parameter_of('CheckpointHook', 'nonsense', HOOKS) is None and parameter_of('NoSuch', 'a', HOOKS) is None


def test_classes_that_were_read_out_of_a_config_can_be_written_again():
    cfg = Config(
        dict(a=dict(type=LazyObject('mmdet.datasets', 'CocoDataset')), b=[dict(type=CocoDataset, size=(1, 2))])
    )
    cfg.a = dict(cfg.a)  # reads the class
    with pytest.raises(SyntaxError):
        cfg.dump()
    spell_out(cfg)
    assert cfg.a.type == cfg.b[0].type == 'mmdet.datasets.coco.CocoDataset'
    assert DATASETS.get(cfg.a.type) is CocoDataset and cfg.b[0].size == (1, 2)
    compile(cfg.dump(), 'config', 'exec')


def test_the_text_of_a_config_names_classes_that_mmengine_finds():
    # as mmdet's own python-style configs import it; mmengine writes this path, and takes it for the function
    cfg = Config(dict(loss=dict(type=LazyObject('mmdet.models.losses.smooth_l1_loss', 'L1Loss'))))
    assert class_of(Config.fromstring(cfg.dump(), '.py').loss) is None
    spell_out(cfg)
    assert name_of(Config.fromstring(cfg.dump(), '.py').loss) == 'L1Loss'


@pytest.mark.parametrize('name', ['L1Loss', 'FocalLoss', 'ResNet', 'BN', 'BNET', 'ConvModule'])
def test_mmengine_finds_a_class_by_its_path(name):
    # by the place of its definition it does not find L1Loss: a function has the name of the module
    assert MODELS.get(path_of(class_of(name))) is class_of(name)


@pytest.mark.parametrize(
    'registry, kind, said',
    [
        (MODELS, 'xsemininet', r"type='xsemininet' names no model that is registered \(did you mean 'XSEMiniNet' or "),
        (MODELS, 'mmdet.FastRCN', r"type='mmdet.FastRCN' names no model .* 'FastRCNN'"),
        (DATASETS, 'ImageFoldr', r"type='ImageFoldr' names no dataset that is registered \(did you mean 'ImageFolder'"),
        (
            OPTIM_WRAPPERS,
            'zzz',
            r"type='zzz' names no optim wrapper that is registered; a class",
        ),
    ],
)
def test_a_name_that_nobody_registered_is_told_the_closest(registry, kind, said):
    with pytest.raises(KeyError) as raised:
        registry.build(dict(type=kind))
    assert re.match(said, explain_unregistered(raised.value))


@pytest.mark.parametrize('error', [KeyError('missing'), KeyError(3), KeyError()])
def test_other_key_errors_are_left_alone(error):
    assert explain_unregistered(error) is None


def test_the_commands_end_with_that_message(capsys):
    def main(argv):
        MODELS.build(dict(type='xsemininet')) if argv else {}['missing']

    with pytest.raises(SystemExit) as ended:
        command(main)(['build'])
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: type='xsemininet' names no model")
    with pytest.raises(KeyError, match='missing'):
        command(main)([])
