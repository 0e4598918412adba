"""What a config got wrong is one message; an error of somebody's own code keeps its traceback."""

import sys
from pathlib import Path

import pytest
from mmdet.models.backbones import ResNet
from mmdet.registry import MODELS

sys.path.insert(0, str(Path(__file__).parent))
import tiny

from mmdet_norms.cli import train


def fails(capsys, main, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def config(tmp_path):
    return tiny.write_config(tmp_path)


@pytest.fixture
def own_backbone():
    @MODELS.register_module()
    class OwnResNet(ResNet):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            raise ValueError('norm_cfg of my own: a bug of mine in norm_at')

    yield
    del MODELS._module_dict['OwnResNet']


def test_an_error_of_the_users_own_code_keeps_its_traceback(config, tmp_path, own_backbone):
    arguments = [str(config), '--work-dir', str(tmp_path / 'run'), '--cfg-options', 'model.backbone.type=OwnResNet']
    with pytest.raises(ValueError, match='a bug of mine'):
        train.main(arguments)


@pytest.mark.parametrize(
    'part, norm_cfg, said',
    [
        ('backbone', dict(type='BNET', kernel_size=4), 'kernel_size=4 must be an odd'),
        ('neck', dict(type='GN', num_groups=5), 'num_groups=5 must divide'),
        ('backbone', dict(type='BNTE'), "norm_cfg.type='BNTE' is not a registered norm layer"),
        ('backbone', dict(type='CBN', burnin='soon'), "burnin='soon' must be a number"),
    ],
)
def test_a_wrong_norm_is_one_message(config, tmp_path, capsys, part, norm_cfg, said):
    config.write_text(f'{config.read_text()}\nmodel[{part!r}]["norm_cfg"] = {norm_cfg!r}\n')
    assert said in fails(capsys, train.main, config, '--work-dir', tmp_path / 'run')
