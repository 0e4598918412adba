"""Optimizers of pytorch-optimizer: against their formulas, and as parts of a run."""

import subprocess
import sys

import pytest
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmdet_norms.errors import UserError

RANGER_LARS = dict(type='RangerLars', lr=1e-2, weight_decay=1e-3, betas=(0.9, 0.99), eps=1e-6)


def wrapper_of(model, optimizer, **wrapper):
    return build_optim_wrapper(model, dict(type='OptimWrapper', optimizer=optimizer, **wrapper))


def test_importing_the_package_imports_none_of_it():
    code = "import sys, mmdet_norms; sys.exit('pytorch_optimizer' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code]).returncode == 0


@pytest.mark.parametrize('name', ['Ranger', 'Ralamb', 'RangerLars'])
def test_without_the_package_one_error_says_what_to_install(monkeypatch, name):
    monkeypatch.setitem(sys.modules, 'pytorch_optimizer', None)
    with pytest.raises(UserError, match=rf"type='{name}' needs pytorch-optimizer.*pip install 'pytorch-optimizer>=4"):
        wrapper_of(nn.Linear(2, 2), dict(type=name))


@pytest.mark.parametrize('name', ['Ranger', 'Ralamb', 'RangerLars'])
def test_a_wrong_value_names_the_key(name):
    with pytest.raises(UserError, match=f"optim_wrapper.optimizer of type '{name}': beta2 must be"):
        wrapper_of(nn.Linear(2, 2), dict(type=name, betas=(0.9, 1.5)))
