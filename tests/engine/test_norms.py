"""The hook that prepares CBN and MABN, and its warnings."""

import warnings
from types import SimpleNamespace

import pytest
from mmcv.cnn import ConvModule
from mmdet.registry import MODELS
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.registry import init_default_scope
from torch import nn
from torch.utils.data import DataLoader

from mmdet_norms.engine.norms import NormHook, defeated, never_begun
from mmdet_norms.errors import UserError


@pytest.fixture(autouse=True)
def in_mmdet():
    init_default_scope('mmdet')


def runner(model, length=25, accumulative_counts=1):
    return SimpleNamespace(
        model=model,
        train_dataloader=range(length),
        optim_wrapper=SimpleNamespace(_accumulative_counts=accumulative_counts),
    )


def conv(norm_cfg, **kwargs):
    return ConvModule(4, 8, 3, norm_cfg=norm_cfg, **kwargs)


def test_a_burn_in_of_epochs_becomes_iterations_of_the_loader_and_layers_learn_their_names():
    model = nn.Sequential(conv(dict(type='CBN', burnin='8e')), conv(dict(type='CBN', burnin=5)))
    NormHook().before_train(runner(model))
    assert [m.norm.burnin_iters for m in model] == [200, 5]
    assert [m.norm.name for m in model] == ['0.bn', '1.bn']


def test_mabn_behind_an_uncentred_convolution_is_named_with_the_fix():
    with pytest.warns(UserWarning, match=r'0\.bn.*CenConv'):
        NormHook().before_train(runner(nn.Sequential(conv(dict(type='MABN')))))


def test_nothing_is_said_where_nothing_is_wrong():
    model = nn.Sequential(
        conv(dict(type='MABN'), conv_cfg=dict(type='CenConv')), conv(dict(type='CBN')), conv(dict(type='BN'))
    )
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        NormHook().before_train(runner(model))


def loader(images, batch_size, drop_last=False, sampler=DefaultSampler):
    return DataLoader(range(images), batch_size, drop_last=drop_last, sampler=sampler(range(images), False))


@pytest.mark.parametrize('kind', ['BN', 'BRN', 'MABN'])
@pytest.mark.parametrize(
    'norm_batch, batches, said',
    [
        (2, loader(20, 7), 'train_dataloader.batch_size=7; write a multiple of it, such as 8'),
        (4, loader(26, 8), r'the last batch of an epoch, of 2 images \(26 in batches of 8\); write .*drop_last=True'),
        (4, loader(26, 8, True), None),
        (2, loader(26, 8), None),
        (4, loader(26, 8, sampler=InfiniteSampler), None),
    ],
)
def test_groups_that_do_not_divide_the_batches_are_named_before_the_first_iteration(kind, norm_batch, batches, said):
    cenconv = dict(type='CenConv') if kind == 'MABN' else None
    backbone = nn.Sequential(conv(dict(type=kind, norm_batch=norm_batch), conv_cfg=cenconv))
    run = runner(nn.ModuleDict(dict(backbone=backbone)))
    run.train_dataloader = batches
    if said is None:
        NormHook().before_train(run)
        return
    with pytest.raises(UserError, match=f"'{kind}': norm_batch={norm_batch} does not divide {said}"):
        NormHook().before_train(run)


def test_groups_under_norm_eval_and_in_heads_are_not_asked():
    backbone = dict(type='ResNet', depth=18, base_channels=4, norm_cfg=dict(type='BN', norm_batch=2), norm_eval=True)
    heads = conv(dict(type='BN', norm_batch=2))
    run = runner(nn.ModuleDict(dict(backbone=MODELS.build(backbone), heads=heads)))
    run.train_dataloader = loader(20, 7)
    NormHook().before_train(run)


def test_gradient_accumulation_over_cbn_is_named():
    with pytest.warns(
        UserWarning, match='=4: every accumulated batch is an iteration of CBN.*a larger buffer_num or batch'
    ):
        NormHook().before_train(runner(nn.Sequential(conv(dict(type='CBN'))), accumulative_counts=4))


@pytest.mark.parametrize('norm, conv_cfg', [('CBN', None), ('MABN', dict(type='CenConv'))])
def test_norm_eval_and_frozen_stages_over_a_method_they_defeat_are_named(norm, conv_cfg):
    def detector(**kwargs):
        cfg = dict(type='ResNet', depth=18, base_channels=4, norm_cfg=dict(type=norm), conv_cfg=conv_cfg)
        return SimpleNamespace(backbone=MODELS.build(dict(cfg, **kwargs)))

    messages = defeated(detector(norm_eval=True, frozen_stages=1))
    assert f'norm_eval=True freezes batch norm statistics, but {norm} keep' in messages[0]
    assert 'frozen_stages=1' in messages[1]
    assert 'frozen_stages=0' in defeated(detector(norm_eval=False, frozen_stages=0))[0]  # the stem
    assert defeated(detector(norm_eval=False)) == []


@pytest.mark.parametrize('kind, reads', [('BN', True), ('BNET', True), ('GN', False)])
def test_statistics_of_new_layers_that_norm_eval_keeps_are_named(kind, reads):
    norm_cfg = dict(type=kind, num_groups=4) if kind == 'GN' else dict(type=kind)
    backbone = MODELS.build(dict(type='ResNet', depth=18, base_channels=8, norm_cfg=norm_cfg))  # norm_eval=True
    messages = defeated(SimpleNamespace(backbone=backbone))
    assert len(messages) == reads and all('model.backbone.norm_eval=False' in message for message in messages)
    for module in backbone.modules():
        if hasattr(module, 'running_mean'):
            module.running_mean += 0.1  # pretrained
    assert defeated(SimpleNamespace(backbone=backbone)) == []
    backbone = MODELS.build(dict(type='ResNet', depth=18, base_channels=8, norm_eval=False))
    assert defeated(SimpleNamespace(backbone=backbone)) == []


@pytest.mark.parametrize(
    ('norm_cfg', 'iterations', 'warned'),
    [
        (dict(type='BRN'), 272, True),
        (dict(type='BRN', warmup_iters=100, r_iters=200, d_iters=200), 272, False),
        (dict(type='MABN'), 34, True),
        (dict(type='MABN'), 1000, True),
        (dict(type='MABN'), 1001, False),
        (dict(type='MABN', norm_batch=2), 34, True),
        (dict(type='MABN', norm_batch=2), 100, False),
        (dict(type='CBN'), 8, True),
        (dict(type='CBN'), 9, False),
        (dict(type='BN'), 1, False),
    ],
)
def test_a_training_that_ends_in_the_warm_up_is_named(norm_cfg, iterations, warned):
    model = nn.Sequential(conv(norm_cfg))
    said = never_begun(model, iterations)
    assert len(said) == warned
    assert not warned or f'{norm_cfg["type"]}: this training ends within its warm-up' in said[0]
    assert not warned or ('smaller norm_cfg' in said[0]) == (norm_cfg != dict(type='MABN'))  # r waits in any case
