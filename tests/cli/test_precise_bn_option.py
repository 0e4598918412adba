"""``--precise-bn N`` of training and testing."""

import json

import pytest
import torch

from helpers import tiny, tiny_cls
from helpers.commands import fails, options_of
from mmdet_norms.cli import compare, test, train
from mmdet_norms.engine.precise_bn import KEY


def hook_of(cfg):
    return [hook for hook in cfg.custom_hooks if hook['type'] == 'PreciseBNHook']


def test_it_sets_the_hook_or_changes_the_number_of_the_configs_own(tmp_path):
    config = tiny.write_config(tmp_path, "custom_hooks = [dict(type='PreciseBNHook', num_images=9, seed=4)]")
    cfg = options_of(train, config, '--precise-bn', '3', '--work-dir', tmp_path / 'run')
    assert hook_of(cfg) == [dict(type='PreciseBNHook', num_images=3, seed=4, at_test=False)]
    (tmp_path / 'x.pth').touch()
    cfg = options_of(test, config, tmp_path / 'x.pth', '--precise-bn', '3')
    assert hook_of(cfg)[0]['at_test'] is True
    assert 'at_test' not in hook_of(options_of(test, config, tmp_path / 'x.pth'))[0]


@pytest.mark.parametrize('number', ['0', '-1'])
def test_a_number_that_is_none_is_one_message(tmp_path, capsys, number):
    config = tiny.write_config(tmp_path)
    assert f'--precise-bn {number}: must be' in fails(capsys, train.main, config, '--precise-bn', number)


def test_training_images_must_be_there_to_test_with_them(tmp_path, capsys):
    config = tiny.write_config(tmp_path)
    (tmp_path / 'x.pth').touch()
    arguments = [config, tmp_path / 'x.pth', '--precise-bn', '4', '--cfg-options']
    said = fails(capsys, test.main, *arguments, 'train_dataloader.dataset.ann_file=gone.json')
    assert 'train_dataloader: there is no annotation file' in said
    assert 'has no train_dataloader' in fails(capsys, test.main, *arguments, 'train_dataloader=None')


@pytest.mark.slow
def test_a_test_of_the_checkpoint_gives_what_the_validation_gave_and_all_say_so(tmp_path, capsys):
    config = tiny_cls.write_config(tmp_path)
    run = tmp_path / 'run'
    pytest.importorskip('tensorboard')
    more = ['--threads', '1', '--precise-bn', '7', '--tensorboard']
    train.main([str(config), '--work-dir', str(run), '--seed', '0', *more])
    followed = sorted((run / 'tensorboard').iterdir())
    assert followed
    validated = json.loads((run / 'results.json').read_text())
    checkpoint = (run / 'last_checkpoint').read_text()
    images = validated['precise_bn']['images']
    assert torch.load(checkpoint, weights_only=True)[KEY]['images'] == images
    for name, more in dict(plain=[], again=['--precise-bn', '7', '--fuse']).items():
        test.main([str(run / 'tiny_cls.py'), checkpoint, '--work-dir', str(tmp_path / name), *more])
        tested = json.loads((tmp_path / name / 'results.json').read_text())
        assert tested['accuracy/top1'] == validated['accuracy/top1'] and tested['precise_bn']['images'] == images
    capsys.readouterr()
    compare.main([str(tmp_path / 'plain')])
    assert f'--precise-bn, running statistics over {images} images' in capsys.readouterr().out
    assert sorted((run / 'tensorboard').iterdir()) == followed  # of trainings only
