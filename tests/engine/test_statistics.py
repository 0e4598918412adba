"""Running statistics recomputed: by torch's update_bn, and by recompute_statistics."""

import copy

import pytest
import torch
from mmcv.cnn import ConvModule
from mmengine.model import BaseModel, ExponentialMovingAverage
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

from helpers.processes import run_in_two
from mmdet_norms import recompute_statistics
from mmdet_norms.errors import UserError

pytestmark = pytest.mark.filterwarnings('ignore:.*(CBN|update_bn|SyncBN)')

CFGS = dict(
    BN=dict(type='BN'),
    SyncBN=dict(type='SyncBN'),
    BNET=dict(type='BNET'),
    AN=dict(type='AN', k=4),
    BRN=dict(type='BRN'),
    BN_norm_batch=dict(type='BN', norm_batch=2),
    BRN_at_once=dict(type='BRN', warmup_iters=0, r_iters=0, d_iters=0),
    BRN_norm_batch=dict(type='BRN', warmup_iters=0, r_iters=0, d_iters=0, norm_batch=2),
    SN=dict(type='SN'),
    CBN=dict(type='CBN', burnin=2),
    MABN=dict(type='MABN', buffer_size=3, warmup_iters=0),
    MABN_norm_batch=dict(type='MABN', buffer_size=3, norm_batch=2),
)
WAYS = {'torch': lambda model, batches: update_bn(batches, model), 'ours': recompute_statistics}
COUNTERS = ('num_batches_tracked', 'iter_count', 'iters')


def module(name: str, channels: int = 3) -> ConvModule:
    conv = dict(type='CenConv') if name.startswith('MABN') else None
    return ConvModule(channels, 8, 3, norm_cfg=CFGS[name], conv_cfg=conv)


def trained(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(module(name), module(name, 8))
    for step in range(5):
        model(torch.randn(4, 3, 10, 10) + step).square().mean().backward()
    return model


def batches(n: int = 6) -> list[torch.Tensor]:  # not as many as it was trained for
    torch.manual_seed(7)
    return [torch.randn(4, 3, 10, 10) * (1 + i) + i for i in range(n)]


def statistics(model: nn.Module) -> tuple[list, list]:
    """Running means and variances of the two norms; those of AN's logits are not counted."""
    state = {k: v for k, v in model.state_dict().items() if 'attention' not in k}
    return [[v.flatten() for k, v in state.items() if k.endswith(f'running_{which}')] for which in ('mean', 'var')]


def first_norm(name: str, data: list[torch.Tensor], model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """What the statistics of the first norm should be."""
    with torch.no_grad():
        maps = [model[0].conv(x) for x in data]
        maps = [part for m in maps for part in m.split(CFGS[name].get('norm_batch', len(m)))]
    mean = torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0)
    correction = 0 if name == 'SN' else 1  # as published
    var = [
        m.square().mean((0, 2, 3)) if name.startswith('MABN') else m.var((0, 2, 3), correction=correction) for m in maps
    ]
    return mean, torch.stack(var).mean(0)


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('name', CFGS)
def test_they_are_the_average_over_batches(name, way):
    model, data = trained(name), batches()
    before = copy.deepcopy(model.state_dict())
    momenta = {m: m.momentum for m in model.modules() if hasattr(m, 'momentum')}
    for _ in range(2):  # each time from the start
        WAYS[way](model, data)
        means, variances = statistics(model)
        mean, var = first_norm(name, data, model)
        torch.testing.assert_close(variances[0], var)
        if not name.startswith('MABN'):
            torch.testing.assert_close(means[0], mean)
    assert {m: m.momentum for m in momenta} == momenta
    for key, value in model.state_dict().items():  # nothing else moved
        if 'running' not in key and (way == 'ours' or 'num_batches_tracked' not in key):
            assert torch.equal(value, before[key]), key


@pytest.mark.parametrize('name', CFGS)
def test_both_ways_agree_in_every_layer_and_training_goes_on(name):
    theirs, ours = trained(name), trained(name)
    update_bn(batches(), theirs)
    recompute_statistics(ours, batches())
    for a, b in zip(statistics(theirs), statistics(ours)):
        torch.testing.assert_close(a, b)
    before = copy.deepcopy(ours.state_dict())
    ours(torch.randn(4, 3, 10, 10)).mean().backward()
    moved = [key for key, value in ours.state_dict().items() if not torch.equal(value, before[key])]
    assert sum('running_var' in key for key in moved) >= 2
    assert any(key.endswith(COUNTERS) for key in moved)


@pytest.mark.parametrize('name', ['CBN', 'MABN', 'BNET'])
def test_of_averaged_weights(name):
    model = trained(name)
    for averaged in (AveragedModel(model), ExponentialMovingAverage(model)):
        with torch.no_grad():
            for parameter in averaged.parameters():
                parameter.mul_(1.5)
        if isinstance(averaged, AveragedModel):
            update_bn(batches(), averaged)
        else:
            assert recompute_statistics(averaged, batches())
        torch.testing.assert_close(statistics(averaged)[1][0], first_norm(name, batches(), averaged.module)[1])


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('name', [name for name in CFGS if name != 'BN'])
def test_a_bad_batch_is_left_out(name, way):
    model, data = trained(name), batches()
    bad = data[0].clone()
    bad[0, 0, 0, 0] = float('nan')
    WAYS[way](model, [bad, *data])
    torch.testing.assert_close(statistics(model)[1][0], first_norm(name, data, model)[1])


@pytest.mark.parametrize('name', CFGS)
def test_without_a_batch_nothing_is_lost(name):
    model = trained(name)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    with pytest.raises(UserError, match='no batch'):
        recompute_statistics(model, [])

    def breaks(model, batch):
        model(batch)
        raise KeyError('of the data')

    with pytest.raises(KeyError, match='of the data'):
        recompute_statistics(model, batches(), breaks)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(m.momentum is not None for m in model.modules() if hasattr(m, 'momentum'))


class Detector(BaseModel):
    """norm_eval in the backbone, as in mmdet; a branch that no batch reaches."""

    def __init__(self):
        super().__init__()
        self.backbone, self.neck, self.unused = module('BN'), module('CBN', 8), module('BNET', 8)

    def train(self, mode=True):
        super().train(mode)
        self.backbone.norm.eval()

    def forward(self, inputs, mode='tensor'):
        assert mode == 'loss'
        return dict(loss=self.neck(self.backbone(inputs)).mean())


def test_a_detector_keeps_what_norm_eval_keeps_and_what_no_batch_reaches():
    torch.manual_seed(0)
    model = Detector()
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match=r'no finite batch reached unused\.bnet\.bn; they keep'):
        done = recompute_statistics(model, [dict(inputs=x) for x in batches()])
    assert done == ['neck.bn']
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {'neck.bn.running_mean', 'neck.bn.running_var'}


@pytest.mark.parametrize('name', ['CBN', 'MABN'])
def test_after_conversion_to_synchronized_batch_norm(name):
    """Which replaces the child that stands for the statistics, too."""
    model = trained(name)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    for _ in range(2):
        update_bn(batches(), converted)
    torch.testing.assert_close(statistics(converted)[1][0], first_norm(name, batches(), model)[1])


def _in_each(rank: int) -> dict:
    answers = {}
    for name in CFGS:
        model = trained(name)
        mine = batches(4)[2 * rank : 2 * rank + 2]
        recompute_statistics(model, mine)
        answers[name] = [v.tolist() for v in statistics(model)[1]]
        if name != 'SyncBN':  # whose variance is over both batches together
            torch.testing.assert_close(statistics(model)[1][0], first_norm(name, batches(4), model)[1])
    return answers


def test_two_processes_average_over_the_batches_of_both(tmp_path):
    first, second = run_in_two(tmp_path, _in_each)
    assert first.keys() == CFGS.keys()
    for name in CFGS:
        for a, b in zip(first[name], second[name]):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b))


def _bad_in_one(rank: int) -> dict:
    """SyncBN, where the bad batch of one process is in the statistics of both; the others, each by itself."""
    answers = {}
    for name in ('SyncBN', 'BNET', 'AN', 'CBN', 'SN', 'BRN'):
        model = trained(name)
        before = copy.deepcopy(model.state_dict())
        x = batches()[rank].clone()
        if rank == 0:
            x[0, 0, 0, 0] = float('inf')
        model(x).square().mean().backward()
        moved = [k for k, v in model.state_dict().items() if 'running' in k and not torch.equal(v, before[k])]
        finite = all(v.isfinite().all() for v in model.state_dict().values())
        answers[name] = finite, bool(moved)
    return answers


def test_a_bad_batch_in_one_of_two_processes(tmp_path):
    bad, good = run_in_two(tmp_path, _bad_in_one)
    for name in bad:
        assert bad[name] == (True, False) and good[name] == (True, name != 'SyncBN')
