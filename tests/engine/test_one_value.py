"""Batch norm of one value per channel is answered by the name of the layer and a way out."""

import pytest
import torch
from mmdet.registry import MODELS
from torch import nn

import mmdet_norms
from mmdet_norms.cli.common import command
from mmdet_norms.engine.one_value import explain_one_value

SPLIT_ATTENTION = dict(
    type='NormResNeSt', depth=50, stem_channels=16, base_channels=16, radix=2, reduction_factor=4, avg_down_stride=True,
    norm_cfg=dict(type='SyncBN'), norm_eval=False, norm_at=dict(last=dict(type='BNET')),
)  # fmt: skip


@pytest.mark.parametrize('norm', ['BN', 'SyncBN'])
def test_the_layer_and_a_way_out_are_named(norm, capsys):
    model = MODELS.build(mmdet_norms.replace_norm_cfg(dict(SPLIT_ATTENTION), dict(type=norm))).train()
    with pytest.raises(SystemExit) as end:
        command(lambda argv: model(torch.randn(1, 3, 64, 64)))([])
    said = capsys.readouterr().err
    assert end.value.code == 2 and 'layer1.0.conv2.bn1' in said and 'train_dataloader.batch_size' in said


@pytest.mark.parametrize('message', ['Expected more than 1 value per channel when training', 'anything'])
def test_other_errors_keep_their_traceback(message):
    def main(argv):
        raise ValueError(message)

    with pytest.raises(ValueError, match=message) as caught:
        command(main)([])
    assert explain_one_value(caught.value) is None


def test_an_error_in_a_users_own_layer_keeps_its_traceback():
    class Own(nn.Module):
        def forward(self, x):
            raise ValueError('Expected more than 1 value per channel when training')

    with pytest.raises(ValueError) as caught:
        Own()(None)
    assert explain_one_value(caught.value) is None


def test_torch_still_refuses_in_a_function_of_that_name():
    with pytest.raises(ValueError) as caught:
        nn.BatchNorm2d(2)(torch.zeros(1, 2, 1, 1))
    assert '(BatchNorm2d)' in explain_one_value(caught.value)


def test_the_keyboard_ends_a_command_with_one_message(capsys):
    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        command(main)([])
    assert end.value.code == 130 and '--resume' in capsys.readouterr().err
