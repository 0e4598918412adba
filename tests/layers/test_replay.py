"""Activation checkpointing of every norm: gradients and state are those without it, whatever is repeated when.

Inputs are equal on purpose: what a repeated forward takes from the first one cannot be found by looking at values.
"""

import copy
from functools import partial

import pytest
import torch
from mmcv.cnn import ConvModule
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmdet_norms.layers import link_convs
from mmdet_norms.layers._replay import Calls

# Settings under which a forward depends on the ones before: past burn-in and warm-up, short windows.
NORMS = dict(
    AN=dict(type='AN', k=2),
    BNET=dict(type='BNET'),
    BRN=dict(type='BRN', warmup_iters=0, r_iters=2, d_iters=2, momentum=0.3),
    BRN_norm_batch=dict(type='BRN', warmup_iters=0, r_iters=2, d_iters=2, momentum=0.3, norm_batch=1),
    CBN=dict(type='CBN', burnin=0),
    BN_norm_batch=dict(type='BN', norm_batch=1),
    GN=dict(type='GN', num_groups=2),
    MABN=dict(type='MABN', warmup_iters=0, buffer_size=2),
    MABN_norm_batch=dict(type='MABN', warmup_iters=3, buffer_size=2, norm_batch=1),
    SN=dict(type='SN'),
    SyncBN=dict(type='SyncBN'),
)


class Net(nn.Module):
    """Two blocks of convolution, norm and ReLU with equal shapes of input and output."""

    def __init__(self, norm: str):
        super().__init__()
        conv_cfg = dict(type='CenConv') if norm.startswith('MABN') else None
        options = dict(padding=1, norm_cfg=NORMS[norm], conv_cfg=conv_cfg, bias=False)
        self.a, self.b = ConvModule(3, 4, 3, **options), ConvModule(3, 4, 3, **options)
        self.a.activate, self.b.activate = nn.Tanh(), nn.Tanh()  # smooth, so that rounding flips nothing


def twice_equal(net, cp, x):
    return cp(lambda z: net.a(z) + 2 * net.a(z))(x)


def thrice_equal(net, cp, x):
    return cp(lambda z: net.a(z) + 2 * net.a(z) + 3 * net.a(z))(x)


def different(net, cp, x):
    return cp(lambda z: net.a(z) + 2 * net.a(z * z) + 3 * net.a(-z))(x)


def interleaved(net, cp, x):
    return cp(lambda z: net.a(z) + 2 * net.b(z) + 3 * net.a(z) * net.b(z))(x)


def nested(net, cp, x):
    return cp(lambda z: net.a(z) + cp(lambda w: 2 * net.a(w) + 3 * net.a(w))(z) + 4 * net.a(z))(x)


def nested_deep(net, cp, x):
    return cp(lambda z: cp(lambda w: net.a(w) + cp(lambda v: 2 * net.a(v) + 3 * net.a(v))(w))(z) + 4 * net.a(z))(x)


def two_regions(net, cp, x):
    first, second = cp(lambda z: net.a(z) + 2 * net.a(z)), cp(lambda z: 3 * net.a(z) + 4 * net.a(z))
    return first(x) * second(x)


def levels(net, cp, x):
    """A head shared by the levels of a pyramid, a region each; some maps are equal, as where there is nothing."""
    maps = [x, x * 0, x * 0, x]
    return sum(i * cp(lambda z: net.a(z))(level) ** 2 for i, level in enumerate(maps, 1))


def chained(net, cp, x):
    first = cp(lambda z: net.a(z)[:, :3] + net.a(z)[:, 1:])(x)
    return cp(lambda z: net.a(z) - 2 * net.b(z))(first)


def between(net, cp, x):
    """Forwards in eval mode and without grad before the backward pass."""
    y = cp(lambda z: net.a(z) + 2 * net.a(z))(x)
    net.eval()
    net.a(x.detach())
    net.train()
    with torch.no_grad():
        net.a(x)
    return y * net.a(x)


def inside(net, cp, x):
    """A forward without grad in the middle."""

    def function(z):
        y = net.a(z)
        with torch.no_grad():
            net.a(z)
        return y + 2 * net.a(z)

    return cp(function)(x)


def dropped(net, cp, x):
    for scale in 1, 2:
        y = cp(lambda z, scale=scale: net.a(z) + scale * net.a(z))(x)
    return y + 3 * cp(lambda z: net.a(z))(x)


def failed(net, cp, x):
    def function(z, fail):
        y = net.a(z)
        if fail:
            raise KeyError
        return y + 2 * net.a(z)

    with pytest.raises(KeyError):
        cp(lambda z: function(z, True))(x)
    return cp(lambda z: function(z, False))(x)


def used_plainly_too(net, cp, x):
    return net.a(x) + 2 * cp(lambda z: net.a(z) - net.a(z) ** 2)(x) + 3 * net.a(x)


def of_two_sizes(net, cp, x):
    """A map of one value, which has no variance, before and after others."""
    small = x[:1, :, :1, :1]
    y = cp(lambda z: net.a(z))(small).sum() + 2 * cp(lambda z: net.a(z) ** 2)(x)
    return y + 3 * cp(lambda z: net.a(z))(small).sum()


ARRANGEMENTS = [
    twice_equal,
    thrice_equal,
    different,
    interleaved,
    nested,
    nested_deep,
    two_regions,
    levels,
    chained,
    between,
    inside,
    dropped,
    failed,
    used_plainly_too,
    of_two_sizes,
]


def backward_once(outputs):
    sum(y.sin().pow(3).mean() for y in outputs).backward()


def backward_twice(outputs):
    loss = sum(y.sin().pow(3).mean() for y in outputs)
    loss.backward(retain_graph=True)
    loss.backward()


def backward_one_by_one(outputs):
    """In the order of the forwards, which is not that of one backward pass."""
    for y in outputs:
        y.sin().pow(3).mean().backward()


def train(norm, arrangement, cp, backward=backward_once, forwards=1, steps=4):
    torch.manual_seed(0)
    net = Net(norm).double()
    link_convs(net)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    for _ in range(steps):
        x = torch.randn(2, 3, 5, 5, dtype=torch.double, requires_grad=True)
        net.zero_grad()
        backward([arrangement(net, cp, x) for _ in range(forwards)])
        with torch.no_grad():
            for p in net.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad / (1 + p.grad.norm())
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return gradients | dict(x=x.grad), net.state_dict()


def plain(function):
    return function


def by(*reentrant):
    """Wrapper of functions: checkpointed, one after the other of these ways, from the outside in."""
    depth = 0

    def cp(function):
        def run(z):
            nonlocal depth
            way, depth = reentrant[depth % len(reentrant)], depth + 1
            try:
                return checkpoint(function, z, use_reentrant=way)
            finally:
                depth -= 1

        return run

    return cp


def assert_same(ours, theirs):
    for of_ours, of_theirs in zip(ours, theirs):
        assert of_ours.keys() == of_theirs.keys()
        for key, value in of_theirs.items():
            difference = float((of_ours[key].double() - value.double()).norm())
            assert difference <= 1e-10 * float(value.double().norm()) + 1e-15, f'{key}: off by {difference}'


WAYS = {'reentrant': (True,), 'not reentrant': (False,), 'mixed': (True, False), 'mixed too': (False, True)}


@pytest.mark.parametrize('arrangement', ARRANGEMENTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize('norm', NORMS)
def test_gradients_and_state_are_those_without_checkpointing(norm, arrangement):
    if norm == 'SyncBN' and arrangement is of_two_sizes:
        pytest.skip('one value per channel has no variance: an error, as of torch')
    expected = train(norm, arrangement, plain)
    for name, way in WAYS.items():
        if (norm, arrangement, name) == ('CBN', inside, 'reentrant'):
            continue  # where grad is off in any case, so that the forward counts as one of training: documented
        if len(way) == 1 or arrangement in (nested, nested_deep):
            try:
                assert_same(train(norm, arrangement, by(*way)), expected)
            except AssertionError as error:
                raise AssertionError(f'{name}: {error}') from None


@pytest.mark.parametrize('reentrant', [True, False])
@pytest.mark.parametrize('backward', [backward_twice, backward_one_by_one], ids=lambda f: f.__name__)
@pytest.mark.parametrize('arrangement', [twice_equal, nested, two_regions], ids=lambda f: f.__name__)
@pytest.mark.parametrize('norm', ['BRN', 'BRN_norm_batch', 'CBN', 'MABN', 'MABN_norm_batch'])
def test_accumulated_and_repeated_backward_passes(norm, arrangement, backward, reentrant):
    results = (train(norm, arrangement, cp, backward, forwards=3) for cp in (by(reentrant), plain))
    assert_same(*results)


@pytest.mark.parametrize('norm', ['BRN', 'BRN_norm_batch', 'CBN', 'MABN', 'MABN_norm_batch'])
def test_early_stop_off(norm):
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        for arrangement in twice_equal, nested, two_regions:
            assert_same(train(norm, arrangement, by(False)), train(norm, arrangement, plain))


@pytest.mark.parametrize('norm', ['BRN', 'BRN_norm_batch', 'CBN', 'MABN', 'MABN_norm_batch'])
def test_a_hundred_calls_before_one_backward(norm):
    """More than any fixed memory of calls would hold."""

    def many(net, cp, x):
        return sum(i * cp(lambda z: net.a(z) ** 2 + net.a(z))(x) for i in range(1, 51)) / 1000

    assert_same(train(norm, many, by(False), steps=2), train(norm, many, plain, steps=2))


@pytest.mark.parametrize('norm', ['BRN', 'BRN_norm_batch', 'CBN', 'MABN', 'MABN_norm_batch'])
def test_checkpoint_sequential(norm):
    def in_segments(net, cp, x):
        if cp is plain:
            return net.a(net.a(x)[:, :3])
        parts = [net.a, lambda y: y[:, :3], net.a, nn.Identity()]
        return torch.utils.checkpoint.checkpoint_sequential(parts, 2, x, use_reentrant=cp)

    expected = train(norm, in_segments, plain)
    for way in True, False:
        assert_same(train(norm, in_segments, way), expected)


@pytest.mark.skipif(not hasattr(torch.utils.checkpoint, 'CheckpointPolicy'), reason='torch < 2.4')
@pytest.mark.parametrize('norm', NORMS)
def test_selective_checkpointing(norm):
    """Results of some operations are kept: in a repetition there must be no other ones, nor more of a kind."""
    policies = torch.utils.checkpoint.CheckpointPolicy

    def policy(context, operation, *args, **kwargs):
        keeps = operation is torch.ops.aten.convolution.default
        return policies.MUST_SAVE if keeps else policies.PREFER_RECOMPUTE

    def selective(function):
        contexts = partial(torch.utils.checkpoint.create_selective_checkpoint_contexts, policy)
        return lambda z: checkpoint(function, z, use_reentrant=False, context_fn=contexts)

    for arrangement in twice_equal, two_regions:
        assert_same(train(norm, arrangement, selective), train(norm, arrangement, plain))


@pytest.mark.parametrize('norm', NORMS)
def test_a_look_at_saved_tensors_counts_nothing(norm):
    """As tools that draw graphs take one: it repeats the forward outside of a backward pass."""

    def looked_at(net, cp, x):
        y = cp(lambda z: (net.a(z) + 2 * net.a(z)).tanh())(x)
        assert torch.equal(y.grad_fn._saved_result, y)
        return y

    assert_same(train(norm, looked_at, by(False)), train(norm, looked_at, plain))


@pytest.mark.parametrize('reentrant', [True, False])
@pytest.mark.parametrize('norm', ['BRN', 'BRN_norm_batch', 'CBN', 'MABN', 'MABN_norm_batch'])
def test_compiled_code_inside_a_checkpoint(norm, reentrant):
    def compiled(net, cp, x):
        def function(z):
            return net.a(z) + 2 * net.a(z)

        if cp is not plain:
            function = torch.compile(function, backend='aot_eager_decomp_partition')
        return cp(function)(x) * cp(function)(x)

    torch._dynamo.reset()
    assert_same(train(norm, compiled, by(reentrant)), train(norm, compiled, plain))


def test_calls_of_a_region_go_with_its_graph_and_none_are_copied():
    calls, key = Calls(), torch.randn(3)
    y = checkpoint(lambda z: calls.add((key, z)) or z.sin(), torch.randn(3, requires_grad=True), use_reentrant=False)
    assert calls.recall(key) is None  # not held by the layer
    del y
    calls.add((key, key))
    assert calls.recall(key)[1] is not None and copy.deepcopy(calls).recall(key) is None


def test_other_code_that_repeats_forwards_gets_the_nearest_call_and_of_equal_ones_the_latest_first():
    calls = Calls()
    for i, key in enumerate([0.0, 1.0, 1.0]):
        calls.add((torch.full((2,), key), torch.tensor(i)))
    near = torch.full((2,), 1 + 1e-6)
    assert [int(calls.recall(near)[1]) for _ in range(2)] == [2, 1]
    assert int(calls.recall(torch.zeros(2))[1]) == 0
