"""ChannelsLastHook: values stay, in one process and where DistributedDataParallel has planned its buckets before."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.runner import Runner
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from helpers.processes import run_in_two
from mmdet_norms import engine
from mmdet_norms.errors import UserError
from mmdet_norms.layers import BNET, CBN

WAYS = [
    dict(),
    dict(find_unused_parameters=True),
    dict(static_graph=True),
    dict(gradient_as_bucket_view=True),
    dict(gradient_as_bucket_view=True, find_unused_parameters=True),
    dict(bucket_cap_mb=0.0001, find_unused_parameters=True),
]


class Net(BaseModel):
    """Fixed norms for tune mode, a CBN to link, and in turns a branch without gradients."""

    def __init__(self, frozen=False, branch=False):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 6, 3), BNET(6)
        self.conv3, self.bn3 = nn.Conv2d(6, 4, 3), CBN(4, burnin=0)
        self.other = nn.Conv2d(6, 4, 3) if branch else None
        self.frozen = frozen

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.bn1.eval()
        return self

    def forward(self, x, turn=0, mode='loss'):
        x = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        y = self.other(x) if self.other is not None and turn % 2 else self.bn3(self.conv3(x))
        return dict(loss=y.square().mean() + y.mean())


def cosine(a, b):
    return float(nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


def gradients_against_local_ones(rank, hooks, way, rounds):
    """The least cosine over all parameters and iterations; both processes see the same data, so the mean is local."""
    branch = way.get('find_unused_parameters', False)
    torch.manual_seed(0)
    net = Net(frozen='TuneModeHook' in hooks, branch=branch)
    plain = Net(frozen=net.frozen, branch=branch)
    plain.load_state_dict(net.state_dict())
    net.double(), plain.double()  # so that rounding is not in the way
    ddp = MMDistributedDataParallel(net, **way)  # as mmengine's runner does it, before any hook
    logger = SimpleNamespace(info=print, warning=print)
    runner = SimpleNamespace(
        model=ddp, logger=logger, train_dataloader=[0], optim_wrapper=SimpleNamespace(), _train_loop=None
    )
    for stage in ('before_run', 'before_train'):
        for name in hooks:
            getattr(getattr(engine, name)(), stage)(runner)
    least = 1.0
    for turn in range(rounds):
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(turn)).double()
        for model in (ddp, plain):
            model.zero_grad()
            model(x, turn)['loss'].backward()
        for a, b in zip(net.parameters(), plain.parameters()):
            assert (a.grad is None) == (b.grad is None) or b.grad is None
            if b.grad is not None and float(b.grad.norm()) > 1e-9:  # the bias before a norm has none
                least = min(least, cosine(a.grad, b.grad))
    return least, net.conv2.weight.is_contiguous(memory_format=torch.channels_last)


HOOKS = [['TuneModeHook'], ['NormHook'], ['NormHook', 'ChannelsLastHook', 'TuneModeHook']]
CASES = [(['ChannelsLastHook'], way) for way in WAYS] + [(hooks, WAYS[1]) for hooks in HOOKS]


@pytest.fixture(scope='module')
def compared(tmp_path_factory):
    return run_in_two(tmp_path_factory.mktemp('compared'), compare_all)


def compare_all(rank):
    return [gradients_against_local_ones(rank, hooks, way, 4) for hooks, way in CASES]


@pytest.mark.parametrize('case', range(len(CASES)), ids=lambda i: '+'.join([*CASES[i][0], *CASES[i][1]]))
def test_gradients_are_the_local_ones_from_the_first_iteration_on(case, compared):
    for answers in compared:
        least, converted = answers[case]
        assert least > 1 - 1e-9
        assert converted == ('ChannelsLastHook' in CASES[case][0])


def step_of_a_runner(rank, folder, load_from, resume):
    """The model after two steps of a Runner built from a config, with the stock wrapper and its own hooks."""
    torch.manual_seed(3)
    net = Net()
    data = [dict(x=torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(i))) for i in range(8)]
    runner = Runner(
        model=net,
        work_dir=str(folder / f'run_{rank}'),
        train_dataloader=dict(
            dataset=data,
            sampler=dict(type='DefaultSampler', shuffle=False),
            batch_size=2,
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=1 + (resume is not None)),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.05, momentum=0.9)),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        custom_hooks=[dict(type='ChannelsLastHook')],
        launcher='pytorch' if torch.distributed.is_initialized() else 'none',
        env_cfg=dict(dist_cfg=dict(backend='gloo')),
        load_from=resume or load_from,
        resume=resume is not None,
        randomness=dict(seed=1),
        experiment_name=f'step_{rank}_{resume is None}_{load_from is None}',
        cfg=dict(
            model_wrapper_cfg=dict(
                type='MMDistributedDataParallel',
                find_unused_parameters=True,
                broadcast_buffers=False,
                device_ids=None,
            )
        ),
    )
    runner.train()
    return {name: value.detach().clone().contiguous().numpy() for name, value in net.named_parameters()}


@pytest.mark.parametrize('way', ['start', 'load_from', 'resume'])
def test_a_runner_learns_the_same_with_and_without_the_hook(way, tmp_path):
    load_from = resume = None
    if way != 'start':
        torch.manual_seed(9)
        torch.save(dict(state_dict=Net().state_dict(), meta={}), tmp_path / 'weights.pth')
        load_from = str(tmp_path / 'weights.pth')
    if way == 'resume':
        run_in_two(tmp_path, step_of_a_runner, tmp_path / 'first', load_from, None)
        resume = str(tmp_path / 'first' / 'run_0' / 'epoch_1.pth')
    one, two = run_in_two(tmp_path, step_of_a_runner, tmp_path, load_from, resume)
    without = run_in_two(tmp_path, _without_the_hook, tmp_path / 'plain', load_from, resume)
    for name, value in one.items():
        assert (value == two[name]).all(), name
        assert abs(value - without[0][name]).max() < 1e-5, name


def _without_the_hook(rank, folder, load_from, resume):
    engine.ChannelsLastHook.before_run = lambda self, runner: None
    return step_of_a_runner(rank, folder, load_from, resume)


def test_one_process_is_converted_in_place():
    net = Net()
    before = [p for p in net.parameters()]
    engine.ChannelsLastHook().before_run(SimpleNamespace(model=net))
    assert net.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(a is b for a, b in zip(before, net.parameters()))


def test_a_sharded_weight_is_refused_with_its_name():
    net = Net()
    net.conv2.weight = nn.Parameter(net.conv2.weight.detach().flatten())
    with pytest.raises(UserError, match=r'conv2 .*leave the hook out'):
        engine.ChannelsLastHook().before_run(SimpleNamespace(model=net))


def refuse_communication_hook(rank):
    ddp = DistributedDataParallel(nn.Conv2d(3, 4, 3))
    ddp.register_comm_hook(None, lambda state, bucket: torch.futures.Future())
    try:
        engine.ChannelsLastHook().before_run(SimpleNamespace(model=ddp))
    except UserError as error:
        return str(error)


def test_a_communication_hook_is_refused(tmp_path):
    for said in run_in_two(tmp_path, refuse_communication_hook):
        assert 'register_comm_hook' in said
