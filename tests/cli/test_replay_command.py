"""tools/train.py on a run that diverges, and tools/replay.py on the step that it ended with."""

import re
import shlex
import sys

import pytest
import torch

from helpers import tiny
from helpers.commands import fails, options_of
from mmdet_norms.cli import replay, train


@pytest.fixture(scope='module')
def diverged(tmp_path_factory):
    """What the run said, and its work dir."""
    folder = tmp_path_factory.mktemp('diverged')
    config = tiny.write_config(folder)
    options = ['optim_wrapper.optimizer.lr=1e12', 'train_cfg.max_epochs=6']
    options += [f'default_hooks.checkpoint.{option}' for option in ('max_keep_ckpts=1', 'interval=1', 'by_epoch=False')]
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr('builtins.print', lambda *words, **kwargs: said.append((' '.join(map(str, words)), kwargs)))
        with pytest.raises(SystemExit) as stopped:
            train.main(
                [str(config), '--work-dir', str(folder / 'my run'), '--norm', 'bnet5', '--cfg-options', *options]
            )
    assert stopped.value.code == 2
    errors = [text for text, kwargs in said if text.startswith('error: ') and kwargs.get('file') is sys.stderr]
    assert len(errors) == 1
    return errors[0], folder / 'my run'


def test_divergence_ends_with_status_2_and_a_finite_checkpoint(diverged):
    said, run = diverged
    assert re.search(r'iteration \d+ \(epoch \d\): .*first in .*\.png', said), said
    assert 'learning rate' in said
    for path in run.glob('*.pth'):
        assert all(value.isfinite().all() for value in torch.load(path)['state_dict'].values())
    assert len(list(run.glob('*.pth'))) == 1


def test_the_command_in_the_message_computes_the_step_again(diverged, capsys):
    said, _ = diverged
    command = re.search(r"python tools/replay\.py (.+?\.pth'?) ", said)[1]
    replay.main(shlex.split(command))
    again = capsys.readouterr().out
    place = re.search(r'first in the \w+ of \S+ \(\w+\)', said)[0]
    assert place in again and 'iteration ' in again and '.png' in again and 'loss_' in again


@pytest.mark.parametrize(
    'content', [b'', b'garbage', dict(state_dict={}), [1]], ids=['empty', 'garbage', 'other', 'list']
)
def test_another_file_is_no_step(content, diverged, tmp_path, capsys):
    file = tmp_path / 'step.pth'
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    config = next(diverged[1].glob('*.py'))
    assert str(file) in fails(capsys, replay.main, config, file)


def test_the_choice_is_in_the_config(tmp_path):
    config = tiny.write_config(tmp_path)
    hooks = {hook.type: hook for hook in options_of(train, config, '--on-nonfinite', 'skip').custom_hooks}
    assert hooks['NonFiniteHook'].on_nonfinite == 'skip'
    config = tiny.write_config(tmp_path, "custom_hooks = [dict(type='NonFiniteHook', max_skips=3)]")
    (hook, *_) = options_of(train, config, '--on-nonfinite', 'skip').custom_hooks
    assert hook == dict(type='NonFiniteHook', max_skips=3, on_nonfinite='skip')
    assert 'on_nonfinite' not in options_of(train, config).custom_hooks[0]
