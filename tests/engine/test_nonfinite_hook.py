"""Steps with NaN or inf: not taken, explained, stopped or skipped, computed again."""

import random

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import nn

from helpers.processes import run_in_two
from mmdet_norms.engine import NonFiniteError, NonFiniteHook, start_cpu_processes
from mmdet_norms.engine.nonfinite import any_nonfinite, find, replay
from mmdet_norms.errors import UserError
from mmdet_norms.layers import BNET, CBN, MABN, CenConv2d


class Fragile(BaseModel):
    """Ways to go wrong, by what the data say."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), CBN(4, burnin=1)
        self.conv3, self.bn3 = CenConv2d(4, 4, 1), MABN(4)
        self.bn4 = BNET(4)
        self.head = nn.Conv2d(4, 1, 1)
        self.register_buffer('mask', torch.tensor([-torch.inf, 0.0]))  # infinite by design

    def forward(self, x, bad, data_samples=None, mode='loss'):
        kinds = set(bad)
        if 'input' in kinds:
            x = x / torch.zeros(())
        x = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if 'error' in kinds:
            self.conv3(x * torch.nan)
            raise ValueError('matrix contains invalid numeric entries')
        if 'bug' in kinds:
            raise ValueError('a bug')
        x = self.head(self.bn4(self.bn3(self.conv3(x))))
        loss = dict(loss_a=nn.functional.dropout(x).square().mean(), loss_b=x.mean() * 0.1)
        if 'loss' in kinds:
            loss['loss_b'] = loss['loss_b'].detach() * torch.inf
        if 'gradient' in kinds:
            loss['loss_b'] = (x * 0).square().sum().sqrt()  # 0, and its gradient 0 / 0
        if 'large' in kinds:
            loss['loss_b'] = x.mean() * 1e30
        if 'statistics' in kinds:
            self.bn1.running_mean.data = self.bn1.running_mean * torch.nan  # not in place, for autograd
            self.bn1.running_var.data = self.bn1.running_var * torch.inf
        return loss


class Data(torch.utils.data.Dataset):
    metainfo = dict(classes=('a',))

    def __init__(self, bad, size=16):
        self.bad, self.size = bad, size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        x = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i))
        kind = self.bad.get(i, '')
        if kind == 'image':
            x[0, 0, 0] = torch.nan
        sample = BaseDataElement(metainfo=dict(img_path=f'images/{i}.png'))
        return dict(x=x, bad=kind, data_samples=sample)


def collate(batch):
    whole = {key: [item[key] for item in batch] for key in batch[0]}
    return dict(whole, x=torch.stack(whole['x']))


def build(folder, bad=None, lr=0.01, epochs=1, how='stop', max_skips=10, size=16, model=None, rank=0, **more):
    distributed = torch.distributed.is_initialized()
    cfg = Config(dict(launcher='pytorch' if distributed else 'none'))
    start_cpu_processes(cfg)
    torch.manual_seed(1)
    wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=lr, momentum=0.9))
    wrapper.update(more.pop('optim', {}))
    hooks = [dict(type='NonFiniteHook', on_nonfinite=how, max_skips=max_skips), *more.pop('hooks', [])]
    loader = dict(
        dataset=Data(bad or {}, size), batch_size=2, sampler=dict(type='DefaultSampler', shuffle=False), num_workers=0
    )
    options = dict(
        model=Fragile() if model is None else model,
        work_dir=str(folder),
        train_dataloader=dict(loader, collate_fn=dict(type=collate)),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=wrapper,
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1, by_epoch=False)),
        custom_hooks=hooks,
        launcher=cfg.launcher,
        env_cfg=dict(dist_cfg=dict(backend='gloo')),
        randomness=dict(seed=1),
        experiment_name=f'nonfinite_{random.SystemRandom().random()}',
        log_level='WARNING',
        cfg=cfg,
    )
    return Runner(**{**options, **more})


class Spoiling(Hook):
    def after_train_epoch(self, runner):
        runner.model.bn1.running_var.fill_(torch.nan)


def hook_of(runner):
    return next(hook for hook in runner.hooks if isinstance(hook, NonFiniteHook))


def state(runner):
    model = getattr(runner.model, 'module', runner.model)
    return {key: value.clone() for key, value in model.state_dict().items()}


def finite(tensors):
    return all(v.isfinite().all() for k, v in tensors.items() if not k.endswith('mask'))


KINDS = {
    'image': 'the input has NaN or inf: images/6.png',
    'input': 'loss_a, loss_b is not finite, first in the input of conv1 (Conv2d)',
    'loss': 'loss loss_b is not finite',
    'gradient': 'first in the gradient of the output of head (Conv2d)',
    'error': 'first in the input of conv3 (CenConv2d), images images/6.png, images/7.png, upon which ValueError: m',
    'statistics': 'bn1.running_mean, bn1.running_var is not finite, images',
}


@pytest.mark.parametrize('kind', KINDS)
def test_a_bad_step_stops_the_run_before_it_is_taken(kind, tmp_path):
    runner = build(tmp_path, {6: kind})
    with pytest.raises(NonFiniteError) as stopped:
        runner.train()
    said = str(stopped.value)
    assert KINDS[kind] in said and 'iteration 4' in said and 'images/6.png, images/7.png' in said
    assert (kind == 'error') or '(epoch 1)' in said
    assert [path.name for path in tmp_path.glob('*.pth')] == ['iter_3.pth'] and 'iter_3.pth, is finite' in said
    saved = torch.load(tmp_path / 'iter_3.pth')['state_dict']
    assert finite(saved)
    now = state(runner)
    for key in saved:
        if 'history' not in key:
            assert torch.equal(saved[key], now[key]), key


def test_weights_that_a_hook_spoils_are_not_validated(tmp_path):
    evaluator = Evaluator([])
    evaluator.process, evaluator.evaluate = lambda *args, **kwargs: None, lambda size: dict(score=1.0)
    loader = dict(dataset=Data({}, 2), batch_size=2, collate_fn=dict(type=collate), num_workers=0)
    val = dict(val_dataloader=dict(loader, sampler=dict(type='DefaultSampler')), val_evaluator=evaluator, val_cfg={})
    runner = build(tmp_path, size=2, **val)
    runner.register_hook(Spoiling(), 'LOWEST')
    with pytest.raises(NonFiniteError, match=r'before a validation, .* not finite \(bn1.running_var\)'):
        runner.train()
    assert finite(torch.load(tmp_path / 'iter_1.pth')['state_dict'])


@pytest.mark.parametrize(
    'kind, clip, said',
    [
        ('large', dict(max_norm=1.0), 'the norm of the gradients is not finite, although each of them is'),
        ('infinite', dict(type='value', clip_value=1.0), 'the gradient of head.bias is not finite'),
        ('gradient', dict(type='value', clip_value=1.0), 'first in the gradient of the output of head'),
        ('gradient', dict(max_norm=1.0, norm_type=1), 'first in the gradient of the output of head'),
    ],
)
def test_what_clipping_would_hide_is_seen(kind, clip, said, tmp_path):
    runner = build(tmp_path, {6: kind}, optim=dict(clip_grad=clip))
    if kind == 'infinite':
        runner.model.head.bias.register_hook(
            lambda g: g * torch.inf if runner.iter == 3 and g.abs().sum() > 0 else g  # of what the data say
        )
    with pytest.raises(NonFiniteError, match='iteration 4') as stopped:
        runner.train()
    assert said in str(stopped.value)
    assert [path.name for path in tmp_path.glob('*.pth')] == ['iter_3.pth']


@pytest.mark.parametrize('kind', [kind for kind in KINDS if kind not in ('statistics', 'error')])
def test_the_step_can_be_computed_again(kind, tmp_path):
    runner = build(tmp_path, {6: kind})
    with pytest.raises(NonFiniteError, match=r'replay\.py .*iter_4\.pth') as stopped:
        runner.train()
    with torch.serialization.safe_globals([BaseDataElement]):
        content = torch.load(tmp_path / 'nonfinite' / 'iter_4.pth', weights_only=True)
    model = Fragile()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    ((entry, finding),) = replay(model, content, OptimWrapper(torch.optim.SGD(model.parameters(), lr=1.0)))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert entry['iter'] == 3 and str(finding) in str(stopped.value)
    if kind in ('loss', 'gradient'):
        loss = runner.message_hub.get_scalar('train/loss_a')._log_history
        assert len(loss) == 3 and finding.values['loss_a'].isfinite()  # dropout as it was


def test_a_skipped_step_leaves_no_trace(tmp_path):
    """The run goes on as if the batch had not been there: as a run over the other images."""
    bad = {6: 'input', 7: 'image', 12: 'gradient'}
    runner = build(tmp_path / 'skip', bad, how='skip')
    runner.train()
    assert hook_of(runner).skipped == 2
    log = ''.join(path.read_text() for path in (tmp_path / 'skip').glob('*/*.log'))
    assert 'Skipped step 1: iteration 4' in log and 'Skipped step 2: iteration 7' in log
    other = build(tmp_path / 'other', size=16)
    other.train_dataloader.sampler.__class__ = type('Some', (type(other.train_dataloader.sampler),), {
        '__iter__': lambda self: iter([i for i in range(16) if i not in (6, 7, 12, 13)])})  # fmt: skip
    other.train()
    ours, theirs = state(runner), state(other)
    assert finite(ours)
    for key in theirs:
        if 'dropout' not in key and key.split('.')[-1] in ('num_batches_tracked', 'iter_count', 'iters'):
            assert torch.equal(ours[key], theirs[key]), key


def test_buffers_are_those_before_the_skipped_step(tmp_path):
    runner = build(tmp_path, {2: 'input', 3: 'input'}, how='skip', size=4)
    runner.train()
    first = torch.load(tmp_path / 'iter_2.pth')['state_dict']
    other = build(tmp_path / 'other', size=2)
    other.train()
    for key, value in torch.load(tmp_path / 'other' / 'iter_1.pth')['state_dict'].items():
        assert torch.equal(first[key], value), key


def test_skipping_has_a_limit(tmp_path):
    runner = build(tmp_path, {i: 'loss' for i in range(4, 16)}, how='skip', max_skips=3)
    with pytest.raises(NonFiniteError, match=r'4 steps in a row.*iteration 6'):
        runner.train()
    assert len(list((tmp_path / 'nonfinite').glob('*.pth'))) == 3


@pytest.mark.parametrize('lr', [1e9, 1e38])
def test_divergence_leaves_the_last_finite_checkpoint(lr, tmp_path):
    runner = build(tmp_path, lr=lr, epochs=3, hooks=[dict(type='EMAHook')])
    with pytest.raises(NonFiniteError, match='learning rate'):
        runner.train()
    for path in tmp_path.glob('*.pth'):
        saved = torch.load(path)
        assert finite(saved['state_dict']) and finite(saved['ema_state_dict'])


def test_weights_that_a_step_makes_infinite_are_not_saved(tmp_path):
    runner = build(tmp_path, lr=1e30)
    runner.model.head.weight.data.mul_(1e18)
    with pytest.raises(NonFiniteError, match=r'the weights are not finite|first in'):
        runner.train()
    assert not list(tmp_path.glob('*.pth'))


def test_weights_to_start_from_are_looked_at(tmp_path):
    model = Fragile()
    weights = model.state_dict()
    weights['bn1.running_var'][1] = torch.nan
    torch.save(dict(state_dict=weights, meta={}), tmp_path / 'bad.pth')
    runner = build(tmp_path / 'run', load_from=str(tmp_path / 'bad.pth'))
    with pytest.raises(NonFiniteError, match=r'bad\.pth are not finite: bn1\.running_var; start from another'):
        runner.train()


def test_errors_of_other_kinds_keep_their_traceback(tmp_path):
    with pytest.raises(ValueError, match='a bug'):
        build(tmp_path, {6: 'bug'}).train()


@pytest.mark.parametrize('interval, met', [(100, 4), (1, 3)], ids=['no checkpoint within', 'a checkpoint within'])
@pytest.mark.parametrize('how', ['stop', 'skip'])
def test_accumulated_batches_are_one_step(how, interval, met, tmp_path):
    hooks = dict(checkpoint=dict(type='CheckpointHook', interval=interval, by_epoch=False))
    runner = build(tmp_path, {4: 'input'}, how=how, optim=dict(accumulative_counts=4), default_hooks=hooks)
    if how == 'skip':
        runner.train()
        assert hook_of(runner).skipped == 1 and finite(state(runner))
        assert int(state(runner)['bn1.num_batches_tracked']) == 8 - met
    else:
        with pytest.raises(NonFiniteError, match=rf'iteration {met} .*images/4.png, images/5.png\. The'):
            runner.train()
        assert int(state(runner)['bn1.num_batches_tracked']) == 0
    for path in tmp_path.glob('*.pth'):
        assert finite(torch.load(path)['state_dict'])


def test_iteration_loops(tmp_path):
    loop = dict(type='IterBasedTrainLoop', max_iters=12, val_interval=100)
    runner = build(tmp_path, {6: 'gradient'}, train_cfg=loop, how='skip')
    runner.train()
    assert hook_of(runner).skipped == 2  # in both passes


@OPTIM_WRAPPERS.register_module()
class ScalingWrapper(AmpOptimWrapper):
    """mmengine's wrapper with a scaler of the CPU; its own wants a GPU."""

    def __init__(self, init_scale=2.0**16, overflows=0, **kwargs):
        OptimWrapper.__init__(self, **kwargs)
        self._scale_update_param, self.cast_dtype = None, torch.bfloat16
        self.loss_scaler = torch.amp.GradScaler('cpu', init_scale=init_scale)
        self.overflows = overflows

    def optim_context(self, model):
        return OptimWrapper.optim_context(self, model)

    def backward(self, loss, **kwargs):
        super().backward(loss, **kwargs)
        if self.overflows:
            self.overflows -= 1
            self.optimizer.param_groups[0]['params'][0].grad.fill_(torch.inf)


needs_cpu_scaler = pytest.mark.skipif(not hasattr(torch.amp, 'GradScaler'), reason='torch < 2.3')


@needs_cpu_scaler
def test_a_loss_scaler_may_look_for_its_scale(tmp_path):
    runner = build(tmp_path, epochs=2, optim=dict(type='ScalingWrapper', overflows=9))
    runner.train()
    assert hook_of(runner).skipped == 0
    assert runner.optim_wrapper.loss_scaler.get_scale() == 2.0**7


@needs_cpu_scaler
def test_a_loss_scaler_that_never_finds_one_is_said(tmp_path):
    runner = build(tmp_path, epochs=9, optim=dict(type='ScalingWrapper', overflows=99))
    with pytest.raises(NonFiniteError, match='overflow in 40 steps in a row'):
        runner.train()


@needs_cpu_scaler
@pytest.mark.parametrize('kind', ['input', 'loss'])
def test_a_loss_that_is_not_finite_is_no_overflow(kind, tmp_path):
    runner = build(tmp_path, {6: kind}, optim=dict(type='ScalingWrapper'))
    with pytest.raises(NonFiniteError, match='iteration 4'):
        runner.train()
    runner = build(tmp_path / 'skip', {6: kind}, how='skip', optim=dict(type='ScalingWrapper'))
    runner.train()
    assert hook_of(runner).skipped == 1 and finite(state(runner))


def train_in_two(rank, folder):
    answers = []
    for kind in ('input', 'loss', 'gradient'):
        runner = build(folder / kind, {5: kind}, rank=rank)  # of process 1, in its third image
        try:
            runner.train()
            answers.append('trained')
        except NonFiniteError as error:
            answers.append(str(error))
        runner = build(folder / f'{kind}_skip', {5: kind}, how='skip', rank=rank)
        runner.train()
        weights = {key: value for key, value in state(runner).items() if 'running' not in key and 'history' not in key}
        answers.append((hook_of(runner).skipped, finite(weights), float(weights['conv1.weight'].double().sum())))
    return answers


def test_processes_decide_together(tmp_path):
    one, two = run_in_two(tmp_path, train_in_two, tmp_path)
    assert one[0::2] == two[0::2]
    for said in one[0::2]:
        assert 'process 1: ' in said and 'images/5.png' in said and 'iteration 2' in said
        assert 'process 0: ' not in said and 'iter_2_process_1.pth' in said
    assert one[1::2] == two[1::2] and all(skipped == 1 and good for skipped, good, _ in one[1::2])


@pytest.mark.parametrize('options', [dict(on_nonfinite='ignore'), dict(max_skips=0), dict(max_skips=True)])
def test_a_wrong_option_is_named(options):
    with pytest.raises(UserError, match=next(iter(options))):
        NonFiniteHook(**options)


@pytest.mark.parametrize(
    'value, expected', [(1.0, False), (np.nan, True), (np.inf, True), (-np.inf, True), (3e38, False)]
)
def test_the_flag_of_many_tensors(value, expected):
    tensors = [torch.ones(3, 2), torch.zeros(0), torch.tensor([1, 2]), torch.tensor([0.0, value]), torch.ones(2).half()]
    assert bool(any_nonfinite(tensors)) is expected
    assert bool(any_nonfinite([torch.eye(2).mul(value).to_sparse()])) is (expected or bool(np.isnan(value * 0)))
    assert not bool(any_nonfinite([]))
    if not expected:
        return
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        for place in (0, 70, -1):
            many = torch.ones(100, 3, dtype=dtype)
            many.view(-1)[place] = value
            assert bool(any_nonfinite([torch.ones(3, dtype=dtype), many.t()]))
    assert torch._foreach_norm([torch.tensor([1.0, value])], float('inf'))[0].isfinite().logical_not()  # on GPUs


def test_a_finite_step_has_no_finding():
    model = Fragile()
    entry = dict(batch=collate([Data({})[0], Data({})[1]]), rng=None)
    from mmdet_norms.engine.rng import random_state

    entry['rng'] = random_state()
    finding = find(model, entry, OptimWrapper(torch.optim.SGD(model.parameters(), lr=1.0)))
    assert not finding and str(finding) == 'everything is finite'
    assert all(p.grad is None for p in model.parameters())
