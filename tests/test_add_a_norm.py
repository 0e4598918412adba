"""The norm of docs/add-a-norm.md: one file and one call, and every part of the package knows it."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from mmcv.cnn import ConvModule, build_norm_layer
from mmcv.cnn import is_norm as mmcv_is_norm
from mmengine.model import constant_init
from mmengine.optim import build_optim_wrapper
from torch import nn
from torch.utils.data import DataLoader

import mmdet_norms
from helpers.tiny import write_config
from matrix import rendering  # noqa: F401  (has all rows)
from matrix.norms import NORMS as COLUMNS
from matrix.norms import ORACLE, Norm
from matrix.situation import SITUATIONS, run_cell
from matrix.test_numbers import EVAL_FORMULA, plain
from mmdet_norms import PLACEMENTS, apply_norm, convert_norms, fuse, registry
from mmdet_norms.benchmark.layers import named_layers, norm_cfg_of
from mmdet_norms.cli import benchmark, train
from mmdet_norms.cli import fuse as fuse_command
from mmdet_norms.engine.norms import require_whole_groups
from mmdet_norms.errors import UserError
from mmdet_norms.layers import NORMS, contract_of
from mmdet_norms.norms import _by_name, register_norm

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / 'docs' / 'add-a-norm.md'


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The page's file, imported as a config's custom_imports do; forgotten again after the test."""
    (tmp_path / 'gain_bn.py').write_text(re.search(r'```python\n(.*?)```', PAGE.read_text(), re.S)[1])
    monkeypatch.syspath_prepend(str(tmp_path))
    tables = [NORMS, PLACEMENTS, _by_name, registry.NORM_LAYERS.module_dict]
    before = [dict(table) for table in tables]
    yield importlib.import_module('gain_bn')
    for table, entries in zip(tables, before):
        table.clear()
        table.update(entries)
    sys.modules.pop('gain_bn', None)


def test_the_page_is_short_and_its_norm_has_twenty_lines():
    text = PAGE.read_text()
    assert len(text.splitlines()) <= 50
    body = re.search(r'class .*?\n\n\n', text, re.S)[0]
    assert len([line for line in body.splitlines() if line.strip()]) <= 20


def test_configs_is_norm_and_the_optimizer_rule_know_it(module):
    attribute, layer = build_norm_layer(dict(type='GainBN'), 4, postfix=1)
    assert attribute == 'bn1' and isinstance(layer, module.GainBN) and mmcv_is_norm(layer)
    assert 'GainBN' in registry.norm_names()
    model = nn.Sequential(nn.Conv2d(3, 4, 1), layer)
    cfg = dict(optimizer=dict(type='SGD', lr=1, weight_decay=1), paramwise_cfg=dict(norm_decay_mult=0))
    groups = build_optim_wrapper(model, cfg).optimizer.param_groups
    assert [group['weight_decay'] for group in groups if group['params'][0] is layer.gain] == [0]
    constant_init(layer, 1)


def test_the_choice_by_name_puts_it_where_its_placement_says(module):
    detector = dict(type='FasterRCNN', backbone=dict(type='ResNet', depth=50, norm_cfg=dict(type='BN', eps=1e-3)))
    placed = apply_norm(dict(detector, neck=dict(type='FPN')), 'gain')
    assert placed['backbone']['norm_cfg'] == dict(type='GainBN', eps=1e-3) and placed['backbone']['norm_eval'] is False
    assert placed['neck']['norm_cfg'] == dict(type='GainBN')
    assert apply_norm(placed, 'bn')['backbone']['norm_cfg']['type'] == 'BN'
    network = dict(type='ImageClassifier', backbone=dict(type='XSEMiniNet', norm='bn'))
    assert apply_norm(network, 'gain')['backbone']['norm_cfg'] == dict(type='GainBN')


@pytest.mark.filterwarnings('ignore::UserWarning')
def test_the_commands_train_and_fold_it(module, tmp_path):
    config = write_config(tmp_path, "custom_imports = dict(imports=['mmdet_norms', 'gain_bn'])\n")
    run = tmp_path / 'run'
    train.main([str(config), '--norm', 'gain', '--work-dir', str(run), '--cfg-options', 'train_cfg.max_epochs=1'])
    checkpoint = run / 'epoch_1.pth'
    gains = [value for key, value in torch.load(checkpoint)['state_dict'].items() if key.endswith('.gain')]
    assert len(gains) > 20 and any((gain != 1).all() for gain in gains)
    fuse_command.main([str(config), str(checkpoint), str(tmp_path / 'fused.pth'), '--norm', 'gain'])
    assert not any('gain' in key for key in torch.load(tmp_path / 'fused.pth')['state_dict'])


def test_it_takes_batch_norms_place_in_any_torch_model(module):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), torch.randn(2, 3, 5, 5)
    expected = model(x)
    convert_norms(model, 'gainbn')
    assert isinstance(model[1], module.GainBN)
    torch.testing.assert_close(model.eval()(x), expected)


def test_it_is_folded_into_the_convolution(module):
    model = ConvModule(3, 8, 3, norm_cfg=dict(type='GainBN')).eval()
    for value in (*model.norm.parameters(), *model.norm.buffers()):
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5, 2)
    fused, x = fuse(model), torch.randn(2, 3, 6, 6)
    assert not any(isinstance(part, module.GainBN) for part in fused.modules())
    torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_benchmark_measures_it(module, tmp_path):
    assert 'gain' in named_layers() and norm_cfg_of('gain') == dict(type='GainBN')
    small = ['--size', '2', '8', '6', '5', '--repeats', '1', '--warmup', '0', '--device', 'cpu', '--level', 'layer']
    benchmark.main([*small, '--out', str(tmp_path), '--mode', 'forward', '--layers', 'gain'])
    rows = json.loads((tmp_path / 'benchmark.json').read_text())['groups'][0]['rows']
    assert [row['name'] for row in rows][:2] == ['bn', 'gain'] and rows[1]['times_ms']


# The rows of several processes are of one run for all columns of the package.
ROWS = [name for name in SITUATIONS if not re.search('golden|process', name)]


@pytest.mark.parametrize('situation', ROWS)
@pytest.mark.filterwarnings('ignore')
def test_every_row_of_the_matrix(module, situation, monkeypatch):
    monkeypatch.setitem(COLUMNS, 'GainBN', Norm(dict(type='GainBN')))
    monkeypatch.setitem(EVAL_FORMULA, 'GainBN', lambda z, n: plain(z, n.bn) * n.gain)
    monkeypatch.setitem(ORACLE, 'GainBN', 'tests/test_add_a_norm.py::test_every_row_of_the_matrix')
    run_cell('GainBN', situation)


def test_wrong_calls_are_answered(module):
    with pytest.raises(UserError, match=r"placement='everywere' is unknown \(did you mean 'everywhere'\?\)"):
        register_norm(module.GainBN, name='gain', placement='everywere')
    with pytest.raises(UserError, match="name='bnet5' is the name of another norm"):
        register_norm(module.GainBN, name='bnet5')
    other = type('GainBN', (nn.Identity,), {})
    with pytest.raises(UserError, match="cls='GainBN' is the name of another norm"):
        register_norm(other, name='other')
    with pytest.raises(UserError, match='must be a class of modules'):
        register_norm(module.GainBN(4), name='gain')
    register_norm(module.GainBN, name='gain', placement='heads')  # again, as when its module is imported anew
    assert not PLACEMENTS['gain'].backbone and mmdet_norms.register_norm is register_norm


class Odd(nn.BatchNorm2d):
    """A user's own batch norm, to which our names are those of other things."""

    folded, fold_into, centred_weight = True, None, False

    def __init__(self, num_features):
        super().__init__(num_features)
        self.norm_batch = nn.Identity()

    def contract(self):
        return 'signed'


def test_what_else_is_called_as_we_call_things_makes_no_norm_of_ours():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Odd(4)).eval()
    assert contract_of(model[1]) is contract_of(nn.BatchNorm2d)
    model.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(fuse(model)(x), model(x))
    require_whole_groups(model, DataLoader([x, x], batch_size=2))
