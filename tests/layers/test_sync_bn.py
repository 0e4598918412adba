"""SyncBN: batch norm where there is nothing to synchronize, and over all processes' batches where there is."""

import copy
import logging
import os
import sys

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import nn

from helpers import warm
from mmdet_norms.layers import sync_bn
from mmdet_norms.layers._running_statistics import run_batch_norm
from mmdet_norms.layers.sync_bn import SyncBN


def random_pair(**kwargs):
    torch.manual_seed(0)
    layer, plain = SyncBN(4, **kwargs), nn.BatchNorm2d(4, **kwargs)
    for value in plain.state_dict().values():
        if value.is_floating_point():
            value.data.uniform_(0.5, 2)
    layer.load_state_dict(plain.state_dict(), strict=True)
    return layer, plain


def assert_equal_states(layer, plain):
    assert layer.state_dict().keys() == plain.state_dict().keys()
    for key, value in plain.state_dict().items():
        assert torch.equal(layer.state_dict()[key], value), key


class TestAlone:
    def test_forward_equals_the_formula_written_out(self):
        layer = random_pair(eps=1e-3)[0].double()
        x = torch.randn(2, 4, 3, 5, dtype=torch.float64) * 3 + 1
        w, b = layer.weight.detach().numpy(), layer.bias.detach().numpy()
        expected = np.empty(x.shape)
        for c in range(4):
            v = x[:, c].numpy()
            expected[:, c] = w[c] * (v - v.mean()) / np.sqrt(v.var() + 1e-3) + b[c]
        np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize(
        'kwargs',
        [{}, dict(momentum=None), dict(affine=False), dict(track_running_stats=False), dict(eps=1e-3, momentum=0.5)],
    )
    def test_it_is_batch_norm_bit_for_bit(self, kwargs):
        layer, plain = random_pair(**kwargs)
        for training in (True, True, False):
            x = torch.randn(2, 4, 5, 5)
            assert torch.equal(layer.train(training)(x), plain.train(training)(x))
            assert_equal_states(layer, plain)

    def test_one_value_alone_is_refused_without_a_trace(self):
        layer, plain = random_pair()
        with pytest.raises(ValueError, match='Expected more than 1 value per channel when training'):
            layer(torch.randn(1, 4, 1, 1))
        assert_equal_states(layer, plain)

    def test_one_log_line_per_process_says_so(self, caplog, monkeypatch):
        monkeypatch.setattr(sync_bn, '_said', set())
        with caplog.at_level(logging.WARNING):
            SyncBN(4).eval()(torch.randn(2, 4, 5, 5))
            assert not caplog.records
            for layer in (SyncBN(4), SyncBN(4)):
                layer(torch.randn(2, 4, 5, 5)), layer(torch.randn(2, 4, 5, 5))
        assert [r.getMessage() for r in caplog.records] == [
            'SyncBN: training is not distributed, so it acts as BN on the batch of this process'
        ]

    def test_a_process_group_of_one_on_a_cpu_is_no_error(self, tmp_path):
        layer, plain = random_pair()
        dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
        try:
            x = torch.randn(2, 4, 5, 5)
            assert torch.equal(layer(x), plain(x))
            with pytest.raises(ValueError, match='to be on GPU'):
                nn.SyncBatchNorm(4)(x)
        finally:
            dist.destroy_process_group()

    def test_tools_know_it_as_a_batch_norm_that_torch_does_not_refuse_on_a_cpu(self):
        from mmcv.cnn import build_norm_layer, is_norm  # here, since the two processes below import this file

        name, layer = build_norm_layer(dict(type=SyncBN, requires_grad=True), 4, postfix=1)
        assert name == 'bn1' and is_norm(layer) and isinstance(layer, nn.modules.batchnorm._BatchNorm)
        assert not isinstance(layer, nn.SyncBatchNorm)

    def test_torch_gets_an_empty_half_batch_in_fp32_and_no_statistics_to_update_twice(self, monkeypatch):
        """On GPUs torch's own layer works; these are the two things it must be helped with."""
        seen = []

        def record(self, x):
            seen.append((x.dtype, self.running_mean is running_mean))
            return x * self.weight.view(1, -1, 1, 1)

        monkeypatch.setattr(sync_bn, '_served_by_torch', lambda: ('cpu',))
        monkeypatch.setattr(SyncBN, '_world_size', lambda self: 2)
        monkeypatch.setattr(nn.SyncBatchNorm, 'forward', record)
        layer = SyncBN(4)
        running_mean = layer.running_mean
        assert layer(torch.zeros(0, 4, 2, 2).half()).dtype == torch.half
        layer(torch.randn(2, 4, 2, 2).bfloat16())
        x = torch.randn(2, 4, 2, 2, requires_grad=True)
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
        assert seen == [(torch.float32, True), (torch.bfloat16, True), (torch.float32, True), (torch.float32, False)]
        assert layer.running_mean is running_mean


# What each of two processes gets: unequal batches, an empty one, all empty, one value in total.
CASES = {
    'unequal': (3, 1, (5, 4)),
    'one empty': (2, 0, (5, 4)),
    'other empty': (0, 2, (5, 4)),
    'all empty': (0, 0, (5, 4)),
    'one pixel each': (1, 1, (1, 1)),
    'one value in all': (1, 0, (1, 1)),
}


def second_gradients(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients of a gradient penalty, whose sum over processes is differentiated; the layer stays as it is."""
    fresh, x = copy.deepcopy(layer), x.detach().clone().requires_grad_()
    inputs = (x, *fresh.parameters())
    gradient = torch.autograd.grad((fresh(x).pow(2) * grad).sum(), inputs[:1], create_graph=True)
    return torch.autograd.grad((gradient[0].sin() * grad).sum(), inputs)


def worker() -> None:
    """Both processes build the same whole batch, take their part, and compare with batch norm on the whole."""
    dist.init_process_group('gloo')
    rank, errors = dist.get_rank(), {}
    for name, (first, second, size) in CASES.items():
        for kwargs in ({}, dict(momentum=None), dict(affine=False)):
            layer, plain = random_pair(**kwargs)
            layer, plain = layer.double(), plain.double()
            synced_twice = copy.deepcopy(layer)
            for step in range(2):
                torch.manual_seed(step)
                whole = torch.randn(first + second, 4, *size, dtype=torch.float64) * 3 + 100
                grad = torch.randn_like(whole)
                mine = slice(0, first) if rank == 0 else slice(first, None)
                x = whole[mine].clone().requires_grad_()
                y = layer(x)
                y.backward(grad[mine])
                again = x.detach().clone().requires_grad_()
                torch.utils.checkpoint.checkpoint(synced_twice, again, use_reentrant=False).backward(grad[mine])
                same = {'checkpointed grad': (again.grad, x.grad)}
                same |= {f'checkpointed {k}': (synced_twice.state_dict()[k], v) for k, v in layer.state_dict().items()}
                if whole.shape[0] * size[0] > 1:
                    whole.requires_grad_()
                    expected = plain(whole)
                    expected.backward(grad)
                    same |= {'y': (y, expected[mine]), 'grad': (x.grad, whole.grad[mine])}
                    same |= {k: (layer.state_dict()[k], v) for k, v in plain.state_dict().items()}
                    penalty, *totals = second_gradients(layer, x, grad[mine])
                    of_whole, *of_parameters = second_gradients(plain, whole, grad)
                    same['second'] = penalty, of_whole[mine]
                    for i, (total, expected) in enumerate(zip(totals, of_parameters)):
                        dist.all_reduce(total)
                        same[f'second {i}'] = total, expected
                    for key, p in layer.named_parameters():
                        total = p.grad.clone()
                        dist.all_reduce(total)
                        same[f'grad of {key}'] = (total, dict(plain.named_parameters())[key].grad)
                else:
                    before = random_pair(**kwargs)[1].double()
                    keys = ['running_var'] if first + second else list(before.state_dict())
                    same |= {k: (layer.state_dict()[k], before.state_dict()[k]) for k in keys}
                    assert y.isfinite().all() and x.grad.isfinite().all()
                for key, (ours, theirs) in same.items():
                    torch.testing.assert_close(
                        ours, theirs, rtol=1e-10, atol=1e-10, msg=lambda t, w=(name, kwargs, step, key): f'{w}: {t}'
                    )
                    if ours.numel():
                        errors[key] = max(errors.get(key, 0), (ours - theirs).abs().max().item())
    for dtype in (torch.float16, torch.bfloat16):
        layer, plain = random_pair()
        torch.manual_seed(0)
        whole = (torch.randn(3, 4, 6, 6) * 2 + 1).to(dtype)
        x = whole[rank * 2 :][:2].to(memory_format=torch.channels_last).requires_grad_()
        y = layer(x)
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y.float(), plain(whole.float())[rank * 2 :][:2], rtol=0.02, atol=0.02)
        y.float().square().sum().backward()
        assert x.grad.dtype == dtype and layer.weight.grad.dtype == torch.float32
        torch.testing.assert_close(layer.running_var, plain.running_var)
    print('largest errors', {key: f'{value:.1e}' for key, value in errors.items() if value > 1e-13}, flush=True)
    dist.barrier()
    os._exit(0)  # freeing a gloo group at exit sometimes aborts


@pytest.mark.slow
def test_two_processes_on_cpus_equal_batch_norm_on_the_whole_batch():
    warm.run_together([sys.executable, __file__])


@pytest.mark.parametrize('processes', [1, 2])
def test_a_synchronized_child_is_called_with_one_value_too_as_others_wait_for_it(processes, monkeypatch):
    called = []

    class SyncBatchNorm(nn.BatchNorm2d):  # known by its name; torch's own refuses CPUs
        def forward(self, x):
            called.append(self)
            return x

    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'get_world_size', lambda *_: processes)
    run_batch_norm(SyncBatchNorm(4), torch.ones(1, 4, 1, 1))
    assert len(called) == processes - 1


if __name__ == '__main__':
    worker()
