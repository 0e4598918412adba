"""The command that converts published checkpoints."""

import os
import runpy
from pathlib import Path

import pytest
import torch

from mmdet_norms.cli import convert_checkpoint

ROOT = Path(__file__).resolve().parents[2]

CONFIG = """
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
model = dict(
    backbone=dict(base_channels=4, norm_cfg=dict(requires_grad=True)),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=8, norm_cfg=dict(type='CBN')),
    rpn_head=dict(in_channels=8, feat_channels=8),
    roi_head=dict(bbox_head=dict(
        type='Shared4Conv1FCBBoxHead', in_channels=8, conv_out_channels=8, fc_out_channels=8, num_classes=2,
        norm_cfg=dict(type='CBN'))))
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A config, and a checkpoint of its detector as mmdet 0.6 saves it."""
    from mmdet.registry import MODELS
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    folder = tmp_path_factory.mktemp('convert')
    (folder / 'cfg.py').write_text(CONFIG)
    init_default_scope('mmdet')
    state = MODELS.build(Config.fromfile(folder / 'cfg.py').model).state_dict()
    old = {key.removeprefix('roi_head.'): value for key, value in state.items() if not key.endswith('iter_count')}
    old['bbox_head.fc_cls.bias'] = torch.tensor([10.0, 11.0, 12.0])
    old['bbox_head.fc_reg.bias'] = torch.arange(12.0)
    old['bbox_head.fc_reg.weight'] = torch.arange(12.0).view(12, 1).repeat(1, 8)
    torch.save(dict(meta=dict(mmdet_version='0.6.rc0'), state_dict=old, optimizer={}), folder / 'a.pth')
    return folder


def run(*args):
    convert_checkpoint.main([str(arg) for arg in args])


def fails(capsys, *args):
    """The message with which the command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(*args)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and 'wrote' not in out
    return err


def test_a_checkpoint_is_converted_verified_and_explained(folder, tmp_path, capsys):
    run(folder / 'a.pth', tmp_path / 'b.pth', '--from', 'cbn', '--config', folder / 'cfg.py')
    state = torch.load(tmp_path / 'b.pth')['state_dict']
    assert state['roi_head.bbox_head.fc_cls.bias'].tolist() == [11, 12, 10]
    assert state['roi_head.bbox_head.fc_reg.bias'].tolist() == list(range(4, 12))
    out = capsys.readouterr().out
    for said in (
        "detector, layout 'cbn'", "entry 'state_dict'", 'bbox_head.fc_cls -> roi_head.bbox_head.fc_cls',
        'fc_cls.{weight, bias}: rows [1..2, 0]: the background is the last of 3', 'fc_reg.{weight, bias}: rows 4..11',
        "entry 'optimizer': not part", 'neck.lateral_convs.*.bn.{iter_count}: 0',
        '0 missing, 0 left over', 'box convention of mmdet-v1',
        f'tools/test.py {folder / "cfg.py"} {tmp_path / "b.pth"} --geometry mmdet-v1',
    ):  # fmt: skip
        assert said in ' '.join(out.split()), said


def test_without_a_config_the_lack_of_verification_is_said(folder, tmp_path, capsys):
    run(folder / 'a.pth', tmp_path / 'b.pth', '--from', 'cbn')
    assert 'no --config: names and shapes were not compared' in capsys.readouterr().out
    assert not any(key.endswith('iter_count') for key in torch.load(tmp_path / 'b.pth')['state_dict'])


def test_a_backbone_alone_says_how_to_use_it(folder, tmp_path, capsys):
    state = torch.load(folder / 'a.pth')['state_dict']
    backbone = {k.replace('backbone.', 'module.'): v for k, v in state.items() if k.startswith('backbone.')}
    torch.save(backbone | {'module.fc.bias': torch.ones(3)}, tmp_path / 'a.pth')
    run(tmp_path / 'a.pth', tmp_path / 'b.pth', '--from', 'an', '--config', folder / 'cfg.py')
    out = capsys.readouterr().out
    assert "init_cfg=dict(type='Pretrained'" in out and 'model.backbone' in out and 'ImageNet classifier' in out
    assert 'layer4.2.bn3.weight' in torch.load(tmp_path / 'b.pth')['state_dict']


def test_what_does_not_fit_is_listed_and_nothing_is_written(folder, tmp_path, capsys):
    content = torch.load(folder / 'a.pth')
    del content['state_dict']['neck.fpn_convs.0.conv.weight']
    torch.save(content, tmp_path / 'a.pth')
    message = fails(capsys, tmp_path / 'a.pth', tmp_path / 'b.pth', '--from', 'cbn', '--config', folder / 'cfg.py')
    assert 'neck.fpn_convs.0.conv.weight' in message and 'nothing was written' in message
    assert os.listdir(tmp_path) == ['a.pth']


def test_a_wrong_layout_is_one_message(folder, tmp_path, capsys):
    message = fails(capsys, folder / 'a.pth', tmp_path / 'b.pth', '--from', 'bnet')
    assert '--from cbn' in message and 'bbox_head.fc_cls.weight' in message


def test_a_file_that_runs_code_is_refused_unless_trusted(tmp_path, capsys):
    class RunsCode:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'ran'),)

    torch.save({'state_dict': {'conv1.weight': torch.ones(1, 3, 7, 7)}, 'extra': RunsCode()}, tmp_path / 'a.pth')
    message = fails(capsys, tmp_path / 'a.pth', tmp_path / 'b.pth', '--from', 'cbn')
    assert '--trust-pickle' in message and 'run any code' in message
    assert os.listdir(tmp_path) == ['a.pth']
    run(tmp_path / 'a.pth', tmp_path / 'b.pth', '--from', 'cbn', '--trust-pickle')
    assert (tmp_path / 'ran').exists() and (tmp_path / 'b.pth').exists()


def test_an_existing_destination_needs_force_and_the_source_is_never_one(folder, tmp_path, capsys):
    (tmp_path / 'b.pth').write_bytes(b'old')
    assert '--force' in fails(capsys, folder / 'a.pth', tmp_path / 'b.pth', '--from', 'cbn')
    assert (tmp_path / 'b.pth').read_bytes() == b'old'
    run(folder / 'a.pth', tmp_path / 'b.pth', '--from', 'cbn', '--force')
    assert torch.load(tmp_path / 'b.pth')['meta']['converted_from'] == 'cbn'
    assert 'is the source itself' in fails(capsys, folder / 'a.pth', folder / 'a.pth', '--from', 'cbn', '--force')


@pytest.mark.parametrize('src, config, said', [('none.pth', None, 'no file'), ('a.pth', 'none.py', 'none.py')])
def test_files_that_are_not_there_are_named(folder, tmp_path, capsys, src, config, said):
    more = [] if config is None else ['--config', tmp_path / config]
    assert said in fails(capsys, folder / src, tmp_path / 'b.pth', '--from', 'cbn', *more)


def test_the_script_calls_the_command(capsys):
    run = runpy.run_path(str(ROOT / 'tools' / 'convert_checkpoint.py'))['run']
    with pytest.raises(SystemExit) as end:
        run('convert', ['--help'])
    out = capsys.readouterr().out
    assert end.value.code == 0 and 'bnet,cbn,mabn,an,aognet' in out and 'run any code' in ' '.join(out.split())
