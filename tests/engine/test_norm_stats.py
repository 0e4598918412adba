"""NormStatsHook: each quantity against its formula, written out in float64; and training that does not notice."""

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from mmengine.visualization import TensorboardVisBackend, Visualizer
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from helpers.processes import run_in_two
from mmdet_norms.engine import NormStatsHook, start_cpu_processes
from mmdet_norms.engine.norm_stats import NORM_STATS, chosen
from mmdet_norms.errors import UserError
from mmdet_norms.layers import AN, BIN, BNET, BRN, CBN, GN, MABN, RBN, SN, CenConv2d, FrozenBN, GhostBN, LN2d, SyncBN
from mmdet_norms.reference import ReferenceCBN

C = 4
EPS = 1e-5
KINDS = {
    'BN': nn.BatchNorm2d,
    'SyncBN': SyncBN,
    'GhostBN': lambda c: GhostBN(c, norm_batch=2),
    'GN': lambda c: GN(c, num_groups=2),
    'LN2d': LN2d,
    'LN': lambda c: Permuted(nn.LayerNorm(c)),
    'SN': SN,
    'BIN': BIN,
    'RBN': RBN,
    'FrozenBN': FrozenBN,
    'BNET': BNET,
    'AN': lambda c: AN(c, k=3),
    'AN_GN': lambda c: AN(c, norm='GN', k=3, num_groups=2),
    'BRN': BRN,
    'CBN': lambda c: CBN(c, burnin=2, buffer_num=2),
    'MABN': lambda c: MABN(c, buffer_size=3, warmup_iters=0),
    'MABN_groups': lambda c: MABN(c, norm_batch=2, buffer_size=3, warmup_iters=1),
}


class Permuted(nn.Module):
    """Layer norm of torch, which wants channels last."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(3)
        conv = CenConv2d if kind.startswith('MABN') else nn.Conv2d
        self.conv, self.norm = conv(3, C, 3, padding=1, bias=False), KINDS[kind](C)
        for parameter in self.norm.parameters():
            nn.init.normal_(parameter, 0.6, 0.3)
        self.double().train()

    def forward(self, x):
        self.x = self.conv(x)
        self.y = self.norm(self.x)
        for t in (self.x, self.y):
            t.retain_grad() if t.requires_grad else None
        return (self.y.relu() * torch.linspace(-1, 2, self.y.numel(), dtype=self.y.dtype).view_as(self.y)).sum()


def runner_of(model, folder, wrapper=None, visualizer=None):
    logger = SimpleNamespace(info=lambda text: None)
    visualizer = visualizer or SimpleNamespace(_vis_backends=dict(board=Board()))
    return SimpleNamespace(
        model=model, iter=0, optim_wrapper=wrapper, logger=logger, log_dir=str(folder), visualizer=visualizer
    )


class Board:
    """Stands for TensorBoard."""

    def __init__(self):
        self.got = {}

    def add_scalars(self, scalars, step):
        self.got[step] = scalars


def train(model, hook, folder, steps=5, images=4, visualizer=None):
    """Plain steps, with what the hook has written; and everything that went through the norm."""
    runner, calls = runner_of(model, folder, visualizer=visualizer), []
    optimizer = torch.optim.SGD(model.parameters(), 2e-5)
    hook.before_train(runner)
    for step in range(steps):
        runner.iter = step
        torch.manual_seed(step)
        x = torch.randn(images, 3, 6, 5, dtype=torch.double) * (1 + step) + 0.3 * step
        hook.before_train_iter(runner, step)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer.zero_grad()
        model(x).backward()
        grads = (model.x.grad, model.y.grad)
        calls.append((x, model.x.detach(), *(None if g is None else g.clone() for g in grads), before))
        optimizer.step()
        hook.after_train_iter(runner, step)
    hook.after_train(runner)
    return written(folder), calls, visualizer or runner.visualizer._vis_backends['board'].got


def written(folder):
    lines = (folder / 'vis_data' / NORM_STATS).read_text().splitlines()
    return {line['step']: line['layers'] for line in map(json.loads, lines)}


def look(kind, folder, **options):
    model = Net(kind)
    hook = NormStatsHook(**{**dict(interval=1, channels=[0, 1, 2, 3]), **options})
    found, calls, scalars = train(model, hook, folder)
    name = 'norm.norm' if kind == 'LN' else 'norm'
    return model, {step: layers[name] for step, layers in found.items()}, calls, scalars


def per_channel(values):
    return values.numpy().mean((0, 2, 3))


def close(got, expected):
    np.testing.assert_allclose(np.array(got), np.asarray(expected), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize('kind', KINDS)
def test_batch_statistics_and_those_of_the_backward_pass(kind, tmp_path):
    _, found, calls, _ = look(kind, tmp_path)
    assert list(found) == [1, 2, 3, 4, 5]
    for step, (_, x, _, grad, before) in enumerate(calls, 1):
        if 'norm_batch' in kind or kind in ('GhostBN', 'MABN_groups'):
            x, grad = x[:2], grad[:2]
        mean = per_channel(x)
        var = per_channel((x - torch.tensor(mean).view(1, -1, 1, 1)).square())
        close(found[step]['mean'], mean)
        close(found[step]['var'], var)
        h, x_hat = at_normalized_input(kind, x, grad, before, found[step])
        if x_hat is None:
            x_hat = (x - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(var + EPS).sqrt().view(1, -1, 1, 1)
        close(found[step]['g'], per_channel(h))
        close(found[step]['psi'], per_channel(h * x_hat))


def at_normalized_input(kind, x, grad, state, line):
    """The gradient of the loss by the normalized input; and that input, where it is not batch norm's."""
    view = (1, -1, 1, 1)
    if kind == 'BNET':
        leaf = torch.zeros_like(x, requires_grad=True)
        y = F.conv2d(leaf, state['norm.bnconv.weight'], padding=1, groups=C)
        return torch.autograd.grad(y, leaf, grad)[0], None
    if kind.startswith('AN'):
        weights = gates(kind, x, state)
        close(line['weights'], weights)
        return (weights @ state['norm.weight_'])[:, :, None, None] * grad, None
    key = next(k for k in ('norm.weight', 'norm.norm.weight', 'norm.bn.weight') if k in state)
    h = state[key].view(view) * grad
    if kind.startswith('MABN'):
        used, r = (torch.tensor(line[name], dtype=torch.double).view(view) for name in ('second_moment_used', 'r'))
        return h * r, x / (used + EPS).sqrt()
    return h, None


def gates(kind, x, state):
    m, v = x.mean((2, 3)), x.var((2, 3))
    logits = (m / (v + 0.001).sqrt()) @ state['norm.attention_weights.attention.0.weight'].flatten(1).T
    if kind == 'AN_GN':
        logits = logits + state['norm.attention_weights.attention.0.bias']
    else:
        logits = (logits - logits.mean(0)) / (logits.var(0, correction=0) + 1e-5).sqrt()
        logits = logits * state['norm.attention_weights.attention.1.weight']
        logits = logits + state['norm.attention_weights.attention.1.bias']
    return ((logits + 3).clamp(0, 6)) / 6


def test_they_are_what_the_gradient_of_batch_norm_is_made_of(tmp_path):
    """dL/dx = (h - g - x_hat psi) / sigma: the equation of the MABN paper."""
    _, found, calls, _ = look('BN', tmp_path)
    for step, (_, x, grad_x, grad_y, before) in enumerate(calls, 1):
        line = {
            k: torch.tensor(v, dtype=torch.double).view(1, -1, 1, 1)
            for k, v in found[step].items()
            if k in 'meanvargpsi'
        }
        sigma = (line['var'] + EPS).sqrt()
        h = before['norm.weight'].view(1, -1, 1, 1) * grad_y
        rebuilt = (h - line['g'] - (x - line['mean']) / sigma * line['psi']) / sigma
        assert (rebuilt - grad_x).abs().max() < 1e-4 * grad_x.abs().max()


@pytest.mark.parametrize('kind', ['MABN', 'MABN_groups'])
def test_mabn_and_its_window(kind, tmp_path):
    _, found, calls, _ = look(kind, tmp_path)
    running, moments, psis = torch.ones(C, dtype=torch.double), [], []
    for step, (_, x, *_) in enumerate(calls, 1):
        line = found[step]
        groups = x.split(2) if kind == 'MABN_groups' else [x]
        start = len(moments)
        moments += [part.square().mean((0, 2, 3)) for part in groups]
        close(line['second_moment'], moments[start])
        alone = step <= (2 if kind == 'MABN_groups' else 3)
        window = [torch.stack(moments[max(i - 2, 0) : i + 1]).mean(0) for i in range(start, len(moments))]
        used = moments[start:] if alone else window
        close(line['second_moment_used'], used[0])
        r = torch.ones(C, dtype=torch.double)
        if kind == 'MABN_groups':  # from warmup_iters on
            r = ((used[0] + EPS) / (running + EPS)).sqrt().clamp(0.2, 5)
            now = torch.stack(used).mean(0)
            running = now if step == 1 else 0.98 * running + 0.02 * now
        else:
            psis.append(line['psi'])
            close(line['psi_used'], psis[-1] if alone else np.mean(psis[-3:], 0))
        close(line['r'], r)


def test_r_of_mabn_after_its_delay(tmp_path):
    model = Net('MABN')
    model.norm.iters.fill_(1001)
    model.norm.running_var.fill_(0.3)
    found, calls, _ = train(model, NormStatsHook(1, channels=[0, 1, 2, 3]), tmp_path, 1)
    used = (calls[0][1].square().mean((0, 2, 3))) / 3  # the other two rows of the window are 0
    close(found[1]['norm']['r'], ((used + EPS) / (0.3 + EPS)).sqrt().clamp(0.2, 5))


def test_cbn_against_the_images_under_todays_weights(tmp_path):
    """Steps 1 and 2 are burn-in; from step 4 on there is a window to look back on."""
    _, found, calls, _ = look('CBN', tmp_path)
    assert all('exact_mean' not in found[step] for step in (1, 2, 3))
    for step in (4, 5):
        weight = calls[step - 1][-1]['conv.weight']
        entries = list(range(max(2, step - 3), step))  # indices, with the current one
        exact, plain, compensated = [], [], []
        for i in entries:
            images, own = calls[i][0], calls[i][-1]['conv.weight'].clone().requires_grad_()
            now = F.conv2d(images, weight, padding=1)
            exact.append((now.mean((0, 2, 3)), now.square().mean((0, 2, 3))))
            then = F.conv2d(images, own, padding=1)
            m, q = then.mean((0, 2, 3)), then.square().mean((0, 2, 3))
            dm, dq = (torch.autograd.grad(s.sum(), own, retain_graph=True)[0] for s in (m, q))
            plain.append((m.detach(), q.detach()))
            moved = [(d * (weight - own.detach())).sum((1, 2, 3)) for d in (dm, dq)]
            compensated.append((m.detach() + moved[0], q.detach() + moved[1]))
        line, reference = found[step], ReferenceCBN(C)
        truth = reference.average(*(torch.stack(p) for p in zip(*exact)))
        for name, parts in (('compensated', compensated), ('naive', plain), ('exact', exact)):
            mean, var = reference.average(*(torch.stack(p) for p in zip(*parts)))
            close(line[f'{name}_mean'], mean)
            close(line[f'{name}_var'], var)
            if name != 'exact':
                close(line[f'{name}_error'], (mean - truth[0]).abs() / (truth[1] + EPS).sqrt())
                close(line[f'{name}_var_error'], (var - truth[1]).abs() / (truth[1] + EPS))
        assert line['all']['compensated_error'] < 1e-6 * line['all']['naive_error']  # the mean is linear in the weights
        assert line['all']['compensated_var_error'] < 0.3 * line['all']['naive_var_error']


def test_cbn_at_intervals_keeps_the_images_that_it_needs(tmp_path):
    _, every, _, _ = look('CBN', tmp_path / 'a')
    _, seldom, _, _ = look('CBN', tmp_path / 'b', interval=5)
    assert list(seldom) == [5] and seldom[5] == every[5]


def test_energy_of_bnet_by_tap(tmp_path):
    _, found, calls, _ = look('BNET', tmp_path)
    kernels = calls[4][-1]['norm.bnconv.weight'].numpy()
    close(found[5]['energy'], (kernels**2).sum((0, 1)) / (kernels**2).sum())


def test_one_number_for_all_channels(tmp_path):
    _, found, calls, scalars = look('BN', tmp_path, channels=2)
    x = calls[4][1]
    assert found[5]['channels'] == [0, 2] and len(found[5]['mean']) == 2
    close(found[5]['all']['mean'], x.mean((0, 2, 3)).square().mean().sqrt())
    close(found[5]['all']['var'], x.var((0, 2, 3), correction=0).mean())
    assert scalars[5].keys() == {f'norm_stats/norm/{name}' for name in ('mean', 'var', 'g', 'psi')}
    close(scalars[5]['norm_stats/norm/mean'], found[5]['all']['mean'])


@pytest.mark.parametrize('kind', ['BNET', 'AN'])
def test_tensorboard_has_the_energy_of_each_tap_and_the_weight_of_each_component(kind, tmp_path):
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    visualizer = Visualizer(vis_backends=[TensorboardVisBackend(str(tmp_path))])
    found, *_ = train(Net(kind), NormStatsHook(1), tmp_path, visualizer=visualizer)
    visualizer.close()
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    key, rows = (
        ('energy', 'norm_stats/norm/energy/{}_{}') if kind == 'BNET' else ('weights', 'norm_stats/norm/weights/{1}')
    )
    for step, layers in found.items():
        line = layers['norm']
        values = np.array(line[key] if kind == 'BNET' else np.mean(line[key], 0, keepdims=True))
        names = {rows.format(*place): value for place, value in np.ndenumerate(values)}
        assert {name for name in events.Tags()['scalars'] if key in name} == set(names)
        seen = {name: next(e.value for e in events.Scalars(name) if e.step == step) for name in names}
        close(list(seen.values()), list(names.values()))
        assert key not in line['all']


def test_kernels_of_zeros_have_no_energy_to_follow(tmp_path):
    model = Net('BNET')
    nn.init.zeros_(model.norm.bnconv.weight)
    found, _, scalars = train(model, NormStatsHook(1), tmp_path, 1)
    assert found[1]['norm']['energy'][0][0] is None and not [name for name in scalars[1] if 'energy' in name]


# ------------------------------------------------------------------------------------------------ training as before


class Model(BaseModel):
    """Each norm that keeps something between iterations, twice in a checkpointed part, in half precision on request."""

    def __init__(self, reentrant=None, half=False):
        super().__init__()
        torch.manual_seed(0)
        self.reentrant, self.half = reentrant, half
        self.conv1, self.bn1 = nn.Conv2d(3, C, 3), nn.BatchNorm2d(C)
        self.conv2, self.bn2 = nn.Conv2d(C, C, 3, bias=False), CBN(C, burnin=1, buffer_num=2)
        self.conv3, self.bn3 = CenConv2d(C, C, 3), MABN(C, buffer_size=2, warmup_iters=0)
        self.conv4, self.bn4 = nn.Conv2d(C, C, 1), BNET(C)
        self.conv5, self.bn5 = nn.Conv2d(C, C, 1), AN(C, k=3)
        self.bn6 = SyncBN(C)

    def tail(self, x):
        x = self.bn3(self.conv3(self.bn2(self.conv2(x)))).relu_()
        return self.bn6(self.bn5(self.conv5(self.bn4(self.conv4(x))).relu_()))

    def forward(self, x, mode='loss'):
        x = torch.stack(x)
        with torch.autocast('cpu', torch.bfloat16, enabled=self.half):
            x = self.bn1(self.conv1(x)).relu_()
            again = x if self.reentrant is None else x + 0
            y = (
                self.tail(again)
                if self.reentrant is None
                else checkpoint(self.tail, again, use_reentrant=self.reentrant)
            )
        return dict(loss=(y.float().square() * torch.linspace(0, 1, y.shape[-1])).mean())


class Data(torch.utils.data.Dataset):
    metainfo: dict = {}

    def __len__(self):
        return 24

    def __getitem__(self, i):
        return dict(x=torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(i)) + i / 8)


def run(folder, hooks, rank=0, **model):
    distributed = torch.distributed.is_initialized()
    cfg = Config(dict(launcher='pytorch' if distributed else 'none'))
    start_cpu_processes(cfg)
    resume = model.pop('resume', None)
    runner = Runner(
        model=Model(**model),
        work_dir=str(folder),
        train_dataloader=dict(
            dataset=Data(), batch_size=3, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False)
        ),
        train_cfg=dict(by_epoch=True, max_epochs=model.pop('epochs', 1)),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1, momentum=0.9)),
        custom_hooks=[dict(type='NormHook'), dict(type='RandomStateHook'), *hooks],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=2, by_epoch=False)),
        launcher=cfg.launcher,
        env_cfg=dict(dist_cfg=dict(backend='gloo')),
        experiment_name=f'look_{folder.name}_{rank}',
        log_level='WARNING',
        cfg=cfg,
        load_from=resume,
        resume=resume is not None,
    )
    runner.train()
    state = getattr(runner.model, 'module', runner.model).state_dict()
    return {key: value.clone() for key, value in state.items()}, runner


HOOK = dict(type='NormStatsHook', interval=2, layers='*')


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('model', [{}, dict(half=True), dict(reentrant=False), dict(reentrant=True)], ids=str)
def test_training_is_the_same_bit_by_bit(model, tmp_path):
    plain, _ = run(tmp_path / 'plain', [], **model)
    looked, runner = run(tmp_path / 'looked', [HOOK], **model)
    same(plain, looked)
    found = written(tmp_path / 'looked' / runner.timestamp)
    assert list(found) == [2, 4, 6, 8]
    for layers in found.values():
        assert len(layers) == 6 and all('psi' in line and None not in line['psi'] for line in layers.values())
    assert 'exact_mean' in found[8]['bn2'] and 'psi_used' in found[8]['bn3'] and 'weights' in found[8]['bn5']
    if model:  # checkpointing changes nothing of what is seen, half precision little
        whole = written(tmp_path / 'looked' / run(tmp_path / 'looked', [HOOK])[1].timestamp)
        tolerance = 0.3 if 'half' in model else 1e-4
        for name, line in whole[8].items():
            np.testing.assert_allclose(found[8][name]['psi'], line['psi'], rtol=tolerance, atol=tolerance * 1e-2)


@pytest.mark.filterwarnings('ignore')
def test_groups_of_images_in_a_checkpoint_have_their_gradient(tmp_path):
    norm = GhostBN(C, norm_batch=2)
    hook, runner = NormStatsHook(1), runner_of(nn.Sequential(norm), tmp_path)
    hook.before_train(runner)
    hook.before_train_iter(runner, 0)
    x = torch.arange(4.0 * C * 6).sin().view(4, C, 3, 2).requires_grad_()
    checkpoint(norm, x, use_reentrant=True).square().sum().backward()
    hook.after_train_iter(runner, 0)
    assert None not in written(tmp_path)[1]['0']['psi']


def in_two(rank, folder):
    looked, runner = run(folder / 'looked', [HOOK], rank)
    plain, _ = run(folder / 'plain', [], rank)
    return (
        looked,
        plain,
        rank or written(folder / 'looked' / runner.timestamp),
        [union(folder, rank, n) for n in ((2, 3), (0, 3))],
    )


def union(folder, rank, images):
    """A step of SyncBN with so many images in each process."""
    model = nn.Sequential(SyncBN(C)).double()
    nn.init.normal_(model[0].weight)
    torch.distributed.broadcast(model[0].weight.data, 0)
    x = torch.randn(images[rank], C, 3, 4, dtype=torch.double, generator=torch.Generator().manual_seed(rank)) + rank
    hook, runner = NormStatsHook(1, channels=[0, 1, 2, 3]), runner_of(model, folder / f'union{images[0]}')
    hook.before_train(runner)
    hook.before_train_iter(runner, 0)
    y = model(x.requires_grad_())
    y.retain_grad()
    (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    hook.after_train_iter(runner, 0)
    return x.detach(), y.grad, model[0].weight.detach().clone(), rank or written(folder / f'union{images[0]}')


@pytest.mark.filterwarnings('ignore')
def test_two_processes_and_the_union_of_their_batches(tmp_path):
    results = run_in_two(tmp_path, partial(in_two, folder=tmp_path))
    for looked, plain, *_ in results:
        same(looked, plain)
    found = results[0][2]
    assert list(found) == [2, 4] and len(found[4]) == 6
    for case in range(2):
        x, grad = (torch.cat([result[3][case][i] for result in results]) for i in range(2))
        weight, found = results[0][3][case][2:]
        line = found[1]['0']
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        x_hat = (x - mean.view(1, -1, 1, 1)) / (var + EPS).sqrt().view(1, -1, 1, 1)
        h = weight.view(1, -1, 1, 1) * grad
        for name, expected in dict(mean=mean, var=var, g=h.mean((0, 2, 3)), psi=(h * x_hat).mean((0, 2, 3))).items():
            close(line[name], expected)


def test_a_resumed_run_is_the_one_that_was_not_stopped(tmp_path):
    whole, runner = run(tmp_path / 'whole', [HOOK])
    resumed, again = run(tmp_path / 'resumed', [HOOK], resume=str(tmp_path / 'whole' / 'iter_4.pth'))
    same(whole, resumed)
    first, second = (written(tmp_path / n / r.timestamp) for n, r in (('whole', runner), ('resumed', again)))
    assert list(second) == [6, 8]
    for step in second:  # CBN's images of before the stop are gone, and what needs them
        for name, line in second[step].items():
            lost = {key for key in first[step][name] if 'exact' in key or 'error' in key} - line.keys()
            assert bool(lost) == (name == 'bn2' and step == 6)
            assert all(line[key] == first[step][name][key] for key in line if key != 'all')


# ------------------------------------------------------------------------------------------------ wrong input


def test_layers_by_name_or_evenly_spread():
    model = nn.Sequential(*[nn.Sequential(nn.BatchNorm2d(2), BNET(2), CBN(2)) for _ in range(7)])
    assert list(chosen(model, None)) == ['0.1', '1.1', '2.1', '3.1', '3.2', '4.2', '5.2', '6.2']  # no batch norm
    plain = nn.Sequential(*[nn.BatchNorm2d(2) for _ in range(15)])
    assert list(chosen(plain, None)) == ['0', '2', '4', '6', '8', '10', '12', '14']
    assert list(chosen(model, ['?.1', '6.*'])) == [f'{i}.1' for i in range(6)] + ['6.0', '6.1', '6.2']
    with pytest.raises(UserError, match=r"layers='7\.\*' fits none of the 21 norm layers; their names are such as"):
        chosen(model, ['7.*'])
    with pytest.raises(UserError, match='has no norm layers'):
        chosen(nn.Conv2d(1, 1, 1), None)


@pytest.mark.parametrize(
    'options',
    [dict(interval=0), dict(interval=True), dict(layers=[]), dict(layers=3), dict(channels=0), dict(channels=['a'])],
)
def test_wrong_arguments(options):
    with pytest.raises(UserError, match=f'NormStatsHook: {next(iter(options))}='):
        NormStatsHook(**options)


def test_a_loss_scale_is_taken_out(tmp_path):
    found = []
    for scale in (1.0, 1024.0):
        wrapper = SimpleNamespace(loss_scaler=SimpleNamespace(get_scale=lambda scale=scale: scale))
        model, hook, runner = Net('MABN'), NormStatsHook(1), runner_of(None, tmp_path / str(scale), wrapper)
        runner.model = model
        hook.before_train(runner)
        for runner.iter in range(5):
            hook.before_train_iter(runner, 0)
            (scale * model(torch.ones(2, 3, 4, 4, dtype=torch.double).cumsum(0).cumsum(3))).backward()
            hook.after_train_iter(runner, 0)
        found.append(written(tmp_path / str(scale))[5]['norm'])
    assert found[0] == found[1]


def test_a_loss_scale_is_asked_for_by_looks_alone(tmp_path):
    asked = []  # on a GPU each waits for it
    wrapper = SimpleNamespace(loss_scaler=SimpleNamespace(get_scale=lambda: asked.append(runner.iter) or 1.0))
    hook, runner = NormStatsHook(5), runner_of(Net('BN'), tmp_path, wrapper)
    hook.before_train(runner)
    for runner.iter in range(12):
        hook.before_train_iter(runner, 0)
    assert asked == [4, 9]


def test_the_number_of_accumulated_batches_is_noted(tmp_path):
    found = []
    for counts in (1, 3):
        model, hook = Net('BN'), NormStatsHook(1)
        wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), 0.1), accumulative_counts=counts)
        wrapper.initialize_count_status(model, 0, 4)
        runner = runner_of(model, tmp_path / str(counts), wrapper)
        hook.before_train(runner)
        for runner.iter in range(4):
            hook.before_train_iter(runner, 0)
            loss = model(torch.ones(2, 3, 4, 4, dtype=torch.double).cumsum(0).cumsum(3))
            wrapper.scale_loss(loss).backward()
            wrapper._inner_count += 1
            hook.after_train_iter(runner, 0)
        found.append([layers['norm'] for layers in written(tmp_path / str(counts)).values()])
    assert [[line['accumulated'] for line in lines] for lines in found] == [[1] * 4, [3, 3, 3, 1]]
    for one, several in zip(*found):
        np.testing.assert_allclose(np.array(several['psi']) * several['accumulated'], one['psi'], rtol=1e-5)


def test_layers_that_nobody_calls_are_said(tmp_path):
    runner, hook = runner_of(Net('BN'), tmp_path), NormStatsHook(1)
    hook.before_train(runner)
    hook.before_train_iter(runner, 0)
    with pytest.warns(UserWarning, match='no layer was called in iteration 1'):
        hook.after_train_iter(runner, 0)
