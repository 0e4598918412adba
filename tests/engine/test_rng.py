"""A resumed run is the run that was never stopped, bit by bit: loops, samplers, workers, checkpoints, processes."""

import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import InfiniteSampler
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATA_SAMPLERS, HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import nn
from torch.utils.data import BatchSampler, DataLoader

from helpers.processes import run_in_two
from mmdet_norms.compat.loading import InfiniteBatches, finish_epoch
from mmdet_norms.engine import rng, start_cpu_processes
from mmdet_norms.errors import UserError
from mmdet_norms.layers import BNET, CBN, MABN, CenConv2d


class Resizing(nn.Module):
    """Draws a size now and then and keeps it, as mmdet's BatchSyncRandomResize."""

    _input_size = None

    def forward(self, x, turn):
        if self._input_size is None or turn % 3 == 0:
            self._input_size = (random.randint(6, 9), random.randint(6, 9))
        return nn.functional.interpolate(x, self._input_size)


class Random(BaseModel):
    def __init__(self):
        super().__init__()
        self.resize = Resizing()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), CBN(4, burnin=2)
        self.conv3, self.bn3 = CenConv2d(4, 4, 1), MABN(4)
        self.bn4 = BNET(4)
        self.turns = 0

    def forward(self, x, i, mode='loss'):
        if mode != 'loss':
            torch.rand(3), random.random(), np.random.rand()  # a validation that draws
            return [0.0] * len(x)
        x = self.resize(x, int(i.sum())) * (1 + 0.1 * random.random()) + 0.1 * np.random.rand()
        x = self.bn4(self.bn3(self.conv3(self.bn2(self.conv2(self.bn1(self.conv1(x)))))))
        return dict(loss=nn.functional.dropout(x).square().mean())


class Augmented(torch.utils.data.Dataset):
    metainfo = dict(classes=('a',))

    def __len__(self):
        return 20

    def __getitem__(self, i):
        x = torch.full((3, 8, 8), i / 20) + random.random() + np.random.rand() + torch.rand(3, 8, 8)
        return dict(x=x, i=i)


@DATA_SAMPLERS.register_module()
class Choosing(InfiniteSampler):
    """Asks NumPy's generator of the process for each image, as mmdet's GroupMultiSourceSampler."""

    def __iter__(self):
        for index in super().__iter__():
            yield (index + np.random.randint(5)) % self.size


@HOOKS.register_module()
class Diary(Hook):
    """What each iteration saw and lost."""

    def __init__(self):
        self.lines = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        seen = data_batch['i'].tolist(), float(data_batch['x'].double().sum()), float(outputs['loss'])
        self.lines.append((runner.iter, runner.epoch, batch_idx, *seen))


def run(folder, loop='epoch', sampler='DefaultSampler', workers=0, persistent=False, every=1, by_epoch=True,
        resume=None, accumulate=1, ema=True, hook=True, seed=None, size=2, name='run',
        optimizer=None, schedule=None, paramwise=None):  # fmt: skip
    torch.manual_seed(5)
    model = Random()
    torch.manual_seed(random.SystemRandom().randrange(2**31))  # nothing of the test may help
    np.random.seed(random.SystemRandom().randrange(2**31))
    random.seed()
    evaluator = Evaluator([])
    evaluator.process, evaluator.evaluate = lambda *args, **kwargs: None, lambda size: dict(score=1.0)
    distributed = torch.distributed.is_initialized()
    cfg = Config(dict(launcher='pytorch' if distributed else 'none'))
    if sampler == 'RandomSampler':
        train_loader = DataLoader(Augmented(), batch_size=size, shuffle=True)
    else:
        train_loader = dict(
            dataset=Augmented(), batch_size=size, sampler=dict(type=sampler), num_workers=workers,
            persistent_workers=persistent, collate_fn=dict(type='default_collate'),
        )  # fmt: skip
    start_cpu_processes(cfg)
    hooks = [dict(type='Diary')]
    hooks += [dict(type='RandomStateHook')] * hook
    hooks += [dict(type='SyncBuffersHook')] * distributed + [dict(type='EMAHook', momentum=0.1)] * ema
    epochs = dict(by_epoch=True, max_epochs=3)
    runner = Runner(
        model=model,
        work_dir=str(folder),
        train_dataloader=train_loader,
        val_dataloader=dict(
            dataset=Augmented(), batch_size=10, sampler=dict(type='DefaultSampler', shuffle=False), num_workers=0,
            collate_fn=dict(type='default_collate'),
        ),
        val_evaluator=evaluator,
        val_cfg=dict(),
        train_cfg=epochs if loop == 'epoch' else dict(type='IterBasedTrainLoop', max_iters=25, val_interval=7),
        optim_wrapper=dict(
            optimizer=optimizer or dict(type='Adam', lr=0.01), accumulative_counts=accumulate, paramwise_cfg=paramwise
        ),
        param_scheduler=[dict(type='ExponentialLR', gamma=0.9, by_epoch=False)] if schedule is None else schedule,
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=every, by_epoch=by_epoch)),
        custom_hooks=hooks,
        launcher=cfg.launcher,
        env_cfg=dict(dist_cfg=dict(backend='gloo')),
        load_from=resume,
        resume=resume is not None,
        randomness=dict(seed=seed),
        experiment_name=f'{name}_{random.SystemRandom().random()}',
        log_level='WARNING',
        cfg=cfg,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        runner.train()
    diary = next(hook for hook in runner.hooks if isinstance(hook, Diary))
    return diary.lines


def checkpoint(path):
    saved = torch.load(path, map_location='cpu')
    hub = saved['message_hub']
    kept = {
        key: saved[key] for key in ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers') if key in saved
    }
    losses = hub['log_scalars']['train/loss']._log_history
    return flat(dict(kept, states=saved.get(rng.KEY), losses=losses, iter=saved['meta']['iter']))


def flat(node, name=''):
    if isinstance(node, dict):
        return {k: v for key, value in node.items() for k, v in flat(value, f'{name}.{key}').items()}
    if isinstance(node, (list, tuple)):
        return {k: v for i, value in enumerate(node) for k, v in flat(value, f'{name}.{i}').items()}
    return {name: node.numpy() if isinstance(node, torch.Tensor) else node}


def log_of(folder):
    return ''.join(path.read_text() for path in folder.glob('*/*.log'))


def same(one, two):
    """Names of what differs."""
    names = sorted(one.keys() ^ two.keys())
    return names + [k for k in one.keys() & two.keys() if not np.array_equal(one[k], two[k])]


INFINITE = dict(loop='iter', sampler='InfiniteSampler', by_epoch=False, every=6)
CASES = {
    'epochs': (dict(), 'epoch_1.pth', 'epoch_3.pth', 10),
    'within an epoch': (dict(by_epoch=False, every=7), 'iter_14.pth', 'iter_30.pth', 14),
    'at the end of an epoch': (dict(by_epoch=False, every=10), 'iter_20.pth', 'iter_30.pth', 20),
    'within the last epoch': (dict(by_epoch=False, every=29), 'iter_29.pth', 'iter_30.pth', 29),
    'workers': (dict(workers=2), 'epoch_1.pth', 'epoch_3.pth', 10),
    'persistent workers': (dict(workers=2, persistent=True), 'epoch_2.pth', 'epoch_3.pth', 20),
    'workers within an epoch': (dict(workers=2, by_epoch=False, every=13), 'iter_13.pth', 'iter_30.pth', 13),
    'persistent within an epoch': (
        dict(workers=2, persistent=True, by_epoch=False, every=13), 'iter_13.pth', 'iter_30.pth', 13),
    'accumulation across an epoch': (dict(accumulate=3), 'epoch_1.pth', 'epoch_3.pth', 10),
    'accumulation': (dict(accumulate=4, by_epoch=False, every=6), 'iter_6.pth', 'iter_30.pth', 6),
    'infinite': (INFINITE, 'iter_12.pth', 'iter_25.pth', 12),
    'infinite with workers': (
        dict(INFINITE, workers=2), 'iter_18.pth', 'iter_25.pth', 18),
    'infinite, at a validation': (
        dict(INFINITE, every=7), 'iter_14.pth', 'iter_25.pth', 14),
    'passes of an iteration loop': (dict(loop='iter', by_epoch=False, every=6), 'iter_12.pth', 'iter_25.pth', 12),
    'a sampler that draws': (dict(INFINITE, sampler='Choosing'), 'iter_12.pth', 'iter_25.pth', 12),
    'a sampler that draws ahead': (
        dict(INFINITE, sampler='Choosing', workers=2), 'iter_18.pth', 'iter_25.pth', 18),
    'end of a pass': (dict(loop='iter', by_epoch=False, every=10), 'iter_10.pth', 'iter_25.pth', 10),
    'torch sampler': (dict(sampler='RandomSampler', by_epoch=False, every=13), 'iter_13.pth', 'iter_30.pth', 13),
    'torch sampler, by epoch': (dict(sampler='RandomSampler'), 'epoch_2.pth', 'epoch_3.pth', 20),
    'torch sampler, iterations': (
        dict(sampler='RandomSampler', loop='iter', by_epoch=False, every=6), 'iter_12.pth', 'iter_25.pth', 12),
    'last batch smaller': (dict(size=3, by_epoch=False, every=5), 'iter_5.pth', 'iter_21.pth', 5),
    'a seed': (dict(seed=3, by_epoch=False, every=7), 'iter_14.pth', 'iter_30.pth', 14),
}  # fmt: skip


@pytest.mark.parametrize('case', CASES)
def test_a_resumed_run_is_the_one_that_never_stopped(case, tmp_path):
    options, source, last, done = CASES[case]
    whole = run(tmp_path / 'whole', **options)
    rest = run(tmp_path / 'rest', **options, resume=str(tmp_path / 'whole' / source))
    assert rest == whole[done:]
    assert 'lost' not in log_of(tmp_path / 'rest')
    assert not same(checkpoint(tmp_path / 'rest' / last), checkpoint(tmp_path / 'whole' / last))


def two_runs(rank, folder, options, source):
    whole = run(folder / 'whole', **options)
    return whole, run(folder / 'rest', **options, resume=str(folder / 'whole' / source))


TWO = {
    'epochs': (dict(workers=1), 'epoch_1.pth', 'epoch_3.pth', 5),
    'within an epoch': (dict(by_epoch=False, every=4), 'iter_8.pth', 'iter_15.pth', 8),
    'infinite': (INFINITE, 'iter_18.pth', 'iter_25.pth', 18),
    'accumulation': (dict(accumulate=3, by_epoch=False, every=4), 'iter_4.pth', 'iter_15.pth', 4),
}  # fmt: skip


def all_in_two(rank, folder):
    return [two_runs(rank, folder / name, *case[:2]) for name, case in TWO.items()]


@pytest.fixture(scope='module')
def in_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp('two')
    return folder, run_in_two(folder, all_in_two, folder)


@pytest.mark.parametrize('case', TWO)
def test_so_are_two_processes(case, in_two):
    folder, answers = in_two
    *_, last, done = TWO[case]
    diaries = [answer[list(TWO).index(case)] for answer in answers]
    for whole, rest in diaries:
        assert rest == whole[done:]
    assert diaries[0][0] != diaries[1][0]  # they see different images
    assert not same(checkpoint(folder / case / 'rest' / last), checkpoint(folder / case / 'whole' / last))


def test_the_number_of_workers_changes_nothing(tmp_path):
    diaries = [run(tmp_path / str(n), workers=n, seed=1) for n in (0, 1, 3)]
    assert diaries[0] == diaries[1] == diaries[2]


@pytest.mark.parametrize(
    'first, then, said',
    [
        (dict(hook=False), dict(), 'has no random states'),
        (dict(), dict(size=4), "'batch_size': 2"),
        (dict(), dict(sampler='InfiniteSampler', loop='iter'), 'InfiniteSampler'),
        (dict(), dict(optimizer=dict(type='Adam', lr=0.5)), 'goes on with lr=0.01, not with 0.5 of the config'),
        (dict(), dict(optimizer=dict(type='Adam', lr=0.01, betas=(0.5, 0.9))), 'betas=(0.9, 0.999), not with (0.5, 0'),
        (dict(), dict(schedule=[dict(type='ExponentialLR', gamma=0.5, by_epoch=False)]), 'gamma=0.9, not with 0.5'),
        (dict(), dict(schedule=[]), 'the state of 1 schedules (param_scheduler), and the config has 0'),
        (dict(hook=False, accumulate=3), dict(accumulate=3), 'step of the optimizer has 1 of 3 batches'),
        (dict(ema=True), dict(), 'its weights are averages of an EMAHook'),
        (dict(), dict(ema=True), 'it has no averages (EMAHook)'),
    ],
)
def test_where_it_is_another_run_the_log_says_so(first, then, said, tmp_path):
    run(tmp_path / 'whole', **dict(dict(ema=False), **first))
    run(tmp_path / 'rest', **dict(dict(ema=False), **then), resume=str(tmp_path / 'whole' / 'epoch_2.pth'))
    log = log_of(tmp_path / 'rest')
    assert 'not bit by bit' in log and said in log


def test_gradients_of_a_step_of_another_size_are_left_out(tmp_path, monkeypatch):
    begun = dict(by_epoch=False, every=6, ema=False)
    run(tmp_path / 'whole', accumulate=4, **begun)
    path = tmp_path / 'whole' / 'iter_6.pth'
    gradients, before_train = [], rng.RandomStateHook.before_train

    def look(hook, runner):
        before_train(hook, runner)
        gradients.append(any(parameter.grad is not None for parameter in runner.model.parameters()))

    monkeypatch.setattr(rng.RandomStateHook, 'before_train', look)
    for counts, said in (
        (3, 'gradients of a begun step are left out'),
        (5, 'are left out; its first step of the optimizer has 4 of 5 batches'),
    ):
        run(tmp_path / str(counts), accumulate=counts, **begun, resume=str(path))
        log = log_of(tmp_path / str(counts))
        assert f'every {counts} iterations (accumulative_counts), not every 4 as before' in log
        assert said in log and 'not bit by bit' in log
    saved = torch.load(path, map_location='cpu')
    assert all(mine.pop('counts') == 4 for mine in saved[rng.KEY]['processes'])
    torch.save(saved, path)  # as one of an earlier version
    run(tmp_path / 'old', accumulate=4, **begun, resume=str(path))
    assert gradients == [False, False, True] and 'not bit by bit' not in log_of(tmp_path / 'old')


@pytest.mark.parametrize('end', [10, 20])
def test_a_finished_run_lacks_no_batches(end):
    runner = SimpleNamespace(iter=10, train_loop=SimpleNamespace(max_iters=end), model=torch.nn.Linear(1, 1))
    runner.optim_wrapper = SimpleNamespace(_accumulative_counts=4)
    assert rng._short_step(runner) == ['its first step of the optimizer has 2 of 4 batches'] * (end > 10)


def test_another_number_of_processes_is_said(tmp_path):
    run(tmp_path / 'whole', ema=False)
    path = tmp_path / 'whole' / 'epoch_2.pth'
    saved = torch.load(path, map_location='cpu')
    saved[rng.KEY]['processes'] *= 2
    torch.save(saved, path)
    run(tmp_path / 'rest', ema=False, resume=str(path))
    log = log_of(tmp_path / 'rest')
    assert 'saved by 2 processes, and this run has 1' in log


def test_every_pass_of_an_iteration_loop_has_an_order_of_its_own():
    loader = dict(dataset=list(range(20)), sampler=dict(type='DefaultSampler'), batch_size=20, num_workers=0)
    batches = InfiniteBatches(Runner.build_dataloader(loader, seed=0))
    orders = [tuple(next(batches)) for _ in range(3)]
    assert len(set(orders)) == 3 and all(sorted(order) == list(range(20)) for order in orders)


def test_the_state_of_another_optimizer_is_refused(tmp_path):
    run(tmp_path / 'whole', ema=False)
    for then, said in (
        (
            dict(optimizer=dict(type='SGD', lr=0.01)),
            'another optimizer than SGD: it has no dampening, momentum, nesterov',
        ),
        (dict(paramwise=dict(bias_lr_mult=2.0)), 'has 1 groups with 14 parameters, that of this run 14 with 14'),
    ):
        with pytest.raises(UserError, match=said):
            run(tmp_path / 'rest', ema=False, **then, resume=str(tmp_path / 'whole' / 'epoch_2.pth'))


def test_a_loop_with_epochs_of_its_own_is_left_alone():
    class OwnLoop(EpochBasedTrainLoop):
        def run_epoch(self):
            super().run_epoch()

    loop = OwnLoop.__new__(OwnLoop)
    assert not finish_epoch(loop, lambda: iter(()), 1) and not vars(loop)


def test_states_of_all_generators_survive_a_checkpoint(tmp_path):
    random.gauss(0, 1), np.random.normal()  # both keep a second number
    state = rng.random_state()
    torch.save(rng.pack(state), tmp_path / 'state.pth')
    drawn = [random.gauss(0, 1), np.random.normal(), torch.rand(2).tolist(), random.random(), np.random.rand()]
    rng.set_random_state(rng.unpack(torch.load(tmp_path / 'state.pth', weights_only=True)))
    again = [random.gauss(0, 1), np.random.normal(), torch.rand(2).tolist(), random.random(), np.random.rand()]
    assert again == drawn


def test_every_image_of_every_batch_process_and_seed_draws_numbers_of_its_own():
    drawn = []
    for seed, rank in ((0, 0), (0, 1), (1, 0)):
        batches = rng.NumberedBatches(BatchSampler(range(4), 2, drop_last=False), seed, rank)
        for batch in (*batches, *batches):
            drawn += [(random.random(), float(np.random.rand()), float(torch.rand(()))) for _ in batch]
    assert len(drawn) == 24 and all(len(set(numbers)) == 24 for numbers in zip(*drawn))


@pytest.mark.parametrize(
    'states',
    ['x', {}, dict(version=2, processes=[]), dict(version=1, processes=[{}]),
     dict(version=1, processes=[dict(rng={}, images={}, gradients={}, sizes={})])],
)  # fmt: skip
def test_states_of_another_form_are_not_taken(states, tmp_path):
    run(tmp_path / 'whole', ema=False)
    path = tmp_path / 'whole' / 'epoch_2.pth'
    torch.save({**torch.load(path), rng.KEY: states}, path)
    run(tmp_path / 'rest', ema=False, resume=str(path))
    log = log_of(tmp_path / 'rest')
    assert 'not bit by bit' in log and 'are of another form' in log


def test_loading_a_batch_leaves_the_generators_as_they_were_even_if_it_fails():
    def state():
        return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]

    before = state()
    drawn = [(i, random.random(), np.random.rand(), torch.rand(1).item()) for i in rng.SeededBatch([7, 8], (1, 0, 5))]
    assert state() == before and drawn[0][1] != drawn[1][1]
    assert drawn == [
        (i, random.random(), np.random.rand(), torch.rand(1).item()) for i in rng.SeededBatch([7, 8], (1, 0, 5))
    ]
    with pytest.raises(ZeroDivisionError):
        [1 / 0 for _ in rng.SeededBatch([7], (1, 0, 5))]
    assert state() == before


def test_transforms_that_keep_images_are_named():
    class CachedMosaic:
        results_cache = []

    class Pipeline:
        def __init__(self, transforms):
            self.transforms = transforms

    class Data:
        def __init__(self, **parts):
            vars(self).update(parts)

    data = Data(datasets=[Data(pipeline=Pipeline([object(), CachedMosaic()])), Data(pipeline=Pipeline([]))])
    assert rng._transforms_with_memory(data) == ['CachedMosaic']
    assert rng._transforms_with_memory(Augmented()) == []
