"""A batch with an inf or nan, whose step is skipped, leaves no trace in what a norm remembers."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmdet_norms.layers import AN, BIN, BNET, BRN, CBN, MABN, RBN, SN, CenConv2d, GhostBN, SyncBN

NORMS = {
    'BNET': lambda: BNET(4),
    'BNET average': lambda: BNET(4, momentum=None),
    'AN': lambda: AN(4, k=3),
    'BRN': lambda: BRN(4, warmup_iters=2, r_iters=4, d_iters=4),
    'BRN norm_batch': lambda: BRN(4, warmup_iters=2, r_iters=4, d_iters=4, norm_batch=1),
    'SN': lambda: SN(4),
    'RBN': lambda: RBN(4),
    'BIN': lambda: BIN(4),
    'GhostBN': lambda: GhostBN(4, norm_batch=3),
    'GhostBN, image by image': lambda: GhostBN(4, norm_batch=1),
    'SyncBN': lambda: SyncBN(4),
    'SyncBN average': lambda: SyncBN(4, momentum=None),
    'CBN': lambda: CBN(4, burnin=2),
    'MABN': lambda: MABN(4, buffer_size=3, warmup_iters=0),
    'MABN norm_batch': lambda: MABN(4, buffer_size=3, warmup_iters=0, norm_batch=1),
}
# What goes on counting: the schedules of CBN and MABN are in training forwards, whatever is in them.
COUNTERS = ('iter_count', 'iters', 'history_index')
BAD = {'inf': float('inf'), '-inf': float('-inf'), 'nan': float('nan'), 'square overflows': 1e30}


def net(norm: nn.Module, in_channels: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    conv = CenConv2d if isinstance(norm, MABN) else nn.Conv2d
    return nn.Sequential(conv(in_channels, 4, 3, padding=1), norm)


def batch(step: int) -> torch.Tensor:
    torch.manual_seed(100 + step)
    return torch.randn(3, 3, 6, 6)


def train(model: nn.Module, x: torch.Tensor, step: bool = True) -> None:
    model.zero_grad()
    model(x).square().mean().backward()
    if step:
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.01 * p.grad


def finite(model: nn.Module) -> bool:
    return all(v.isfinite().all() for v in model.state_dict().values())


def remembered(model: nn.Module) -> dict:
    return {k: v.clone() for k, v in model.state_dict().items() if not k.endswith(COUNTERS) and 'history' not in k}


@pytest.mark.parametrize('kind', BAD)
@pytest.mark.parametrize('name', NORMS)
def test_a_bad_batch_leaves_the_statistics_as_they_were(name, kind):
    model = net(NORMS[name]())
    for step in range(5):
        train(model, batch(step))
    before, bad = remembered(model), batch(5)
    bad[0, 0, 0, 0] = BAD[kind]
    train(model, bad, step=False)
    after = remembered(model)
    if name == 'AN' and kind == 'square overflows':  # of x; what its attention makes of that is finite, and small
        before, after = ({k: v for k, v in s.items() if 'attention' not in k} for s in (before, after))
    assert finite(model)
    for key, value in before.items():
        if name == 'MABN':  # an iteration as published, in which the rest of the window stands in for the batch
            torch.testing.assert_close(after[key], value, rtol=0.05, atol=0)
        else:
            assert torch.equal(after[key], value), key
    for step in range(6, 12):
        train(model, batch(step))
        assert finite(model)
    assert model.eval()(batch(0)).isfinite().all()


@pytest.mark.parametrize('name', NORMS)
def test_the_first_batch_may_be_the_bad_one(name):
    model = net(NORMS[name]())
    train(model, torch.full((3, 3, 6, 6), float('nan')), step=False)
    for step in range(4):
        train(model, batch(step))
    assert finite(model) and model.eval()(batch(0)).isfinite().all()


@pytest.mark.parametrize('rho', [0, 0.5, 1, 2])
def test_cbn_looks_back_on_good_iterations_only(rho):
    """With weights that do not move, a window with one bad row normalizes as the good rows alone do."""
    bad, short = net(CBN(4, burnin=0, buffer_num=3, rho=rho)), net(CBN(4, burnin=0, buffer_num=2, rho=rho))
    for step in range(3):
        x = batch(step)
        if step != 1:
            short(x)
        else:
            x[0, 0, 0, 0] = float('nan')
        bad(x)
    torch.testing.assert_close(bad(batch(3)), short(batch(3)))


@pytest.mark.parametrize('name', NORMS)
def test_under_activation_checkpointing_too(name):
    """And the steps after it are those of a run without checkpointing."""
    plain = net(NORMS[name]())
    repeated = copy.deepcopy(plain)
    for step in range(8):
        x = batch(step)
        if step == 4:
            x[0, 0, 0, 0] = float('inf')
        train(plain, x, step=step != 4)
        train(checkpointed(repeated), x, step=step != 4)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(repeated.state_dict()[key], value, msg=lambda text, key=key: f'{key}: {text}')


def checkpointed(model: nn.Module) -> nn.Module:
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            y = self.model[0](x)
            return checkpoint(self.model[1], y, use_reentrant=False)

    return Checkpointed()


@pytest.mark.parametrize(
    'name', ['BNET', 'AN', 'BRN', 'BRN norm_batch', 'SN', 'RBN', 'BIN', 'GhostBN', 'SyncBN', 'MABN', 'MABN norm_batch']
)
@pytest.mark.filterwarnings('ignore')
def test_in_compiled_code_too(name):
    model = net(NORMS[name]())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend='aot_eager')
    for step in range(4):
        x = batch(step)
        if step == 2:
            before = remembered(model)
            x[0, 0, 0, 0] = float('inf')
        train(compiled, x, step=step != 2)
        if step == 2:
            assert all(torch.equal(value, remembered(model)[key]) for key, value in before.items())
    assert finite(model)


@pytest.mark.parametrize(
    'name',
    ['BNET', 'AN', 'BRN', 'BRN norm_batch', 'SN', 'RBN', 'BIN', 'GhostBN', 'SyncBN', 'CBN', 'MABN', 'MABN norm_batch'],
)
def test_an_overflow_in_half_precision(name):
    """Under autocast a convolution overflows to inf; in a model of halves so does a variance when it is written."""
    model = net(NORMS[name]())
    train(model, batch(0))
    before = remembered(model)
    with torch.autocast('cpu', torch.float16):
        model(batch(1) * 1e6)
    assert all(torch.equal(value, remembered(model)[key]) for key, value in before.items())
    if not name.startswith(('CBN', 'MABN')):
        norm = copy.deepcopy(model[1]).half()
        before = {k: v.clone() for k, v in norm.state_dict().items() if 'attention' not in k}
        norm((torch.randn(3, 4, 6, 6) * 2e3).half())
        assert all(torch.equal(value, norm.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize('make', [lambda: BNET(4), lambda: AN(4, k=3)], ids=['BNET', 'AN'])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_whichever_way_the_layer_is_computed(make, layout):
    """Converted to SyncBN, with a hook, in float64, in torch's operators."""
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(net(make()))
    watched, double = net(make()), net(make()).double()
    watched[1].bn.register_forward_hook(lambda *_: None)
    for model in (converted, watched, double, net(make())):
        dtype = model[0].weight.dtype
        if isinstance(model[1].bn, nn.SyncBatchNorm):  # which refuses a CPU; its place in the code is the same
            model[1].bn._non_tensor_check = None
            model[1].bn.__class__ = _OnCPU
            if hasattr(model[1], 'attention_weights'):
                model[1].attention_weights.attention[1].__class__ = _OnCPU
        model(batch(0).to(dtype, memory_format=layout)).sum().backward()
        before, bad = remembered(model), batch(1).to(dtype)
        bad[1, 1, 1, 1] = float('nan')
        model(bad.to(memory_format=layout)).sum().backward()
        assert all(torch.equal(value, remembered(model)[key]) for key, value in before.items())


class _OnCPU(nn.SyncBatchNorm):
    def forward(self, x):
        return nn.BatchNorm2d.forward(self, x)
