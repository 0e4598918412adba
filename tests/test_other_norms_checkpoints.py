"""A checkpoint of another norm: the identical function in eval mode, or refused in words. Every pair, every place."""

import copy
import warnings
from functools import cache

import pytest
import torch
from mmcv.cnn import ConvModule
from mmdet.registry import MODELS
from mmengine.runner.checkpoint import load_state_dict as mmengine_load
from torch import nn

import mmdet_norms
from mmdet_norms import apply_norm
from mmdet_norms.layers import AN, BNET, CBN, SN, AnotherFunctionError, CenConv2d, another_function_allowed
from mmdet_norms.layers._loading import kind_of

CFGS = dict(
    BN=dict(type='BN'),
    SyncBN=dict(type='SyncBN'),
    BRN=dict(type='BRN'),
    GhostBN=dict(type='BN', norm_batch=2),
    FrozenBN=dict(type='FrozenBN'),
    BNET=dict(type='BNET', kernel_size=3),
    SN=dict(type='SN'),
    RBN=dict(type='RBN'),
    BIN=dict(type='BIN'),
    AN=dict(type='AN', k=3),
    CBN=dict(type='CBN', burnin=0),
    MABN=dict(type='MABN', buffer_size=2),
    MABN_groups=dict(type='MABN', buffer_size=2, norm_batch=2),
    AN_GN=dict(type='AN', norm='GN', k=3, num_groups=2),
    GN=dict(type='GN', num_groups=2),
    LN2d=dict(type='LN2d'),
)
LIKE_BN = ('BN', 'GhostBN', 'SyncBN', 'BRN', 'FrozenBN')
CAN_BE_BN = (*LIKE_BN, 'BNET', 'SN', 'RBN', 'BIN', 'AN', 'CBN')
LOADERS = {
    'strict': lambda module, state: module.load_state_dict(state),
    'not strict': lambda module, state: module.load_state_dict(state, strict=False),
    'mmengine': lambda module, state: mmengine_load(module, state),
}

pytestmark = pytest.mark.filterwarnings('ignore')


def randomize(module: nn.Module) -> nn.Module:
    """No statistic, weight or bias as a new layer has it."""
    torch.manual_seed(1)
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        with torch.no_grad():
            if 'running_var' in name:
                value.uniform_(0.01, 2)
            elif value.is_floating_point() and value.dim() < 2:
                value.copy_(torch.randn_like(value) * 0.2 + ('weight' in name))
    return module


def block(name: str) -> ConvModule:
    torch.manual_seed(0)
    conv = dict(type='CenConv') if name.startswith('MABN') else None
    return ConvModule(3, 8, 3, norm_cfg=CFGS[name], conv_cfg=conv, act_cfg=None)


def trained(name: str) -> ConvModule:
    module = randomize(block(name))
    if name == 'CBN':
        for _ in range(2):
            module(torch.randn(2, 3, 9, 9)).sum().backward()  # it has a history
    return module.eval()


def off(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize('loader', LOADERS)
@pytest.mark.parametrize('target', CFGS)
@pytest.mark.parametrize('source', CFGS)
def test_every_pair_is_the_identical_function_or_an_error(source, target, loader):
    theirs, ours, x = trained(source), block(target), torch.randn(2, 3, 9, 9)
    state = theirs.state_dict()
    keys = list(state)
    same = (
        source == target or (source in LIKE_BN and target in CAN_BE_BN) or {source, target} == {'MABN', 'MABN_groups'}
    )
    if same:
        LOADERS[loader](ours, state)
        assert off(ours.eval()(x), theirs(x)) < 1e-6
    elif target == 'BN' and loader != 'strict':  # torch's own class, which can only report
        result = ours.load_state_dict(state, strict=False) if source != 'MABN' else None
        assert result is None or result.missing_keys or result.unexpected_keys
    else:
        with pytest.raises(RuntimeError) as error:
            LOADERS[loader](ours, state)
        assert target == 'BN' or isinstance(error.value, AnotherFunctionError)
    assert list(state) == keys


@pytest.mark.parametrize('conv', [None, dict(type='CenConv')], ids=['plain conv', 'CenConv'])
def test_batch_norm_is_mabn_behind_the_same_convolution(conv):
    theirs, x = trained('BN'), torch.randn(2, 3, 9, 9)
    ours = ConvModule(3, 8, 3, norm_cfg=CFGS['MABN'], conv_cfg=conv, act_cfg=None)
    if conv:
        with pytest.raises(AnotherFunctionError, match=r"MABN at 'bn'.*mean of each filter away, [0-9.]+ %"):
            ours.load_state_dict(theirs.state_dict(), strict=False)
        theirs.conv.weight.data -= theirs.conv.weight.data.mean((1, 2, 3), keepdim=True)
    ours.load_state_dict(theirs.state_dict())
    assert off(ours.eval()(x), theirs(x)) < 1e-6


def test_the_message_names_place_checkpoint_reason_and_way_out():
    theirs, ours = nn.ModuleDict(dict(neck=trained('BN'))), nn.ModuleDict(dict(neck=block('GN')))
    with pytest.raises(AnotherFunctionError) as error:
        ours.load_state_dict(theirs.state_dict(), strict=False)
    for words in ("GN at 'neck.gn'", 'batch norm (neck.bn)', 'no running statistics', 'model with that norm'):
        assert words in str(error.value)


def test_whoever_wants_the_convolutions_only_may_have_them():
    theirs, ours = trained('BNET'), block('GN')
    with another_function_allowed(), pytest.warns(UserWarning, match='another function'):
        result = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert torch.equal(ours.conv.weight, theirs.conv.weight) and 'gn.weight' in result.missing_keys
    with pytest.raises(AnotherFunctionError):
        ours.load_state_dict(theirs.state_dict(), strict=False)


@pytest.mark.parametrize('target', [*CAN_BE_BN, 'MABN'])
def test_saved_are_the_own_keys_and_load_again(target):
    ours = block(target)
    keys = set(ours.state_dict())
    clone = copy.deepcopy(ours)
    for module in (ours, clone):
        state = trained('BN').state_dict()
        if target == 'MABN':
            state['conv.weight'] -= state['conv.weight'].mean((1, 2, 3), keepdim=True)
        module.load_state_dict(state)
        assert set(module.state_dict()) == keys
    again = block(target)
    again.load_state_dict(ours.state_dict())
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in ours.state_dict().items())


def test_statistics_folded_into_weight_and_bias_are_batch_norm_only():
    state = {'conv.weight': block('BN').conv.weight, 'bn.weight': torch.rand(8), 'bn.bias': torch.rand(8)}
    x = torch.randn(2, 3, 9, 9)
    ours = block('FrozenBN')
    ours.load_state_dict(state)
    affine = nn.functional.conv2d(x, state['conv.weight']) * state['bn.weight'].view(8, 1, 1)
    torch.testing.assert_close(ours(x), affine + state['bn.bias'].view(8, 1, 1))
    for target in ('BNET', 'SN', 'RBN', 'BIN', 'AN', 'CBN', 'BRN', 'SyncBN', 'GN'):
        with pytest.raises(AnotherFunctionError):
            block(target).load_state_dict(state, strict=False)


def test_what_is_no_norm_of_another_name_is_left_alone():
    host = nn.ModuleDict(dict(bn1=SN(4), gn1=nn.GroupNorm(2, 4), in_proj=nn.Linear(4, 4), bnx=CBN(4)))
    host.load_state_dict(host.state_dict())
    result = host.load_state_dict({'gn1.weight': torch.ones(4), 'gn1.bias': torch.ones(4)}, strict=False)
    assert not result.unexpected_keys
    assert kind_of({'gn1.weight': 0}, 'bn1.') is None


RESNET = dict(
    type='ResNet',
    depth=50,
    base_channels=4,
    stem_channels=4,
    num_stages=2,
    out_indices=(0, 1),
    strides=(1, 2),
    dilations=(1, 1),
    frozen_stages=-1,
    norm_cfg=dict(type='BN', requires_grad=True),
    norm_eval=False,
)
BASIC = dict(RESNET, depth=18)
DEEP = dict(RESNET, type='ResNetV1d')
FPN = dict(type='FPN', in_channels=[3, 3], out_channels=8, num_outs=3, norm_cfg=dict(type='BN'))
DARKNET = dict(type='CSPDarknet', deepen_factor=0.2, widen_factor=0.0625, out_indices=(2, 3, 4))
HRNET = dict(
    type='HRNet',
    extra={
        'stage1': dict(num_modules=1, num_branches=1, block='BOTTLENECK', num_blocks=(1,), num_channels=(4,)),
        **{
            f'stage{i}': dict(
                num_modules=1,
                num_branches=i,
                block='BASIC',
                num_blocks=(1,) * i,
                num_channels=tuple(4 * 2**j for j in range(i)),
            )
            for i in (2, 3, 4)
        },
    },
)
BOX = dict(type='Shared4Conv1FCBBoxHead', in_channels=3, conv_out_channels=8, fc_out_channels=8, roi_feat_size=3)
BOX.update(num_classes=2, norm_cfg=dict(type='BN'))
MASK = dict(type='FCNMaskHead', num_convs=2, in_channels=3, conv_out_channels=8, num_classes=2)
MASK.update(norm_cfg=dict(type='BN'))
PLACES = dict(
    bottleneck=(RESNET, lambda: torch.randn(2, 3, 32, 32)),
    basic=(BASIC, lambda: torch.randn(2, 3, 32, 32)),
    deep=(DEEP, lambda: torch.randn(2, 3, 32, 32)),
    darknet=(DARKNET, lambda: torch.randn(2, 3, 64, 64)),
    hrnet=(HRNET, lambda: torch.randn(1, 3, 64, 64)),
    fpn=(FPN, lambda: (torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4))),
    box_head=(BOX, lambda: torch.randn(2, 3, 3, 3)),
    mask_head=(MASK, lambda: torch.randn(2, 3, 6, 6)),
)


def build(cfg: dict) -> nn.Module:
    torch.manual_seed(0)
    return MODELS.build(copy.deepcopy(cfg))


def outputs(part: nn.Module, x) -> torch.Tensor:
    part.eval()  # of which mmdet returns None
    with torch.no_grad():
        y = part(x)
    return torch.cat([t.flatten() for t in (y if isinstance(y, (tuple, list)) else [y])])


@cache
def with_batch_norm(place: str) -> tuple:
    """An input, the part with batch norms, and its output."""
    cfg, example = PLACES[place]
    x, theirs = example(), randomize(build(cfg))
    return x, theirs, outputs(theirs, x)


@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize(
    'norm',
    ['GhostBN', 'SyncBN', 'BRN', 'FrozenBN', 'BNET', 'SN', 'RBN', 'BIN', 'AN', 'CBN', 'MABN', 'GN', 'AN_GN', 'LN2d'],
)
def test_every_norm_in_every_part_of_a_detector(place, norm):
    cfg, (x, theirs, expected) = PLACES[place][0], with_batch_norm(place)
    part = dict(cfg, norm_cfg={k: v for k, v in CFGS[norm].items() if k != 'burnin'})
    if place == 'darknet':
        part['norm_cfg']['eps'] = 0.001  # this host's
    centred = norm == 'MABN' and place != 'darknet' and place != 'hrnet'
    ours = build(dict(part, conv_cfg=dict(type='CenConv')) if centred else part)
    if norm in ('GN', 'AN_GN', 'LN2d') or (norm == 'MABN' and any(isinstance(m, CenConv2d) for m in ours.modules())):
        for loader in LOADERS.values():
            with pytest.raises(AnotherFunctionError):
                loader(ours, theirs.state_dict())
        return
    ours.load_state_dict(theirs.state_dict())
    assert off(outputs(ours, x), expected) < 5e-6


@pytest.mark.parametrize('position', ['stem', 'norm1', 'norm2', 'norm3', 'last', 'downsample'])
@pytest.mark.parametrize('norm', ['BRN', 'FrozenBN', 'BNET', 'SN', 'RBN', 'BIN', 'AN', 'CBN', 'MABN', 'SyncBN', 'GN'])
def test_every_position_of_norm_at(position, norm):
    theirs, x = randomize(build(RESNET)), torch.randn(2, 3, 32, 32)
    ours = build(dict(RESNET, type='NormResNet', norm_at={position: CFGS[norm]}))
    if norm == 'GN':
        with pytest.raises(AnotherFunctionError):
            ours.load_state_dict(theirs.state_dict(), strict=False)
        return
    ours.load_state_dict(theirs.state_dict())
    assert off(outputs(ours, x), outputs(theirs, x)) < 5e-6


@pytest.mark.parametrize('name', ['bnet5', 'an', 'brn', 'sn', 'frozen', 'mabn'])
def test_pretrained_weights_of_a_norm_by_name(name, tmp_path):
    """As init_cfg loads them: mmengine's way, which logs and goes on."""
    theirs, x = randomize(build(RESNET)), torch.randn(2, 3, 32, 32)
    torch.save(theirs.state_dict(), tmp_path / 'r.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'r.pth'))
    detector = apply_norm(dict(type='RetinaNet', backbone=dict(RESNET, init_cfg=init_cfg)) | _neck(), name)
    ours = build(detector['backbone'])
    if name == 'mabn':
        with pytest.raises(AnotherFunctionError, match='init_cfg=None'):
            ours.init_weights()
        return
    ours.init_weights()
    assert off(outputs(ours, x), outputs(theirs, x)) < 5e-6


def _neck() -> dict:
    return dict(neck=dict(FPN), bbox_head=dict(type='RetinaHead', num_classes=2, in_channels=8))


def test_a_batch_norm_in_attention_is_not_taken_for_the_norm():
    """AN's own batch norm of the logits is a child named otherwise."""
    layer = AN(4, k=3)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        layer.load_state_dict(layer.state_dict())


def test_kernels_that_folding_left_are_no_other_norms_weights():
    """Hooks that average a model load the checkpoint of a fused one into it before it is fused itself."""

    def net():
        return nn.Sequential(nn.Conv2d(3, 8, 3), BNET(8))

    state = mmdet_norms.fuse(net()).state_dict()
    with pytest.raises(RuntimeError, match=r'size mismatch for 1\.weight.*centre tap'):
        net().load_state_dict(state, strict=False)
