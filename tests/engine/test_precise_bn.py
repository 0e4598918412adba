"""Precise statistics: in evaluations and checkpoints, and nowhere else."""

import random
import threading
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from mmcv.cnn import ConvModule
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

from helpers.processes import run_in_two
from mmdet_norms.engine import start_cpu_processes
from mmdet_norms.engine.precise_bn import KEY, PreciseBNHook, take_training_statistics
from mmdet_norms.errors import UserError

NORMS = (
    dict(type='BN'),
    dict(type='CBN', burnin=2),
    dict(type='MABN', buffer_size=2, warmup_iters=0),
    dict(type='BRN', warmup_iters=0, r_iters=0, d_iters=0),
    dict(type='BNET'),
    dict(type='AN', k=2),
    dict(type='SN'),
    dict(type='BN', norm_batch=2),
    dict(type='GN', num_groups=2),
)
ITERS = 6


class Images(torch.utils.data.Dataset):
    metainfo = dict(classes=('a',))
    noise = 1.0

    def __len__(self):
        return 12

    def __getitem__(self, i):
        x = torch.linspace(-1, 1, 75).view(3, 5, 5).roll(i) * (1 + i / 5)
        drawn = random.random() + np.random.rand() + torch.rand(3, 1, 1)
        return dict(x=x + self.noise * drawn, i=i)


class Model(BaseModel):
    """A convolution and one norm of every kind; a loss with a state of its own that is no buffer."""

    def __init__(self, norms=NORMS):
        super().__init__()
        self.layers = nn.ModuleList()
        for norm in norms:
            conv = dict(type='CenConv') if norm['type'] == 'MABN' else None
            self.layers.append(ConvModule(4 if self.layers else 3, 4, 1, norm_cfg=norm, conv_cfg=conv, act_cfg=None))
        self.losses, self.seen = [], []

    def forward(self, x, i, mode='loss'):
        if mode != 'loss':
            self.seen.append({k: v.clone() for k, v in self.state_dict().items() if 'running' in k})
            return [0.0] * len(x)
        assert MessageHub.get_current_instance().get_info('iter') is not None  # as BatchSyncRandomResize asks
        for layer in self.layers:
            x = layer(x)
        loss = nn.functional.dropout(x).square().mean() + x.mean()
        self.losses.append(loss)
        return dict(loss=loss)


class Diary(Hook):
    def __init__(self):
        self.lines, self.lock = [], threading.Lock()  # which cannot be copied

    def before_train(self, runner):
        getattr(runner.model, 'module', runner.model).layers[0].register_forward_hook(partial(self.look, 'first'))

    def look(self, name, module, inputs, output):
        pass

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.lines.append((data_batch['i'].tolist(), float(outputs['loss'])))


def runner_of(
    folder, images=5, hook=True, ema=False, resume=None, load=None, workers=0, norms=NORMS, start=False, at_test=False
):
    torch.manual_seed(5)
    model = Model(norms)
    torch.manual_seed(random.SystemRandom().randrange(2**31))
    evaluator = Evaluator([])
    evaluator.process, evaluator.evaluate = lambda *args, **kwargs: None, lambda size: dict(score=1.0)
    distributed = torch.distributed.is_initialized()
    cfg = Config(dict(launcher='pytorch' if distributed else 'none'))
    start_cpu_processes(cfg)
    loader = dict(dataset=Images(), batch_size=2, num_workers=workers, collate_fn=dict(type='default_collate'))
    val = dict(loader, batch_size=12, sampler=dict(type='DefaultSampler', shuffle=False), num_workers=0)
    hooks = [dict(type='RandomStateHook'), dict(type='SyncBuffersHook'), dict(type='ChannelsLastHook')]
    hooks += [dict(type='PreciseBNHook', num_images=images, at_test=at_test)] * hook + [dict(type='StartHook')] * start
    hooks += [dict(type='EMAHook', momentum=0.3)] * ema
    runner = Runner(
        model=model,
        work_dir=str(folder),
        train_dataloader=dict(loader, sampler=dict(type='DefaultSampler')),
        val_dataloader=val,
        val_evaluator=evaluator,
        val_cfg=dict(),
        test_dataloader=val,
        test_evaluator=evaluator,
        test_cfg=dict(),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=ITERS, val_interval=3),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.02)),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', interval=3, by_epoch=False, save_best='score', rule='greater')
        ),
        custom_hooks=hooks,
        launcher=cfg.launcher,
        env_cfg=dict(dist_cfg=dict(backend='gloo')),
        load_from=resume or load,
        resume=resume is not None,
        randomness=dict(seed=3),
        experiment_name=f'precise_{random.SystemRandom().random()}',
        log_level='WARNING',
        cfg=cfg,
    )
    runner.register_hook(Diary())
    return runner


def trained(folder, **options):
    runner = runner_of(folder, **options)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        runner.train()
    model = getattr(runner.model, 'module', runner.model)
    return next(hook for hook in runner.hooks if isinstance(hook, Diary)).lines, model


def saved(folder, name=f'iter_{ITERS}.pth'):
    return torch.load(folder / name, weights_only=False)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def statistics(state):
    return {key: value for key, value in state.items() if 'running' in key}


@pytest.mark.parametrize('ema', [False, True])
def test_training_and_a_resumed_one_are_those_without_it(tmp_path, ema):
    without, model = trained(tmp_path / 'without', hook=False, ema=ema)
    lines, precise = trained(tmp_path / 'with', ema=ema)
    assert lines == without and len(precise.losses) == ITERS
    assert_same(precise.state_dict(), model.state_dict())
    middle = tmp_path / 'with' / 'iter_3.pth'
    resumed, goes_on = trained(tmp_path / 'resumed', resume=str(middle), ema=ema)
    assert resumed[-3:] == without[3:]
    assert_same(goes_on.state_dict(), model.state_dict())
    assert_same(saved(tmp_path / 'resumed')['state_dict'], saved(tmp_path / 'with')['state_dict'])
    plain, checkpoint = saved(tmp_path / 'without'), saved(tmp_path / 'with')
    assert statistics(checkpoint['state_dict']).keys() == checkpoint[KEY]['training'].keys()
    take_training_statistics(checkpoint)
    assert_same(checkpoint['state_dict'], plain['state_dict'])
    again, goes_on = trained(tmp_path / 'not any more', resume=str(middle), ema=ema, hook=False, start=True)
    assert again[-3:] == without[3:]
    assert_same(goes_on.state_dict(), model.state_dict())


@pytest.mark.parametrize('ema', [False, True])
def test_validation_checkpoints_and_test_have_the_same_statistics_which_are_averages(tmp_path, monkeypatch, ema):
    monkeypatch.setattr(Images, 'noise', 0.0)
    _, model = trained(tmp_path, images=12, ema=ema)
    checkpoint = saved(tmp_path)
    judged = statistics(checkpoint['state_dict'])
    assert len(judged) == 17 and checkpoint[KEY]['images'] == 12
    assert_same(judged, model.seen[-1])
    best = next(tmp_path.glob('best_score*.pth'))
    assert_same(statistics(saved(tmp_path, best.name)['state_dict']), model.seen[0])
    conv = checkpoint['state_dict']['layers.0.conv.weight'].view(4, 3)
    images = torch.stack([Images()[i]['x'] for i in range(12)])
    torch.testing.assert_close(judged['layers.0.bn.running_mean'], torch.einsum('oc,nchw->o', conv, images) / 300)
    for name, options in dict(option=dict(images=12, at_test=True), off=dict(), none=dict(hook=False)).items():
        test = runner_of(tmp_path / name, load=str(tmp_path / f'iter_{ITERS}.pth'), ema=ema, **options)
        test.test()
        assert_same(test.model.seen[0], judged)
    raw = {**checkpoint, 'state_dict': {**checkpoint['state_dict'], **checkpoint[KEY]['training']}}
    torch.save(raw, tmp_path / 'raw.pth')
    test = runner_of(tmp_path / 'anew', load=str(tmp_path / 'raw.pth'), ema=ema, images=12, at_test=True)
    test.test()
    assert_same(test.model.seen[0], judged)
    assert_same(statistics(test.model.state_dict()), checkpoint[KEY]['training'])  # put back
    if not ema:
        before = checkpoint[KEY]['training']
        assert sum(torch.equal(before[key], judged[key]) for key in judged) == 0


def test_workers_do_not_matter_and_images_are_whole_batches(tmp_path):
    trained(tmp_path / 'none', images=5)
    trained(tmp_path / 'two', images=6, workers=2)
    a, b = saved(tmp_path / 'none'), saved(tmp_path / 'two')
    assert_same(a['state_dict'], b['state_dict'])
    assert (a[KEY]['images'], a[KEY]['batch_size']) == (6, 2)
    trained(tmp_path / 'more', images=10**6)
    assert saved(tmp_path / 'more')[KEY]['images'] == 12


def test_a_last_batch_of_fewer_images_counts_as_many(tmp_path):
    runner = runner_of(tmp_path, images=12, norms=(dict(type='BN'),))
    runner._train_dataloader = dict(runner._train_dataloader, batch_size=5)
    runner.train()
    hook = next(hook for hook in runner.hooks if isinstance(hook, PreciseBNHook))
    assert hook.precise == dict(images=12, batch_size=5)
    assert len(hook.batch_seconds) == 3 and min(*hook.batch_seconds, hook.other_seconds) > 0


def test_a_test_says_where_its_batches_are_not_those_of_training(tmp_path, monkeypatch):
    norms = (dict(type='BN'),)
    trained(tmp_path / 'run', norms=norms)
    checkpoint = saved(tmp_path / 'run')
    checkpoint.pop('random_states')
    torch.save(checkpoint, tmp_path / 'silent.pth')
    for path, size, warned in (('run/iter_6.pth', 3, 1), ('run/iter_6.pth', 2, 0), ('silent.pth', 3, 0)):
        runner = runner_of(tmp_path / 'test', load=str(tmp_path / path), norms=norms, at_test=True)
        runner._train_dataloader = dict(runner._train_dataloader, batch_size=size)
        said = []
        monkeypatch.setattr(runner.logger, 'warning', said.append)
        runner.test()
        assert len(said) == warned, (path, size)
        assert all('of batches of 3' in line and 'train_dataloader.batch_size=2' in line for line in said)


def test_without_running_statistics_nothing_happens(tmp_path):
    trained(tmp_path, norms=(dict(type='GN', num_groups=2),))
    assert KEY not in saved(tmp_path)


def test_wrong_numbers_and_no_training_data(tmp_path):
    for wrong in (0, -3, 2.5, '9'):
        with pytest.raises(UserError, match='num_images'):
            PreciseBNHook(wrong)
    runner = runner_of(tmp_path)
    runner._train_dataloader = None
    with pytest.raises(UserError, match='no train_dataloader'):
        runner.val()


def _in_each(rank, folder):
    lines, model = trained(folder, images=8)
    seen = {key: value.tolist() for key, value in model.seen[-1].items()}
    return lines == trained(folder / 'without', hook=False)[0], seen


def test_two_processes_have_one_answer(tmp_path):
    first, second = run_in_two(tmp_path, _in_each, tmp_path)
    assert first == second and first[0]
    checkpoint = saved(tmp_path)
    assert checkpoint[KEY]['images'] == 8
    assert {key: value.tolist() for key, value in statistics(checkpoint['state_dict']).items()} == first[1]
