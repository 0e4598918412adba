"""Names: every norm resolves wherever mmcv looks for it, and a wrong name is told what to write."""

import ast
import keyword
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmcv.cnn import ConvModule, build_norm_layer
from mmcv.cnn import is_norm as mmcv_is_norm
from mmengine.config import Config
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import DefaultScope
from mmengine.utils.dl_utils.misc import is_norm as mmengine_is_norm
from torch import nn

import mmdet_norms
from mmdet_norms import NORM_LAYERS, layers
from mmdet_norms.layers._args import ConfigError

PACKAGE = Path(mmdet_norms.__file__).parent


@pytest.fixture(params=[None, 'mmdet'], ids=['no default scope', 'scope mmdet'])
def scope(request):
    if request.param is None:
        yield
        return
    with DefaultScope.overwrite_default_scope(request.param):
        yield


def test_norm_layers_is_the_registry_that_mmcv_asks():
    assert NORM_LAYERS is ROOT_MODELS


@pytest.mark.parametrize('name', layers.NORMS)
def test_every_layer_builds_by_name(name, scope):
    assert isinstance(build_norm_layer(dict(type=name), 64)[1], getattr(layers, name))


def test_bnet_is_named_after_its_position_and_takes_requires_grad(scope):
    name, layer = build_norm_layer(dict(type='BNET', kernel_size=5, requires_grad=False), 64, postfix=3)
    assert name == 'bnet3' and layer.kernel_size == 5 and not any(p.requires_grad for p in layer.parameters())


def test_bnet_goes_wherever_a_norm_cfg_is_accepted(scope):
    from mmdet.models.backbones import ResNet
    from mmdet.models.necks import FPN

    norm_cfg = dict(type='BNET', kernel_size=3)
    assert isinstance(ConvModule(3, 8, 1, norm_cfg=norm_cfg).norm, layers.BNET)
    neck = FPN([8, 16], 8, num_outs=2, norm_cfg=norm_cfg)
    assert sum(isinstance(m, layers.BNET) for m in neck.modules()) == 4
    stock = ResNet(18, base_channels=4, norm_cfg=norm_cfg)
    assert sum(isinstance(m, layers.BNET) for m in stock.modules()) == 20


@pytest.mark.parametrize('wrong, hint', [('BNTE', "'BNET'"), ('bnet', "'BNET'"), ('bn', "'BN'"), ('Groupnorm', '')])
def test_a_misspelt_name_is_answered_with_the_key_a_suggestion_and_all_names(wrong, hint, scope):
    with pytest.raises(KeyError) as error:
        build_norm_layer(dict(type=wrong), 64)
    message = str(error.value)
    assert f'norm_cfg.type={wrong!r}' in message and hint in message and 'BN, ' in message and 'BNET' in message
    assert isinstance(error.value, ConfigError)
    assert '\n' not in message and not message.startswith('"')


class OwnNorm(nn.Module):
    """One that names no abbreviation."""

    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features, 1, 1))

    def forward(self, x):
        return x * self.weight


def test_a_norm_without_abbreviation_is_a_norm_and_not_called_by_a_keyword(monkeypatch):
    monkeypatch.setitem(layers.NORMS, 'OwnNorm', OwnNorm)
    name, layer = build_norm_layer(dict(type=OwnNorm), 4)
    assert name == 'norm_layer' and mmcv_is_norm(layer) and mmengine_is_norm(layer)
    module = ConvModule(4, 4, 1, norm_cfg=dict(type=OwnNorm)).eval()
    exported = torch.export.export(module, (torch.zeros(1, 4, 2, 2),))
    assert exported.module()(torch.zeros(1, 4, 2, 2)).shape == (1, 4, 2, 2)


@pytest.mark.parametrize('name', layers.NORMS)
def test_every_layer_is_a_norm_and_can_be_named_in_code(name):
    attribute, layer = build_norm_layer(dict(type=name), 64)
    assert attribute.isidentifier() and not keyword.iskeyword(attribute)
    assert mmcv_is_norm(layer) and mmengine_is_norm(layer)
    assert not mmcv_is_norm(layer, exclude=type(layer)) and not mmcv_is_norm(nn.Conv2d(1, 1, 1))


def test_stock_instance_norm_keeps_the_name_of_its_checkpoints():
    assert build_norm_layer(dict(type='IN'), 4)[0] == 'in' and mmcv_is_norm(nn.InstanceNorm2d(4))


@pytest.mark.parametrize('keys', [dict(num_channels=64), dict(num_features=64)])
def test_group_norm_takes_its_channels_by_either_name(keys):
    # mmcv 2.0.0 and mmpretrain say num_channels to whatever is called GN
    layer = ROOT_MODELS.build(dict(type='GN', num_groups=4, **keys))
    assert (layer.num_channels, layer.num_groups) == (64, 4)


@pytest.mark.parametrize('keys', [dict(num_channels=64, num_features=64), {}])
def test_group_norm_wants_its_channels_once(keys):
    with pytest.raises(ConfigError, match='two names of the number of channels; give one of them'):
        layers.GN(**keys)


def test_stock_norms_still_build(scope):
    assert isinstance(build_norm_layer(dict(type='GN', num_groups=4), 8)[1], nn.GroupNorm)
    assert isinstance(build_norm_layer(dict(type='BN'), 8)[1], nn.BatchNorm2d)


def test_importing_twice_registers_once():
    mmdet_norms.registry.register_norm_layers()
    build_norm_layer(dict(type='BNET'), 8)


def test_custom_imports_in_a_config_is_all_that_a_stock_tool_needs(tmp_path):
    """In processes that have not imported the package; with a default scope and without one."""
    for name, default_scope in (('with', "default_scope = 'mmdet'\n"), ('without', '')):
        (tmp_path / f'{name}.py').write_text(
            default_scope + "custom_imports = dict(imports=['mmdet_norms'], allow_failed_imports=False)\n"
            "norm_cfg = dict(type='BNET', kernel_size=7)\n"
        )
    code = (
        'import os, sys; from mmengine.config import Config; from mmcv.cnn import build_norm_layer\n'
        "assert 'mmdet_norms' not in sys.modules\n"
        "name = 'without' if os.fork() else 'with'\n"
        "cfg = Config.fromfile(f'{name}.py'); print(name, build_norm_layer(cfg.norm_cfg, 4)[0], flush=True)\n"
        "sys.exit(os.wait()[1] if name == 'without' else 0)"
    )
    env = {**os.environ, 'PYTHONPATH': str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert {'with bnet', 'without bnet'} <= set(done.stdout.splitlines())


def _imports(path: Path) -> set[str]:
    """Absolute names of the modules that a file of the package imports."""
    names = set()
    package = ['mmdet_norms', *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names.add('.'.join(base + ([node.module] if node.module else [])))
    return names


def test_layers_import_torch_and_each_other_only():
    for path in (PACKAGE / 'layers').glob('*.py'):
        for name in _imports(path):
            top = name.split('.')[0]
            # the last two of them import torch only, which tests/test_rooms.py sees to
            ours = name.startswith(
                tuple(
                    f'mmdet_norms.{p}' for p in ('layers', 'kernels', 'compat.torch_versions', 'compat.torch_internals')
                )
            )
            assert ours or top == 'torch' or top in sys.stdlib_module_names, f'{path.name} imports {name}'


@pytest.mark.parametrize(
    'below, above',
    [
        ('kernels', ('layers', 'models', 'registry', 'placement', 'engine', 'cli')),
        ('registry.py', ('models', 'placement', 'engine', 'cli', 'datasets')),
        ('models', ('placement', 'engine', 'cli', 'datasets')),
        ('entries.py', ('placement', 'models', 'registry', 'layers', 'engine', 'datasets', 'cli')),
        ('placement', ('models', 'registry', 'engine', 'cli')),
        ('engine', ('cli',)),
        ('compat', ('layers', 'models', 'registry', 'placement', 'engine', 'cli')),
    ],
)
def test_imports_run_downwards(below, above):
    where = PACKAGE / below
    for path in where.rglob('*.py') if where.is_dir() else [where]:
        for name in _imports(path):
            assert not name.startswith(tuple(f'mmdet_norms.{module}' for module in above)), f'{path} imports {name}'


def test_the_shapes_config_lists_the_classes_that_the_generator_draws():
    from mmdet_norms.datasets.shapes import METAINFO

    cfg = Config.fromfile(PACKAGE.parent / 'configs' / '_base_' / 'datasets' / 'shapes.py')
    assert dict(cfg.metainfo) == METAINFO
