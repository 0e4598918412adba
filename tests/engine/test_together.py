"""What several processes save is what they validate and what they go on from, in both loops and with every hook."""

from math import ceil

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from helpers.processes import run_in_two
from mmdet_norms.engine import SyncBuffersHook, start_cpu_processes, together
from mmdet_norms.engine.norms import iterations_per_epoch
from mmdet_norms.layers import AN, BRN, CBN, MABN, CenConv2d


class Norms(BaseModel):
    """A norm of each kind that keeps state, behind a convolution of its own."""

    def __init__(self):
        super().__init__()
        norms = dict(bn=nn.BatchNorm2d(4), cbn=CBN(4, burnin=2), mabn=MABN(4), brn=BRN(4), an=AN(4))
        self.convs = nn.ModuleDict({k: (CenConv2d if k == 'mabn' else nn.Conv2d)(3, 4, 3) for k in norms})
        self.norms = nn.ModuleDict(norms)
        self.register_buffer('same', torch.tensor([0.1, 123.675, 1 / 3]))
        self.register_buffer('count', torch.zeros((), dtype=torch.int64))

    def forward(self, x, mode='loss'):
        y = sum(norm(self.convs[name](x)).square().mean() for name, norm in self.norms.items())
        if mode == 'loss':
            self.count += int(x.mean() > 0)
            return dict(loss=y)
        return [float(y)] * len(x)


class Images(torch.utils.data.Dataset):
    metainfo = dict(classes=('a',))

    def __len__(self):
        return 16

    def __getitem__(self, i):
        return dict(x=torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i)) * (1 + i % 4) + i % 4 - 1)


class Score:
    """An evaluator whose metric gets worse each time: a better one has the last checkpoint saved again."""

    dataset_meta, score = None, 0

    def process(self, *args, **kwargs):
        pass

    def evaluate(self, size):
        Score.score += 1
        return dict(score=1 / Score.score)


@HOOKS.register_module()
class Recorder(Hook):
    """The model as it is validated and as it is after each checkpoint."""

    priority = 'LOWEST'

    def __init__(self):
        self.validated, self.saved = {}, {}

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        self.validated[runner.iter] = copied(runner.model.module)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.saved[runner.iter + 1] = copied(runner.model.module)


def copied(model):
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def train(rank, folder, loop, ema):
    from mmengine.evaluator import Evaluator

    torch.manual_seed(0)
    Score.score = 0
    evaluator = Evaluator([])
    evaluator.process, evaluator.evaluate = Score().process, Score().evaluate
    by_epoch = loop == 'epoch'
    loader = dict(dataset=Images(), batch_size=2, collate_fn=dict(type='default_collate'))
    sampler = dict(type='DefaultSampler' if by_epoch else 'InfiniteSampler', shuffle=True)
    hooks = [dict(type='SyncBuffersHook'), dict(type='Recorder')]
    if ema is not None:
        hooks.append(dict(type='EMAHook', momentum=0.3, update_buffers=ema))
    cfg = dict(find_unused_parameters=False, launcher='pytorch')
    from mmengine.config import Config

    cfg = Config(cfg)
    start_cpu_processes(cfg)
    runner = Runner(
        model=Norms(),
        work_dir=str(folder),
        train_dataloader=dict(**loader, sampler=sampler),
        val_dataloader=dict(**loader, sampler=dict(type='DefaultSampler', shuffle=False)),
        val_evaluator=evaluator,
        val_cfg=dict(),
        train_cfg=dict(by_epoch=True, max_epochs=2)
        if by_epoch
        else dict(type='IterBasedTrainLoop', max_iters=7, val_interval=4),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9)),
        default_hooks=dict(
            checkpoint=dict(
                type='CheckpointHook',
                interval=1 if by_epoch else 2,
                by_epoch=by_epoch,
                save_best='score',
                rule='greater',
            )
        ),
        custom_hooks=hooks,
        launcher='pytorch',
        env_cfg=dict(dist_cfg=dict(backend='gloo')),
        randomness=dict(seed=1),
        experiment_name=f'{loop}_{ema}',
        cfg=cfg,
    )
    runner.train()
    recorder = next(hook for hook in runner.hooks if isinstance(hook, Recorder))
    ema_model = next((hook.ema_model for hook in runner.hooks if hasattr(hook, 'ema_model')), None)
    return recorder.validated, recorder.saved, None if ema_model is None else copied(ema_model.module)


RUNS = [(loop, ema) for loop in ('epoch', 'iter') for ema in (None, False, True)]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('together')
    answers = run_in_two(folder, train_all, folder)
    return {run: (folder / f'{run[0]}_{run[1]}', answers[0][i], answers[1][i]) for i, run in enumerate(RUNS)}


def train_all(rank, folder):
    return [train(rank, folder / f'{loop}_{ema}', loop, ema) for loop, ema in RUNS]


def differ(one, two):
    assert one.keys() == two.keys()
    return [key for key in one if not torch.equal(one[key], two[key])]


@pytest.mark.parametrize('run', RUNS, ids=str)
def test_what_is_saved_is_what_was_validated_in_every_process(run, runs):
    folder, *both = runs[run]
    step = (lambda number: 4 * number) if run[0] == 'epoch' else (lambda number: number)
    files = sorted(folder.glob('*.pth'))
    assert len(files) == (3 if run[0] == 'epoch' else 5)  # with the best; the last at 7 too
    assert any(path.name.startswith('best_') for path in files)
    validated = 0
    for path in files:
        saved = torch.load(path)['state_dict']
        number = step(int(path.stem.split('_')[-1]))
        for states, _, _ in both:
            if number in states:
                assert not differ(saved, states[number]), path.name
                validated += 1
    assert validated >= 4


@pytest.mark.parametrize('run', [run for run in RUNS if run[0] == 'iter'], ids=str)
def test_all_processes_go_on_from_what_was_saved(run, runs):
    folder, *both = runs[run]
    for number in (2, 4, 6, 7):
        one, two = (answer[1][number] for answer in both)
        assert not differ(one, two), number
        if run[1] is None:
            assert not differ(torch.load(folder / f'iter_{number}.pth')['state_dict'], one)
    one, two = (answer[1][5] for answer in both)  # between two checkpoints they are their own
    parted = differ(one, two)
    for key in (
        'norms.bn.running_mean',
        'norms.mabn.running_var',
        'norms.cbn.history_moments',
        'norms.brn.running_var',
    ):
        assert key in parted, key
    assert 'same' not in parted and not {name for name, _ in Norms().named_parameters()} & set(parted)


def test_the_averages_of_an_ema_agree_too(runs):
    for run in RUNS:
        if run[1] is not None:
            assert not differ(runs[run][1][2], runs[run][2][2])


def forward_twice(rank):
    from mmengine.config import Config
    from mmengine.registry import MODEL_WRAPPERS

    cfg = Config(dict(launcher='pytorch'))
    start_cpu_processes(cfg)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=None))
    ddp = MODEL_WRAPPERS.build(dict(cfg.model_wrapper_cfg), default_args=dict(module=net))
    for turn in range(2):
        ddp(torch.full((2, 3, 4, 4), float(rank + turn))).sum().backward()
    return net[1].running_mean.tolist(), net[0].weight.sum((1, 2, 3)).tolist(), net[0].bias.tolist()


def test_a_process_keeps_its_own_statistics_between_checkpoints(tmp_path):
    """Broadcasting buffers, DDP's default, would overwrite them with the first process's in each forward."""
    for rank, (mean, weight, bias) in enumerate(run_in_two(tmp_path, forward_twice)):
        expected = [(rank + 0.5) * w + b for w, b in zip(weight, bias)]
        assert mean == pytest.approx(expected, abs=1e-6)


def test_what_three_processes_agree_on_is_not_rounded(monkeypatch):
    def of_three(values, op):
        if op == 'mean':
            values.copy_((values + values + values) / 3)

    values = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    rounded = values.clone()
    of_three(rounded, 'mean')
    monkeypatch.setattr(together, 'all_reduce', of_three)
    assert not torch.equal(rounded, values)  # or there would be nothing to see
    assert torch.equal(together._mean(values), values)


@HOOKS.register_module()
class Thawing(Hook):
    """Freezes and thaws while it trains, as a warm-up of new parts does; iteration 2 changes which, not how many."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        trained = ('a', 'c') if runner.iter in (0, 1) else ('b', 'c')
        for name, parameter in runner.model.module.named_parameters():
            parameter.requires_grad_(name.split('.')[0] in trained)


class Three(BaseModel):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.b.requires_grad_(False)
        self.c.requires_grad_(False)

    def forward(self, x, mode='loss'):
        return dict(loss=self.c(self.b(self.a(x))).square().mean())


def thaw(rank, folder):
    from mmengine.config import Config

    torch.manual_seed(0)
    cfg = Config(dict(launcher='pytorch'))
    start_cpu_processes(cfg)
    runner = Runner(
        model=Three(),
        work_dir=str(folder),
        train_dataloader=dict(
            dataset=Images(), batch_size=2, collate_fn=dict(type='default_collate'), sampler=dict(type='DefaultSampler')
        ),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        custom_hooks=[dict(type='Thawing'), dict(type='SyncBuffersHook')],
        launcher='pytorch',
        env_cfg=dict(dist_cfg=dict(backend='gloo')),
        randomness=dict(seed=1),
        experiment_name='thaw',
        cfg=cfg,
    )
    before = copied(runner.model.module)
    runner.train()
    return before, copied(runner.model.module)


def test_what_a_hook_thaws_is_trained_by_all_processes_together(tmp_path):
    (before, one), (_, two) = run_in_two(tmp_path, thaw, tmp_path / 'run')
    assert not differ(one, two)
    assert len(differ(before, one)) == 6


def test_importing_the_package_puts_the_hook_in_the_place_of_the_stock_one():
    assert HOOKS.get('SyncBuffersHook') is SyncBuffersHook


def epochs(rank, kind, size, batch):
    loader = Runner.build_dataloader(dict(dataset=list(range(size)), sampler=dict(type=kind), batch_size=batch), seed=0)
    return iterations_per_epoch(loader)


def all_epochs(rank):
    cases = [(kind, n, b) for kind in ('DefaultSampler', 'InfiniteSampler') for n in (1, 7, 9, 16) for b in (1, 2, 5)]
    return [epochs(rank, *case) for case in cases]


def test_an_epoch_of_burn_in_is_one_of_all_processes(tmp_path):
    for answer in run_in_two(tmp_path, all_epochs):
        assert answer[:12] == answer[12:]
        assert answer[:12] == [ceil(ceil(n / 2) / b) for n in (1, 7, 9, 16) for b in (1, 2, 5)]
    one = all_epochs(0)
    assert one[:12] == one[12:] == [ceil(n / b) for n in (1, 7, 9, 16) for b in (1, 2, 5)]
