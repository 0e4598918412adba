"""FreezeBNETHook: the run is that of a loop whose kernels have no gradients from that epoch on."""

from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

from helpers.processes import run_in_two
from mmdet_norms.errors import UserError
from mmdet_norms.layers import BNET

DATA = [dict(x=torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(i))) for i in range(8)]
SGD = dict(lr=0.1, momentum=0.9, weight_decay=0.01)


class Net(BaseModel):
    def __init__(self, norm=BNET):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 3), norm(4)
        self.out = nn.Conv2d(4, 1, 1)

    def forward(self, x, mode='loss'):
        return dict(loss=self.out(self.norm(self.conv(x)).relu()).square().mean() * 10)


def runner(folder, epochs=4, epoch=2, net=None, **more):
    return Runner(
        model=net or Net(),
        work_dir=str(folder),
        train_dataloader=dict(
            dataset=DATA,
            sampler=dict(type='DefaultSampler', shuffle=False),
            batch_size=2,
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=more.pop('train_cfg', dict(by_epoch=True, max_epochs=epochs)),
        optim_wrapper=dict(optimizer=dict(type='SGD', **SGD), **more.pop('optim_wrapper', {})),
        custom_hooks=[dict(type='NonFiniteHook'), dict(type='FreezeBNETHook', epoch=epoch)],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        launcher='pytorch' if torch.distributed.is_initialized() else 'none',
        env_cfg=dict(dist_cfg=dict(backend='gloo')),
        experiment_name=Path(folder).name,
        cfg=dict(model_wrapper_cfg=dict(type='MMDistributedDataParallel', broadcast_buffers=False, device_ids=None)),
        **more,
    )


def weights(net):
    return {name: value.detach().clone() for name, value in net.named_parameters()}


def published(epochs, epoch, clip=None):
    """A plain loop: kernels without ``requires_grad`` in the later epochs, gradients set to None."""
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), **SGD)
    for i in range(epochs):
        for value in net.norm.bnconv.parameters() if i >= epoch else ():
            value.requires_grad_(False)
        for k in range(0, len(DATA), 2):
            optimizer.zero_grad()
            net(torch.stack([data['x'] for data in DATA[k : k + 2]]))['loss'].backward()
            if clip:
                nn.utils.clip_grad_norm_([value for value in net.parameters() if value.requires_grad], clip)
            optimizer.step()
    return weights(net)


@pytest.mark.parametrize('clip', [None, 0.5])
def test_a_run_is_the_loop_that_turns_gradients_of_the_kernels_off(clip, tmp_path):
    more = dict(optim_wrapper=dict(clip_grad=dict(max_norm=clip))) if clip else {}
    run = runner(tmp_path, **more)
    run.train()
    expected = published(4, 2, clip)
    for name, value in weights(run.model).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6, msg=name)
    half = published(2, 2, clip)
    assert all(torch.equal(expected[name], half[name]) == ('bnconv' in name) for name in half)


def test_a_resumed_run_is_the_whole_one(tmp_path):
    whole = runner(tmp_path / 'whole')
    whole.train()
    for done in (1, 3):  # before the freezing and after
        again = runner(tmp_path / f'{done}', load_from=str(tmp_path / 'whole' / f'epoch_{done}.pth'), resume=True)
        again.train()
        for name, value in weights(again.model).items():
            assert torch.equal(value, weights(whole.model)[name]), name


def in_two(rank, folder):
    run, seen = runner(folder / str(rank)), []
    assert type(run.model).__name__ == 'MMDistributedDataParallel'
    keeper = Hook()
    keeper.after_train_epoch = lambda run: seen.append(weights(run.model.module))
    run.register_hook(keeper)
    run.train()
    return [{name: value.numpy() for name, value in entry.items()} for entry in seen]


def test_two_processes_go_on_together_and_their_kernels_stand(tmp_path):
    one, two = run_in_two(tmp_path, in_two, tmp_path)
    for a, b in zip(one, two):
        assert all((a[name] == b[name]).all() for name in a)
    assert len(one) == 4
    for before, after, moved in ((0, 1, True), (1, 2, False), (2, 3, False)):
        for name in one[0]:
            same = bool((one[before][name] == one[after][name]).all())
            assert same == ('bnconv' in name and not moved), (name, before)


def test_what_cannot_be_is_said(tmp_path, caplog):
    with pytest.raises(UserError, match=r'epoch=-1 must be a whole number'):
        runner(tmp_path / 'a', epoch=-1)
    by_iter = runner(tmp_path / 'b', train_cfg=dict(by_epoch=False, max_iters=4))
    with pytest.raises(UserError, match=r'epoch=2 of a training in iterations.*EpochBasedTrainLoop'):
        by_iter.train()
    for name, run in (
        ('is never reached', runner(tmp_path / 'c', epochs=1)),
        ('no BNET', runner(tmp_path / 'd', epochs=1, net=Net(nn.BatchNorm2d))),
    ):
        said = []
        run.logger.warning = said.append
        run.train()
        assert any(name in message for message in said)
