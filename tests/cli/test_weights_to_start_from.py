"""``tools/train.py`` looks at the files it starts from before it does anything with them."""

from pathlib import Path

import pytest
import torch
from torch import nn

import mmdet_norms
from helpers import tiny
from mmdet_norms.cli import train
from mmdet_norms.deploy import is_fused, save_fused

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
NO_DATA = ['train_dataloader.dataset.ann_file=', 'val_dataloader=None']


@pytest.fixture
def config(tmp_path):
    return tiny.write_config(tmp_path)


@pytest.fixture
def fused(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    save_fused(mmdet_norms.fuse(model), tmp_path / 'fused.pth')
    torch.save(dict(meta=dict(epoch=1), state_dict=model.state_dict()), tmp_path / 'plain.pth')
    return tmp_path / 'fused.pth'


def configured(*arguments):
    """What a training run is made from; nothing is built for it, and its data are another matter."""
    return train.train_config(train.parse_args([*map(str, arguments), '--allow-data-faults']))


def refused(*arguments):
    with pytest.raises(train.UserError) as error:
        configured(*arguments)
    return str(error.value)


def test_a_file_is_told_to_hold_a_fused_model_without_being_loaded(fused, tmp_path):
    (tmp_path / 'text.pth').write_text('no checkpoint')
    names = ['fused.pth', 'plain.pth', 'text.pth', 'missing.pth']
    assert [is_fused(tmp_path / name) for name in names] == [True, False, False, False]


def test_training_from_a_fused_model_is_refused_wherever_it_is_named(config, fused, tmp_path):
    said = f'{fused} is the checkpoint of a fused model, which has no norms to train; name the checkpoint that it was'
    options = [config, '--work-dir', tmp_path / 'run', '--cfg-options']
    assert refused(*options, f'load_from={fused}').startswith(f'load_from: {said}')
    assert refused(*options[:3], '--resume', fused).startswith(f'--resume: {said}')
    config.write_text(
        f'{config.read_text()}model["backbone"]["init_cfg"] = [dict(type="Constant", val=1, layer="Conv2d"),'
        f' dict(type="mmengine.Pretrained", checkpoint="{fused}", prefix="backbone.")]\n'
    )
    assert refused(*options[:3]).startswith(f'model.backbone.init_cfg.1.checkpoint: {said}')


def test_going_on_from_a_work_dir_whose_last_checkpoint_was_fused_is_refused(config, fused, tmp_path):
    (tmp_path / 'last_checkpoint').write_text(str(fused))
    message = refused(config, '--work-dir', tmp_path, '--resume')
    assert f'{fused} is not used: it is the checkpoint of a fused' in message
    (tmp_path / 'last_checkpoint').unlink()
    assert not configured(config, '--work-dir', tmp_path, '--resume').resume  # nothing to go on from yet


def test_the_refusal_is_one_message_and_nothing_was_started(config, fused, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main([str(config), '--work-dir', str(tmp_path / 'run'), '--cfg-options', f'load_from={fused}'])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith('error: load_from: ')
    assert not (tmp_path / 'run').exists()


def test_other_checkpoints_and_urls_are_left_to_mmengine(config, fused, tmp_path):
    plain = tmp_path / 'plain.pth'
    init_cfg = 'model.backbone.init_cfg.type=Pretrained'
    for path in (plain, 'torchvision://resnet18', 'https://example.org/weights.pth'):
        options = [f'load_from={path}', init_cfg, f'model.backbone.init_cfg.checkpoint={path}']
        assert configured(config, '--cfg-options', *options).load_from == str(path)


def test_a_missing_file_to_load_from_is_named(config):
    assert refused(config, '--cfg-options', 'load_from=none.pth') == 'load_from: there is no checkpoint file none.pth'


@pytest.mark.parametrize(
    'config, weights, readme',
    [
        ('mabn/mask-rcnn_r50_fpn_mabn_180k_coco.py', 'R50-wc.pth', 'mabn/README.md'),
        ('an/cascade-mask-rcnn_aognet-40m_fpn_an_20e_coco.py', 'aognet-40m_an.pth', 'an/README.md'),
    ],
)
def test_missing_pretrained_weights_say_where_they_are_to_be_had(config, weights, readme, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    message = refused(CONFIGS / config, '--cfg-options', *NO_DATA)
    assert message == (
        f'model.backbone.init_cfg.checkpoint: there is no file pretrained/{weights}; {CONFIGS / readme} says where '
        'these weights are to be had and how to convert them. Name another file with --cfg-options '
        'model.backbone.init_cfg.checkpoint=FILE'
    )
    assert f'pretrained/{weights[:6]}' in (CONFIGS / readme).read_text(encoding='utf-8')
    (tmp_path / weights).touch()
    assert configured(CONFIGS / config, '--cfg-options', *NO_DATA, f'model.backbone.init_cfg.checkpoint={weights}')


@pytest.mark.parametrize('start', ['--resume', 'load_from'])
def test_missing_pretrained_weights_may_be_left_out_where_a_checkpoint_replaces_them(config, start, fused, tmp_path):
    plain = str(tmp_path / 'plain.pth')
    (config.parent / 'README.md').write_text('See [there](./elsewhere.md).')
    options = ['model.backbone.init_cfg.type=Pretrained', 'model.backbone.init_cfg.checkpoint=none.pth']
    more = ['--resume', plain] if start == '--resume' else []
    options += [] if more else [f'load_from={plain}']
    assert refused(config, *more, '--cfg-options', *options) == (
        'model.backbone.init_cfg.checkpoint: there is no file none.pth. Name another file with --cfg-options '
        f'model.backbone.init_cfg.checkpoint=FILE; or leave them out, since the checkpoint of {start} replaces them: '
        'model.backbone.init_cfg=None'
    )
    options = [*options[2:], 'model.backbone.init_cfg=None']
    assert configured(config, *more, '--cfg-options', *options).model.backbone.init_cfg is None


def test_missing_weights_that_a_part_calls_pretrained_are_one_error(config, fused, tmp_path):
    key, load_from = 'model.backbone.pretrained', f'load_from={tmp_path / "plain.pth"}'
    said = (
        f'{key}: there is no file none.pth. Name another file with --cfg-options {key}=FILE; or leave them out, since '
    )
    assert refused(config, '--cfg-options', f'{key}=none.pth', load_from) == (
        f'{said}the checkpoint of load_from replaces them: {key}=None'
    )
    assert configured(config, '--cfg-options', f'{key}=None', load_from)


def test_a_checkpoint_that_is_no_name_is_one_message(config):
    options = ['model.backbone.init_cfg.type=Pretrained', 'model.backbone.init_cfg.checkpoint=5']
    assert 'model.backbone.init_cfg.checkpoint: 5 must be' in refused(config, '--cfg-options', *options)
