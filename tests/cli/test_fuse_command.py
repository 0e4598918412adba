"""tools/fuse.py, and what tools/export.py asks for before it works."""

import builtins

import pytest
import torch

from helpers import tiny
from mmdet_norms.cli import export, fuse, weights
from mmdet_norms.commands import typed
from mmdet_norms.deploy import is_fused


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A config and the checkpoint of its model; the current folder."""
    config = tiny.write_config(tmp_path)
    model = weights.built(weights.read_config(str(config)).model, device='cpu')
    torch.save(dict(meta=dict(dataset_meta=dict(classes=tiny.CLASSES)), state_dict=model.state_dict()), 'mine.pth')
    return tmp_path


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fails(capsys, main, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_it_writes_what_export_writes(folder, capsys):
    fuse.main(['tiny.py', 'mine.pth', 'fused.pth'])
    export.main(['tiny.py', 'mine.pth', 'exported.pth'])
    fused, exported = (torch.load(name, weights_only=True) for name in ('fused.pth', 'exported.pth'))
    assert is_fused(fused) and fused['meta'] == exported['meta']
    assert fused['state_dict'].keys() == exported['state_dict'].keys()
    assert all(torch.equal(value, exported['state_dict'][key]) for key, value in fused['state_dict'].items())


def test_other_files_than_checkpoints_are_refused(folder, capsys):
    assert 'name the checkpoint *.pth' in fails(capsys, fuse.main, 'tiny.py', 'mine.pth', 'out.pkl')
    assert f'{typed("export")} writes graphs' in fails(capsys, fuse.main, 'tiny.py', 'mine.pth', 'out.onnx')
    assert 'is CKPT itself' in fails(capsys, fuse.main, 'tiny.py', 'mine.pth', 'mine.pth', '--force')


@pytest.mark.parametrize('absent', ['onnx', 'onnxscript'])
def test_a_graph_without_its_packages_is_refused_before_anything_is_read(absent, monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split('.')[0] == absent:
            raise ModuleNotFoundError(f'No module named {absent!r}', name=absent)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', without)
    said = fails(capsys, export.main, 'no-config.py', 'none.pth', 'out.onnx')
    assert f'No module named {absent!r}' in said and 'pip install onnx onnxscript' in said
