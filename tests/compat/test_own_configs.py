"""Configs named ``mmdet_norms::...``, by mmengine's own functions."""

import subprocess
import sys

import mmengine.config.config
import mmengine.config.utils
import mmengine.hub.hub
import pytest
from mmdet import registry as mmdets
from mmengine.config import Config
from mmengine.hub import get_config, get_model
from mmengine.registry import Registry
from mmengine.registry import root as mmengines

from mmdet_norms.models import NormResNet
from mmdet_norms_start import own_configs

DEMO = 'demo/mask-rcnn_r50_fpn_bnet5_shapes.py'
PUBLISHED = 'bnet/faster-rcnn_r50_fpn_bnet5_1x_coco.py'


def test_mmengine_asks_by_these_names():
    for module, names in {
        mmengine.config.utils: {'_get_cfg_metainfo', '_get_external_cfg_base_path'},
        mmengine.config.config: {'get_installed_path', '_get_external_cfg_base_path'},
        mmengine.hub.hub: {'get_installed_path', '_get_cfg_metainfo', '_get_external_cfg_base_path'},
    }.items():
        assert {name for name in own_configs._FUNCTIONS if hasattr(module, name)} == names
    assert 'mmdet' in mmengine.config.utils.MODULE2PACKAGE


@pytest.fixture
def derived(tmp_path):
    """A config of somebody else's, with one of ours as its base."""
    path = tmp_path / 'a folder' / 'mine.py'
    path.parent.mkdir()
    path.write_text(f"_base_ = 'mmdet_norms::{DEMO}'\nmodel = dict(backbone=dict(depth=101))\n")
    return path


def without_scope(node):
    if isinstance(node, dict):
        return {key: without_scope(value) for key, value in node.items() if key != '_scope_'}
    return [without_scope(value) for value in node] if isinstance(node, (list, tuple)) else node


def test_ours_can_be_a_base(derived):
    cfg = Config.fromfile(derived)
    expected = Config.fromfile(own_configs.folder() / 'configs' / DEMO)
    expected.model.backbone.depth = 101
    assert without_scope(cfg.to_dict()) == without_scope(expected.to_dict())
    assert cfg.train_dataloader.dataset._scope_ == 'mmdet_norms'  # what the registries below are for
    assert cfg.train_dataloader.dataset.type == 'CocoDataset'


def test_ours_can_be_a_base_before_the_package_is_imported(derived):
    """As a start of Python with ``mmdet_norms.pth`` in site-packages leaves it to mmdet's own tools."""
    code = (
        'import sys, mmdet_norms_start.hook\n'
        'from mmengine.config import Config\n'
        f'cfg = Config.fromfile({str(derived)!r}, import_custom_modules=False)\n'
        "print(cfg.model.backbone.depth, 'mmdet_norms' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert done.stdout.split() == ['101', 'False'], done.stderr


@pytest.mark.parametrize('name', [DEMO, PUBLISHED])
def test_hub_gets_ours(name):
    cfg = get_config(f'mmdet_norms::{name}')
    assert cfg.filename == str(own_configs.folder() / 'configs' / name)


def test_hub_builds_ours():
    model = get_model(f'mmdet_norms::{DEMO}')
    assert type(model.backbone) is NormResNet and type(model).__module__.startswith('mmdet.')


def test_hub_says_that_there_are_no_weights():
    with pytest.raises(AssertionError, match='Cannot find `Weights`'):
        get_config(f'mmdet_norms::{PUBLISHED}', pretrained=True)


def test_a_wrong_name_is_told_where_it_was_looked_for():
    with pytest.raises(FileNotFoundError, match=r'no config bnet/none\.py: there is no file .*none\.py'):
        get_config('mmdet_norms::bnet/none.py')


def test_configs_of_other_packages_are_found_as_before():
    assert get_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py').model.type == 'RetinaNet'


def test_our_scope_is_mmdets():
    """Of every registry: what mmdet's finds, ours does, and so does one that was asked first."""
    ours = {key: value for key, value in vars(mmdets).items() if isinstance(value, Registry) and value.scope == 'mmdet'}
    assert len(ours) >= 17
    for registry in ours.values():
        child = registry.children['mmdet_norms']
        for name in [*registry.module_dict, *registry.parent.module_dict]:
            assert child.get(name) is registry.get(name), name
    built = mmengines.MODELS.build(dict(type='NormResNet', depth=50, _scope_='mmdet_norms'))
    assert type(built) is NormResNet


def test_our_scope_imports_what_mmdet_registers(monkeypatch):
    """mmengine asks this of the registry that it looks into, and not of those above."""
    asked = []
    monkeypatch.setattr(mmdets.METRICS, 'import_from_location', lambda: asked.append('mmdet'))
    assert mmdets.METRICS.children['mmdet_norms'].get('CocoMetric') is not None and asked == ['mmdet']
