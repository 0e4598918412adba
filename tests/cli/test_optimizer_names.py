"""Optimizers through the tools: names that nobody knows, and what AdaHessian cannot be trained with."""

import pytest

from helpers import tiny
from mmdet_norms.cli import check, train

ADAHESSIAN = "\noptim_wrapper = dict(optimizer=dict(_delete_=True, type='AdaHessian'))\n"


def fails(capsys, main, *arguments):
    with pytest.raises(SystemExit) as error:
        main([str(argument) for argument in arguments])
    assert error.value.code == 2
    said = capsys.readouterr()
    return said.err.splitlines()[-1] if said.err else said.out


@pytest.mark.parametrize(
    ('option', 'said'),
    [
        ('optim_wrapper.optimizer.type=Rangerlars', "is no optimizer (did you mean 'RangerLars'?); choose from ASGD"),
        ('optim_wrapper.optimizer.type=Ranger', ''),
    ],
)
def test_an_unknown_optimizer_is_one_message_before_the_data_are_read(option, said, tmp_path, capsys, monkeypatch):
    config = tiny.write_config(tmp_path)
    if not said:  # a key that another optimizer has
        config.write_text(config.read_text() + "\noptim_wrapper['optimizer']['momentum'] = 0.9\n")
        said = "of type 'Ranger' has an unknown key momentum=0.9"
    assert said in fails(capsys, check.main, config, '--cfg-options', option)
    monkeypatch.setattr(train, 'check_data', lambda *args: pytest.fail('read'))
    message = fails(capsys, train.main, config, '--work-dir', tmp_path / 'run', '--cfg-options', option)
    assert message.startswith('error: optim_wrapper.optimizer') and said in message
    assert not (tmp_path / 'run').exists()


def test_compiled_code_is_refused(tmp_path, capsys):
    config = tiny.write_config(tmp_path, ADAHESSIAN + 'compile = True')
    said = fails(capsys, train.main, config, '--work-dir', tmp_path / 'run')
    assert said.startswith('error: compile=True: compiled code') and said.endswith('write compile=False')


def test_adahessian_with_mabn_ends_before_an_earlier_run_is_deleted(tmp_path, capsys):
    config, run = tiny.write_config(tmp_path, ADAHESSIAN), tmp_path / 'run'
    run.mkdir()
    for name, text in (('epoch_1.pth', 'weights'), ('last_checkpoint', str(run / 'epoch_1.pth'))):
        (run / name).write_text(text)
    said = fails(capsys, train.main, config, '--work-dir', run, '--norm', 'mabn', '--overwrite')
    assert said.startswith("error: optim_wrapper.optimizer.type='AdaHessian' needs") and 'backbone.layer1.0.bn1' in said
    assert (run / 'epoch_1.pth').read_text() == 'weights'


@pytest.mark.parametrize('wrapper', ['OptimWrapper', 'SecondOrderOptimWrapper'])
def test_mixed_precision_of_adahessian_needs_no_loss_scale(wrapper, tmp_path, monkeypatch):
    for device in ('cpu', 'cuda'):
        monkeypatch.setattr(train, 'get_device', lambda device=device: device)
        config = tiny.write_config(tmp_path, ADAHESSIAN + f"optim_wrapper['type'] = '{wrapper}'")
        args = train.parse_args([str(config), '--amp', '--work-dir', str(tmp_path / 'run')])
        found = train.train_config(args).optim_wrapper
        assert found.type == 'SecondOrderOptimWrapper' and found.dtype == 'bfloat16' and 'loss_scale' not in found
