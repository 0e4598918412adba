"""What holds for every norm, whatever is done with it in whatever order: drawn by hypothesis.

``HYPOTHESIS_PROFILE=long`` draws many more, and other ones each time.
"""

import copy
import io
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from helpers.layouts import LAYOUTS
from mmdet_norms.layers import (
    AN,
    BIN,
    BNET,
    BRN,
    CBN,
    GN,
    MABN,
    NORMS,
    RBN,
    SN,
    CenConv2d,
    FrozenBN,
    GhostBN,
    LN2d,
    SyncBN,
    link_convs,
)

C = 6


def mabn():
    layer = MABN(C, buffer_size=3, warmup_iters=2)
    layer.RENORM_DELAY = 4  # so that all of it is reached
    return layer


MAKE = {
    'AN': lambda: AN(C, k=3),
    'AN-GN': lambda: AN(C, norm='GN', k=2, num_groups=3),
    'BIN': lambda: BIN(C),
    'BNET': lambda: BNET(C),
    'BNET-5': lambda: BNET(C, kernel_size=5, momentum=None),
    'BRN': lambda: BRN(C, warmup_iters=1, r_iters=3, d_iters=3, momentum=0.1),
    'BRN norm_batch': lambda: BRN(C, warmup_iters=1, r_iters=3, d_iters=3, momentum=0.1, norm_batch=1),
    'CBN': lambda: CBN(C, buffer_num=2, burnin=2),
    'FrozenBN': lambda: FrozenBN(C),
    'GhostBN': lambda: GhostBN(C, norm_batch=1),
    'GN': lambda: GN(C, num_groups=2),
    'LN2d-C': lambda: LN2d(C),
    'LN2d-CHW': lambda: LN2d(C, over='CHW'),
    'MABN': mabn,
    'MABN norm_batch': lambda: MABN(C, buffer_size=3, warmup_iters=4, norm_batch=1),
    'RBN': lambda: RBN(C),
    'SN': lambda: SN(C),
    'SyncBN': lambda: SyncBN(C),
}
every_norm = pytest.mark.parametrize('name', MAKE)


def test_no_norm_is_forgotten():
    assert {name for make in MAKE.values() for name in [cls.__name__ for cls in type(make()).__mro__]} >= set(NORMS)


def network(name):
    """A norm behind a convolution: MABN's has to be a centred one, and CBN's is part of what it computes."""
    torch.manual_seed(0)
    conv = (CenConv2d if name.startswith('MABN') else nn.Conv2d)(3, C, 3, padding=1)
    net = nn.Sequential(conv, MAKE[name]())
    link_convs(net)
    with torch.no_grad():
        for tensor in (*net[1].parameters(), *net[1].buffers()):
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.add_(0.2 * torch.rand_like(tensor))
    return net


def values(state):
    return {key: value.clone() for key, value in state.items()}


def assert_same(first, second, what):
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), f'{what}: {key}'


def maps(least=0):
    """Few or no images, of a pixel or more, in each layout; at least ``least`` values of a channel."""
    sizes = st.integers(1, 6)
    shapes = st.tuples(st.integers(0, 3), st.just(3), sizes, sizes).filter(lambda s: s[0] * s[2] * s[3] >= least)
    return st.builds(
        lambda shape, layout, seed: layout(torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.5),
        shapes,
        st.sampled_from(LAYOUTS),
        st.integers(0, 2**16),
    )


class Life(RuleBasedStateMachine):
    """A norm in training, and all that may happen to it. ``name`` is set by a subclass."""

    name = ''

    @initialize(half=st.booleans())
    def start(self, half):
        self.net = network(self.name)
        self.half = half  # autocast: the map is bfloat16
        self.norm_eval = False
        self.frozen = {}

    def forward(self, net, x, run=None):
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=self.half):
            return run(net, x) if run else net(x)

    def set_mode(self, net, training):
        net.train(training)
        if self.norm_eval:
            for module in net.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def step(self, net, x, run=None):
        """A training step; output and gradients."""
        self.set_mode(net, True)
        net.zero_grad()
        x = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = self.forward(net, x, run)
        y.float().sin().sum().backward()
        gradients = {key: p.grad for key, p in net.named_parameters() if p.grad is not None} | {'x': x.grad}
        results = {'y': y.detach()} | {key: g.clone() for key, g in gradients.items()}
        assert all(value.isfinite().all() for value in results.values())
        assert not [key for key in gradients if key in self.frozen]
        with torch.no_grad():
            for p in net.parameters():
                if p.grad is not None:
                    p -= 0.01 * p.grad
        return results

    def state(self):
        return values(self.net.state_dict())

    # ------------------------------------------------------------------------------------- what may happen

    @rule(x=maps(2))
    def train(self, x):
        results = self.step(self.net, x)
        assert results['y'].dtype == (torch.bfloat16 if self.half else torch.float32)

    @rule(x=maps(2))
    def forward_without_gradients(self, x):
        self.set_mode(self.net, True)
        with torch.no_grad():
            assert self.forward(self.net, x).isfinite().all()

    @rule(x=maps())
    def evaluate(self, x):
        before = self.state()
        self.set_mode(self.net, False)
        first, second = self.forward(self.net, x), self.forward(self.net, x)
        assert torch.equal(first, second) and first.isfinite().all()
        assert_same(self.state(), before, 'evaluated')

    @rule()
    def freeze(self):
        self.net[1].requires_grad_(False)
        self.frozen = {f'1.{key}': p.detach().clone() for key, p in self.net[1].named_parameters()}

    @rule()
    def thaw(self):
        self.net[1].requires_grad_(True)
        self.frozen = {}

    @rule(on=st.booleans())
    def fix_statistics(self, on):
        self.norm_eval = on

    @rule(x=maps(2), fresh=st.booleans())
    def save_and_load(self, x, fresh):
        """What goes on from the file is what would have gone on without, loaded into a new norm or a used one."""
        file = io.BytesIO()
        torch.save(self.net.state_dict(), file)
        file.seek(0)
        loaded = network(self.name) if fresh else copy.deepcopy(self.net)
        if not fresh:
            self.step(loaded, x)
            self.step(loaded, 2 * x)
        loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
        for p, own in zip(loaded.parameters(), self.net.parameters()):
            p.requires_grad_(own.requires_grad)
        assert_same(self.step(loaded, x), self.step(self.net, x), 'loaded')
        assert_same(loaded.state_dict(), self.net.state_dict(), 'loaded')
        self.net = loaded

    @rule(x=maps(2))
    def copy(self, x):
        copied = copy.deepcopy(self.net)
        assert_same(self.step(copied, x), self.step(self.net, x), 'copied')
        self.net = copied

    @rule(x=maps(2), twice=st.booleans(), reentrant=st.booleans())
    def checkpoint(self, x, twice, reentrant):
        """Gradients and state are those of the same calls without; one input may come twice."""

        def calls(net, x):
            return net(x) + net(x) if twice else net(x)

        plain = copy.deepcopy(self.net)
        expected = self.step(plain, x, calls)
        actual = self.step(self.net, x, lambda net, x: checkpoint(calls, net, x, use_reentrant=reentrant))
        assert_same(actual, expected, 'checkpointed')
        assert_same(self.net.state_dict(), plain.state_dict(), 'checkpointed')

    @rule(x=maps(), training=st.booleans())
    def no_images(self, x, training):
        before = self.state()
        self.set_mode(self.net, training)
        self.net.zero_grad()
        y = self.forward(self.net, x[:0].clone().requires_grad_())
        assert y.shape == (0, C, *x.shape[2:])
        y.sum().backward()
        assert all(p.grad is None or not p.grad.any() for p in self.net.parameters())
        assert_same(self.state(), before, 'no images')

    @rule(x=maps(2), value=st.sampled_from([torch.inf, -torch.inf, torch.nan]))
    def a_broken_batch(self, x, value):
        """Whose step is skipped: what the state says afterwards is asked below."""
        self.set_mode(self.net, True)
        with torch.no_grad():
            x = x.clone()
            x[0, 0, 0, 0] = value
            self.forward(self.net, x)

    @rule(shape=st.sampled_from([(2, C + 1, 3, 3), (2, C), (C, 3, 3), (2, C, 1, 3, 3)]), training=st.booleans())
    def a_wrong_input(self, shape, training):
        before = self.state()
        self.set_mode(self.net, training)
        with pytest.raises(ValueError, match=r'got an input of shape'):
            self.net[1](torch.randn(shape, requires_grad=True))
        assert_same(self.state(), before, 'refused')

    # ------------------------------------------------------------------------------------- what always holds

    @invariant()
    def state_is_finite_and_fp32(self):
        for key, value in getattr(self, 'net', nn.Identity()).state_dict().items():
            assert not value.is_floating_point() or (value.dtype == torch.float32 and value.isfinite().all()), key

    @precondition(lambda self: getattr(self, 'frozen', None))
    @invariant()
    def frozen_parameters_stay(self):
        now = dict(self.net.named_parameters())
        assert_same({key: now[key].detach() for key in self.frozen}, self.frozen, 'frozen')


@every_norm
def test_any_life_of_a_norm_keeps_what_it_promises(name):
    machine = type(f'Life of {name}', (Life,), {'name': name})
    examples = settings().max_examples // 2
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples, stateful_step_count=15, suppress_health_check=[HealthCheck.too_slow]
            ),
        )


ERRORS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


@every_norm
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.differing_executors])
@given(data=st.data())
def test_dtype_and_layout_of_the_map_are_kept_and_its_values_are_those_of_fp64(name, data):
    x = data.draw(maps(2))
    x = data.draw(st.sampled_from(LAYOUTS))(torch.cat([x, -x], 1).to(data.draw(st.sampled_from(list(ERRORS)))))
    training = data.draw(st.booleans())
    layer = network(name)[1]
    exact = copy.deepcopy(layer).double()
    if x.dtype == torch.float64:
        layer.double()
    results = []
    for norm, given_x in ((layer, x), (exact, x.double().contiguous())):
        leaf = given_x.clone(memory_format=torch.preserve_format).detach() if given_x is not x else x.detach()
        leaf.requires_grad_()
        y = norm.train(training)(leaf)
        y.double().sin().sum().backward()
        results.append((y.detach(), leaf.grad))
    (y, grad), (exact_y, exact_grad) = results
    assert y.dtype == grad.dtype == x.dtype and y.shape == x.shape
    for layout in (torch.contiguous_format, torch.channels_last):
        assert y.is_contiguous(memory_format=layout) or not x.is_contiguous(memory_format=layout)
    tolerance = ERRORS[x.dtype]
    torch.testing.assert_close(y.double(), exact_y, rtol=tolerance, atol=tolerance * (1 + exact_y.abs().max()))
    scale = tolerance * (1 + exact_grad.abs().max())
    torch.testing.assert_close(grad.double(), exact_grad, rtol=10 * tolerance, atol=10 * scale)
