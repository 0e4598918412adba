"""What old torch answers by another name: both ways are asked on the torch that is installed."""

import re
import runpy
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmdet_norms.compat import torch_versions


@pytest.fixture(params=['this torch', 'torch 2.1'])
def ask(request, monkeypatch):
    """The module as it is, and as it is on a torch without the newer names."""
    if request.param == 'this torch':
        return torch_versions
    monkeypatch.delattr(torch.compiler, 'is_compiling', raising=False)
    monkeypatch.delattr(torch.amp, 'is_autocast_available', raising=False)
    return SimpleNamespace(**runpy.run_path(torch_versions.__file__))


def test_autocast(ask):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)  # the name that torch 2.1 knows
        assert not ask.autocast_is_on('cpu')
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert ask.autocast_is_on('cpu') and not ask.autocast_is_on('cuda')
        with torch.autocast('cpu', enabled=False):
            assert not ask.autocast_is_on('cpu')


def test_compilation_is_seen():
    def shifted(x):
        return x + (1 if torch_versions.is_compiling() else 2)

    assert not torch_versions.is_compiling()
    torch._dynamo.reset()
    assert torch.compile(shifted, backend='eager')(torch.zeros(1)).item() == 1
    assert shifted(torch.zeros(1)).item() == 2


def test_nothing_else_asks_by_a_name_that_old_torch_lacks():
    package = Path(torch_versions.__file__).parents[1]
    newer = r'torch\.compiler\.is_compiling|torch\.is_autocast_enabled|is_autocast_available'
    asking = {path.name for path in package.rglob('*.py') if re.search(newer, path.read_text(encoding='utf-8'))}
    assert asking == {'torch_versions.py'}
