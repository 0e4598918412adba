"""No tool writes over what it reads, or over what it did not make."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers import tiny
from mmdet_norms import fuse
from mmdet_norms.cli import convert_checkpoint, export, weights
from mmdet_norms.deploy import export_onnx, is_fused, save_fused


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A config and the checkpoint of its model; the current folder."""
    config = tiny.write_config(tmp_path)
    model = weights.built(weights.read_config(str(config)).model, device='cpu')
    meta = dict(epoch=1, iter=2, dataset_meta=dict(classes=tiny.CLASSES))
    torch.save(dict(meta=meta, state_dict=model.state_dict()), tmp_path / 'mine.pth')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fails(capsys, *arguments, main=export.main):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_export_writes_over_none_of_its_inputs_under_whatever_name(folder, capsys):
    before = (folder / 'mine.pth').read_bytes(), (folder / 'tiny.py').read_bytes()
    os.symlink('mine.pth', folder / 'link.pth')
    os.link(folder / 'mine.pth', folder / 'hard.pth')
    os.link(folder / 'tiny.py', folder / 'config.pth')
    for out in ('mine.pth', './data/../mine.pth', folder / 'mine.pth', 'link.pth', 'hard.pth'):
        for force in ([], ['--force']):
            assert f'OUT {Path(out)} is CKPT itself' in fails(capsys, 'tiny.py', 'mine.pth', out, *force)
    assert 'OUT mine.pth is CKPT itself' in fails(capsys, 'tiny.py', 'link.pth', 'mine.pth')
    assert 'is the config itself' in fails(capsys, 'tiny.py', 'mine.pth', 'config.pth', '--force')
    (folder / 'r18.pth').write_bytes(before[0])
    init_cfg = ['model.backbone.init_cfg.type=Pretrained', 'model.backbone.init_cfg.checkpoint=r18.pth']
    assert 'init_cfg (r18.pth) itself' in fails(
        capsys, 'tiny.py', 'mine.pth', 'r18.pth', '--force', '--cfg-options', *init_cfg
    )
    assert before == ((folder / 'mine.pth').read_bytes(), (folder / 'tiny.py').read_bytes())


def test_export_replaces_its_own_results_and_others_only_on_request(folder, capsys):
    for name in ('other.pth', 'other.onnx'):
        (folder / name).write_bytes(b'of somebody')
        assert f'OUT {name} is there already and not of this tool' in fails(capsys, 'tiny.py', 'mine.pth', name)
        assert (folder / name).read_bytes() == b'of somebody'
    export.main(['tiny.py', 'mine.pth', 'other.pth', '--force'])
    assert is_fused(folder / 'other.pth')
    export.main(['tiny.py', 'mine.pth', 'other.pth'])  # the second time it is its own
    export.main(['tiny.py', 'other.pth', 'again.pth'])
    assert 'OUT other.pth is CKPT itself' in fails(capsys, 'tiny.py', 'other.pth', 'other.pth', '--force')


def test_convert_checkpoint_writes_over_none_of_its_inputs(folder, capsys):
    before = (folder / 'mine.pth').read_bytes(), (folder / 'tiny.py').read_bytes()
    for dst, said in (('mine.pth', 'is the source itself'), ('tiny.py', 'is the config itself')):
        arguments = ['mine.pth', dst, '--from', 'bnet', '--config', 'tiny.py', '--force']
        assert said in fails(capsys, *arguments, main=convert_checkpoint.main)
    assert before == ((folder / 'mine.pth').read_bytes(), (folder / 'tiny.py').read_bytes())


def test_export_takes_the_data_root_that_was_trained_with(folder, capsys):
    """``--data-root`` sets the classes and the heads; without it the checkpoint does not fit, and why is said."""
    content = json.loads((folder / 'data' / 'annotations.json').read_text())
    content['categories'] = [dict(id=i + 1, name=name) for i, name in enumerate(('disk', 'square', 'star'))]
    for split in ('train', 'val'):
        (folder / 'own' / 'annotations').mkdir(parents=True, exist_ok=True)
        (folder / 'own' / 'annotations' / f'{split}.json').write_text(json.dumps(content))
        os.symlink(folder / 'data' / 'images', folder / 'own' / split)
    cfg = weights.read_config('tiny.py').model
    cfg.roi_head.bbox_head.num_classes = cfg.roi_head.mask_head.num_classes = 3
    meta = dict(dataset_meta=dict(classes=('disk', 'square', 'star')))
    torch.save(dict(meta=meta, state_dict=weights.built(cfg, device='cpu').state_dict()), 'three.pth')
    error = fails(capsys, 'tiny.py', 'three.pth', 'out.pth')
    assert 'trained for 3 classes (disk, square, star), the config is for 2' in error and '--data-root' in error
    export.main(['tiny.py', 'three.pth', 'out.pth', '--data-root', 'own'])
    assert is_fused(folder / 'out.pth')


class Focus(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(12, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(torch.cat([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1))


class Detector(nn.Module):
    def __init__(self, stem):
        super().__init__()
        self.backbone = nn.Sequential(stem, nn.BatchNorm2d(4))

    def extract_feat(self, x):
        return (self.backbone(x),)


@pytest.mark.parametrize(
    'stem', [nn.Conv2d(1, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(6, 4, 3, groups=2), Focus()]
)
def test_a_graph_is_for_as_many_channels_as_the_model_has(tmp_path, stem):
    onnx = pytest.importorskip('onnx')
    export_onnx(fuse(Detector(stem)), tmp_path / 'a.onnx', size=(16, 16))
    shape = onnx.load(tmp_path / 'a.onnx').graph.input[0].type.tensor_type.shape
    channels = 3 if isinstance(stem, Focus) else stem.in_channels
    assert [axis.dim_value for axis in shape.dim] == [1, channels, 16, 16]


def test_a_file_of_this_tool_is_known_by_its_mark(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    save_fused(fuse(model), tmp_path / 'a.pth')
    torch.save(model.state_dict(), tmp_path / 'b.pth')
    assert export._is_ours(tmp_path / 'a.pth') and export._is_ours(tmp_path / 'none.pth')
    assert not export._is_ours(tmp_path / 'b.pth')
