"""RoI heads with a norm per convolution."""

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope

from mmdet_norms.layers import AN, GN

BOX = dict(
    type='NormShared4Conv1FCBBoxHead', in_channels=8, conv_out_channels=8, fc_out_channels=16, roi_feat_size=7,
    num_classes=3, loss_cls=dict(type='CrossEntropyLoss'), loss_bbox=dict(type='L1Loss'),
    bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
)  # fmt: skip
MASK = dict(type='NormFCNMaskHead', num_convs=2, in_channels=8, conv_out_channels=8, num_classes=3)


@pytest.fixture(autouse=True)
def in_mmdet():  # whatever a runner of other tests left
    init_default_scope('mmdet')


def an(k):
    return dict(type='AN', norm='GN', k=k, num_groups=4)


def test_the_box_head_takes_one_norm_per_convolution():
    head = MODELS.build(dict(BOX, norm_cfg=[an(2), an(3), dict(type='GN', num_groups=4), None]))
    convs = head.shared_convs
    assert [type(conv.norm) for conv in convs] == [AN, AN, GN, type(None)]
    assert convs[0].norm.weight_.shape == (2, 8) and convs[1].norm.weight_.shape == (3, 8)
    assert [conv.conv.bias is None for conv in convs] == [True, True, True, False]
    scores, deltas = head(torch.randn(5, 8, 7, 7))
    assert scores.shape == (5, 4) and deltas.shape == (5, 12)


def test_one_norm_for_all_gives_the_stock_head():
    norm_cfg = dict(type='GN', num_groups=4)
    head = MODELS.build(dict(BOX, norm_cfg=norm_cfg))
    stock = MODELS.build(dict(BOX, type='Shared4Conv1FCBBoxHead', norm_cfg=norm_cfg))
    head.load_state_dict(stock.state_dict(), strict=True)
    x = torch.randn(2, 8, 7, 7)
    for ours, theirs in zip(head(x), stock(x)):
        torch.testing.assert_close(ours, theirs)


def test_the_mask_head_takes_one_norm_per_convolution_and_empty_batches():
    head = MODELS.build(dict(MASK, norm_cfg=[an(2), None]))
    assert [type(conv.norm) for conv in head.convs] == [AN, type(None)]
    assert head(torch.randn(0, 8, 14, 14)).shape == (0, 3, 28, 28)
    assert MODELS.build(dict(MASK, norm_cfg=None)).convs[0].norm is None


@pytest.mark.parametrize('cfg, count', [(BOX, 4), (MASK, 2)])
def test_a_list_of_the_wrong_length_says_how_many(cfg, count):
    with pytest.raises(ValueError, match=f'lists 3 norms for {count} convolutions'):
        MODELS.build(dict(cfg, norm_cfg=[an(2)] * 3))
