"""CBN against its reference in float64, the published numbers, and the states a layer lives through."""

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from mmcv.cnn import ConvModule
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmdet_norms.compat.torch_internals import Convolution
from mmdet_norms.layers._cbn_history import mean_patch
from mmdet_norms.layers.cbn import CBN, link_convs
from mmdet_norms.reference import ReferenceCBN

PUBLISHED = {'weight', 'bias', 'running_mean', 'running_var'}
HISTORY = {'history_patch', 'history_grad', 'history_moments', 'history_index'}


class Reference(ReferenceCBN):
    """With the weight and bias of a layer. Counts the entries that are left out."""

    dropped = 0

    def __init__(self, layer, **arguments):
        super().__init__(layer.num_features, **arguments)
        self.double()
        self.weight, self.bias = layer.weight, layer.bias

    def average(self, means, seconds):
        self.dropped += int((seconds < means.square()).sum())
        return super().average(means, seconds)


def relative(actual, expected):
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=1e-30))


def conv_cbn(cin=4, cout=6, kernel=3, padding=1, seed=0, dtype=torch.float32, linked=False, conv=(), **cbn):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(cin, cout, kernel, padding=padding, **dict(dict(bias=False), **dict(conv))),
        CBN(cout, **dict(dict(burnin=1), **cbn)),
    ).to(dtype)
    nn.init.normal_(model[1].weight, 1, 0.2), nn.init.normal_(model[1].bias, 0, 0.2)
    if linked:
        assert link_convs(model) == []
    return model


def batches(count, cin=4, size=6, seed=1, dtype=torch.float32, n=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, cin, size, size + 1, generator=generator, dtype=dtype) for _ in range(count)]


def train(model, data, lr=0.05, run=None):
    """SGD on a loss with a gradient that is not trivial for a norm; the outputs."""
    outputs = []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    for x in data:
        optimizer.zero_grad()
        y = (run or model)(x)
        (y.float().square() * torch.linspace(0, 1, y[0, 0].numel()).view(y.shape[-2:])).mean().backward()
        optimizer.step()
        outputs.append(y.detach())
    return outputs


def assert_same_run(first, second, model, other, exact=True):
    tolerance = dict(rtol=0, atol=0) if exact else dict(rtol=1e-4, atol=1e-5)
    for i, (a, b) in enumerate(zip(first, second)):
        torch.testing.assert_close(a, b, **tolerance, msg=lambda m, i=i: f'output {i}: {m}')
    ours, theirs = model.state_dict(), other.state_dict()
    assert set(ours) == set(theirs)
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], **tolerance, msg=lambda m, key=key: f'{key}: {m}')


class TestMaths:
    @pytest.mark.parametrize(
        'cbn, conv, shake',
        [
            (dict(), dict(), 0.0),
            (dict(two_stage=False, burnin=5), dict(), 0.0),
            (dict(two_stage=False, burnin=9, buffer_num=2), dict(), 0.0),
            (dict(eps_in_sqrt=True), dict(), 0.0),
            (dict(eps_in_sqrt=True, eps=1e-2), dict(stride=2), 0.0),
            (dict(burnin=0), dict(), 0.0),
            (dict(buffer_num=0), dict(), 0.0),
            (dict(buffer_num=1), dict(), 0.0),
            (dict(rho=0.0), dict(), 0.0),
            (dict(rho=0.5), dict(bias=True), 0.0),
            (dict(rho=1.5), dict(groups=2), 0.0),
            (dict(), dict(bias=True), 0.0),
            (dict(), dict(groups=2), 0.0),
            (dict(), dict(stride=2), 0.0),
            (dict(), dict(stride=3, kernel_size=2, padding=0), 0.0),
            (dict(), dict(dilation=2, padding=2), 0.0),
            (dict(), dict(stride=(2, 1), dilation=(1, 2), padding=(0, 2), kernel_size=(3, 2), groups=2), 0.0),
            (dict(), dict(padding='same', kernel_size=4), 0.0),
            (dict(), dict(padding_mode='reflect'), 0.0),
            (dict(), dict(kernel_size=1, padding=0), 0.0),
            (dict(), dict(groups=2), 0.5),  # large moves: many negative variances
        ],
    )
    def test_a_training_run_equals_the_published_algorithm(self, cbn, conv, shake):
        torch.manual_seed(0)
        cbn = dict(dict(burnin=3), **cbn)
        module = nn.Conv2d(4, 6, **dict(dict(kernel_size=3, padding=1, bias=False), **conv)).double()
        layer = CBN(6, **cbn).double()
        nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
        reference = Reference(layer, **cbn)
        optimizer, noise = torch.optim.SGD([*module.parameters(), *layer.parameters()], lr=0.1), torch.Generator()
        for x in batches(12, dtype=torch.float64):
            results = []
            for norm in (layer, lambda y: reference(y, module.weight)):
                optimizer.zero_grad(set_to_none=True)
                x_in = x.clone().requires_grad_()
                y = norm(module(x_in))
                torch.manual_seed(7)
                y.backward(torch.randn_like(y))
                grads = [p.grad.clone() for p in (*module.parameters(), *layer.parameters())]
                results.append([y, x_in.grad, *grads])
            for actual, expected in zip(*results):
                # the gradient of a conv bias is zero but for rounding
                assert relative(actual, expected) <= 1e-10 or expected.abs().max() < 1e-12
            assert relative(layer.running_mean, reference.running_mean) <= 1e-12
            assert relative(layer.running_var, reference.running_var) <= 1e-12
            optimizer.step()
            with torch.no_grad():
                module.weight.lerp_(torch.randn(module.weight.shape, generator=noise).double(), shake)
        assert reference.dropped > 5 or not shake
        y = module(x).detach()
        assert relative(layer.eval()(y), reference.eval()(y)) <= 1e-12

    @pytest.mark.parametrize('name', ['k1', 'k3', 'k3_bias', 'k3_negvar', 'k3_ramp', 'k3_rho05'])
    def test_twelve_iterations_equal_the_published_layer(self, name, golden):
        data = {key: torch.from_numpy(np.array(value)) for key, value in golden(f'cbn/cbn_{name}.npz').items()}
        cfg = {key[4:]: value.item() for key, value in data.items() if key.startswith('cfg.')}
        geometry = [cfg[key] for key in ('stride', 'padding', 'dilation', 'groups')]
        layer = CBN(
            4,
            eps_in_sqrt=cfg['out_p'],
            **{k: cfg[k] for k in ('buffer_num', 'burnin', 'two_stage', 'rho', 'eps', 'momentum')},
        ).double()
        layer.load_state_dict({key[5:]: value for key, value in data.items() if key.startswith('init.')}, strict=True)

        for i in range(12):
            length = layer._history.length if layer._history else 0
            assert length == data['history_len_before'][i]
            with torch.no_grad():
                layer.weight.copy_(data['weight'][i]), layer.bias.copy_(data['bias'][i])
            layer.zero_grad()
            conv_weight, x = data['conv_weight'][i].requires_grad_(), data['x'][i].requires_grad_()
            conv_bias = data['conv_bias'][i] if 'conv_bias' in data else None
            conv_out = F.conv2d(x, conv_weight, conv_bias, *geometry)
            conv_out.retain_grad()
            y = layer(conv_out)
            y.backward(data['gy'][i])
            ours = dict(
                y=y,
                gx=x.grad,
                g_conv_out=conv_out.grad,
                g_conv_weight=conv_weight.grad,
                g_weight=layer.weight.grad,
                g_bias=layer.bias.grad,
                running_mean=layer.running_mean,
                running_var=layer.running_var,
            )
            for key, value in ours.items():
                assert relative(value, data[key][i]) <= 1e-12, (key, i)
        with torch.no_grad():
            layer.weight.copy_(data['final.weight']), layer.bias.copy_(data['final.bias'])
        if conv_bias is not None:
            conv_bias = conv_bias - cfg['lr'] * data['g_conv_out'][-1].sum((0, 2, 3))
        y = layer.eval()(F.conv2d(data['eval_x'], data['final.conv_weight'], conv_bias, *geometry))
        assert relative(y, data['eval_y']) <= 1e-12

    @pytest.mark.parametrize('eps_in_sqrt', [True, False])
    @pytest.mark.parametrize('iteration', [1, 2, 6])
    def test_gradients_are_those_of_the_formula_with_history_held_constant(self, eps_in_sqrt, iteration):
        model = conv_cbn(2, 3, dtype=torch.float64, burnin=2, eps_in_sqrt=eps_in_sqrt)
        train(model, batches(iteration, 2, 4, dtype=torch.float64))
        # Held weights: the published layer treats the move of W inside the history terms as a constant.
        conv, layer = model[0], model[1]
        x = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)

        def run(x, weight, bias):
            y = F.conv2d(x, conv.weight.detach(), padding=1)
            return torch.func.functional_call(copy.deepcopy(layer), dict(weight=weight, bias=bias), (y,))

        params = [p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias)]
        assert torch.autograd.gradcheck(run, (x, *params))

    def test_the_mean_patch_is_the_gradient_of_the_mean(self):
        torch.manual_seed(0)
        for kernel, stride, padding, dilation in [
            ((3, 3), (1, 1), (1, 1), (1, 1)),
            ((5, 2), (2, 3), (3, 0), (1, 2)),
            ((3, 3), (2, 2), (0, 4), (3, 1)),
            ((1, 1), (2, 2), (0, 0), (1, 1)),
        ]:
            x = torch.randn(3, 4, 11, 12, dtype=torch.float64)
            weight = torch.randn(6, 2, *kernel, dtype=torch.float64, requires_grad=True)
            y = F.conv2d(x, weight, None, stride, padding, dilation, 2)
            expected = torch.autograd.grad(y.mean((0, 2, 3)).sum(), weight)[0]
            patch = mean_patch(Convolution(x, weight.detach(), stride, padding, dilation, 2), y)
            for channel in range(6):
                group = slice(0, 2) if channel < 3 else slice(2, 4)
                assert relative(patch[group], expected[channel]) < 1e-13

    def test_one_weight_gradient_per_iteration_and_no_host_sync_reads_the_counter(self, monkeypatch):
        model = conv_cbn()
        train(model, batches(3))
        from torch.utils._python_dispatch import TorchDispatchMode

        seen = []

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                seen.append(func.overloadpacket.__name__)
                return func(*args, **(kwargs or {}))

        with Count():
            model(batches(1)[0])
        assert seen.count('convolution_backward') == 1 and seen.count('convolution') == 1
        assert not {'_local_scalar_dense', 'item', 'nonzero'} & set(seen)

    def test_before_the_history_is_on_it_is_batch_norm_with_the_unbiased_variance(self):
        layer = CBN(3, burnin=5, eps_in_sqrt=True)
        x = torch.randn(2, 3, 4, 4) * 2 + 1
        expected = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(layer(x), expected)

    def test_a_new_layer_starts_as_the_identity_transform(self):
        layer = CBN(3)
        assert layer.weight.eq(1).all() and layer.bias.eq(0).all() and 'num_batches_tracked' not in layer.state_dict()


class TestEval:
    def trained(self, **kwargs):
        model = conv_cbn(**kwargs)
        train(model, batches(4))
        return model.eval()

    @pytest.mark.parametrize('eps_in_sqrt', [True, False])
    def test_the_plain_batch_norm_it_gives_is_the_same_function(self, eps_in_sqrt):
        model = conv_cbn(eps_in_sqrt=eps_in_sqrt, dtype=torch.float64, eps=1e-2)
        train(model, batches(4, dtype=torch.float64))
        model.eval()
        layer, plain = model[1], model[1].to_batch_norm()
        x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
        var = layer.running_var.view(1, -1, 1, 1)
        denominator = (var + 1e-2).sqrt() if eps_in_sqrt else var.sqrt() + 1e-2
        mean, weight, bias = (t.view(1, -1, 1, 1) for t in (layer.running_mean, layer.weight, layer.bias))
        expected = (x - mean) / denominator * weight + bias
        assert type(plain) is nn.BatchNorm2d and not plain.training
        assert relative(layer(x), expected) < 1e-13 and relative(plain(x), expected) < 1e-13

    def test_eval_changes_no_state_and_needs_no_convolution(self):
        layer = self.trained()[1]
        before = copy.deepcopy(layer.state_dict())
        layer(torch.randn(2, 6, 3, 3, requires_grad=True).relu()).sum().backward()
        assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


class TestFindingTheConvolution:
    @pytest.mark.parametrize('cbn', [dict(burnin=0), dict(burnin=8)])
    def test_behind_anything_else_the_first_training_forward_says_what_to_do(self, cbn):
        model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), CBN(4, **cbn))
        with pytest.raises(RuntimeError, match=r"CBN\(num_features=4\) must follow a conv.*'ReluBackward0'.*conv,"):
            model(torch.randn(1, 2, 3, 3))
        assert link_convs(model) == ['2']
        with pytest.raises(RuntimeError, match=r"CBN\(num_features=4\) '2' must follow"):
            model(torch.randn(1, 2, 3, 3))

    def test_a_transposed_convolution_is_refused(self):
        with pytest.raises(RuntimeError, match='must follow a conv'):
            nn.Sequential(nn.ConvTranspose2d(2, 4, 2), CBN(4))(torch.randn(1, 2, 3, 3))

    def test_a_bare_input_is_let_through_only_during_burn_in(self):
        layer, x = CBN(4, burnin=1), torch.randn(2, 4, 3, 3, requires_grad=True)
        layer(x).sum().backward()
        with pytest.raises(RuntimeError, match='comes from nothing'):
            layer(x)

    def test_without_grad_it_is_batch_norm_and_still_counts_and_tracks(self):
        model = conv_cbn(burnin=0, eps_in_sqrt=True)
        mean = model[1].running_mean.clone()
        with torch.no_grad():
            z = model[0](batches(1)[0])
            y = model[1](z)
        expected = F.batch_norm(z, None, None, None, None, True) * (83 / 84) ** 0.5
        expected = expected * model[1].weight.view(-1, 1, 1) + model[1].bias.view(-1, 1, 1)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        assert model[1]._history is None and not torch.equal(mean, model[1].running_mean)

    def test_a_frozen_convolution_between_trained_layers_works(self):
        model = nn.Sequential(nn.Conv2d(4, 4, 1), conv_cbn(burnin=0))
        model[1][0].requires_grad_(False)
        outputs = train(model, batches(4))
        assert model[1][1]._history.length == 3 and all(y.isfinite().all() for y in outputs)

    def test_with_everything_frozen_before_it_the_affine_part_trains_on_plain_batch_norm(self):
        model = conv_cbn(burnin=0)
        model[0].requires_grad_(False)
        before = model[1].weight.detach().clone()
        train(model, batches(3))
        assert model[1]._history is None and not torch.equal(before, model[1].weight)

    def test_frozen_affine_parameters_stay_while_the_convolution_trains(self):
        model = conv_cbn(burnin=0)
        model[1].requires_grad_(False)
        conv, weight = model[0].weight.detach().clone(), model[1].weight.clone()
        train(model, batches(3))
        assert torch.equal(weight, model[1].weight) and not torch.equal(conv, model[0].weight)

    def test_a_conv_module_needs_nothing_but_norm_cfg(self):
        module = ConvModule(4, 6, 3, padding=1, norm_cfg=dict(type=CBN, burnin=1, requires_grad=True))
        module.init_weights()
        assert set(module.state_dict()) == {'conv.weight', 'bn.iter_count'} | {f'bn.{key}' for key in PUBLISHED}
        train(module, batches(4))
        assert module.bn._history.length == 3
        assert link_convs(nn.Sequential(module)) == [] and module.bn.name == '0.bn'

    def test_resnet_blocks_link_every_norm_with_the_convolution_before_it(self):
        from mmdet.models.backbones.resnet import BasicBlock, Bottleneck

        for block in (BasicBlock, Bottleneck):
            planes = 8
            down = nn.Sequential(
                nn.Conv2d(4, planes * block.expansion, 1, bias=False), CBN(planes * block.expansion, burnin=1)
            )
            model = block(4, planes, downsample=down, norm_cfg=dict(type=CBN, burnin=1))
            assert link_convs(model) == []
            linked = [(c, h.__self__) for c in model.modules() for h in c._forward_hooks.values()]
            assert len(linked) == (4 if block is Bottleneck else 3)
            assert all(conv.out_channels == norm.num_features for conv, norm in linked)
            assert (model.conv1, model.norm1) in linked and (model.conv2, model.norm2) in linked
            train(model, batches(4))
            assert all(m._history.length == 3 for m in model.modules() if isinstance(m, CBN))

    def test_linked_and_found_through_autograd_are_the_same(self):
        found, linked = conv_cbn(), conv_cbn(linked=True)
        assert link_convs(linked) == [] and len(linked[0]._forward_hooks) == 1  # again: no second hook
        assert_same_run(train(found, batches(6)), train(linked, batches(6)), found, linked)

    def test_a_convolution_with_computed_weights_is_left_to_autograd(self):
        from mmcv.cnn import ConvWS2d

        model = nn.Sequential(ConvWS2d(4, 6, 3, padding=1), CBN(6, burnin=1))
        assert link_convs(model) == ['1']
        train(model, batches(4))
        assert model[1]._history.length == 3

    def test_another_convolution_shape_than_remembered_is_named(self):
        layer = CBN(4, burnin=0)
        layer(nn.Conv2d(2, 4, 3)(torch.randn(1, 2, 5, 5)))
        with pytest.raises(RuntimeError, match=r'CBN\(num_features=4\) remembers a convolution of other shape'):
            layer(nn.Conv2d(2, 4, 1)(torch.randn(1, 2, 5, 5)))

    def test_the_tensors_of_a_step_are_not_kept(self):
        model = conv_cbn(linked=True)
        train(model, batches(3))
        assert model[1]._linked_call is None
        model(torch.zeros(0, 4, 6, 5))
        assert model[1]._linked_call is None
        model.eval()(batches(1)[0])
        assert model[1]._linked_call is None


class TestBurnIn:
    def test_it_counts_training_forwards(self):
        model = conv_cbn(burnin=3)
        for i, x in enumerate(batches(6)):
            model.train()(x)
            model.eval()(x)
            assert model[1].iter_count == i + 1
            assert (model[1]._history is not None) == (i >= 3)

    def test_epochs_are_resolved_from_the_length_of_the_loader(self):
        layer = CBN(4, burnin='1.5e')
        layer.resolve_burnin(10)
        assert layer.burnin_iters == 15 and layer.burnin == '1.5e'
        layer.resolve_burnin(20)
        assert layer.burnin_iters == 30
        fixed = CBN(4, burnin=7)
        fixed.resolve_burnin(10)
        assert fixed.burnin_iters == 7

    def test_unresolved_epochs_keep_burning_in_and_say_so_once(self):
        model = conv_cbn(burnin='1e')
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('default')
            train(model, batches(12))
        ours = [w for w in caught if 'resolve_burnin(len(train_dataloader))' in str(w.message)]
        assert len(ours) == 1 and model[1]._history is None and model[1].iter_count == 12

    def test_resolving_later_or_after_a_resume_counts_what_was_trained(self):
        model = conv_cbn(burnin='2e')
        model[1].resolve_burnin(2)
        train(model, batches(3))
        resumed = conv_cbn(burnin='2e')
        resumed.load_state_dict(model.state_dict())
        resumed[1].resolve_burnin(2)
        train(resumed, batches(1))
        assert resumed[1]._history is None
        train(resumed, batches(1))
        assert resumed[1]._history.length == 1


class TestStateDict:
    def test_published_and_plain_batch_norm_checkpoints_load_strictly(self):
        published = {
            'weight': torch.rand(6),
            'bias': torch.rand(6),
            'running_mean': torch.rand(6),
            'running_var': torch.rand(6),
        }
        for state in (published, nn.BatchNorm2d(6).state_dict()):
            model = conv_cbn()
            train(model, batches(4))
            keys = list(state)
            model[1].load_state_dict(state, strict=True)
            assert list(state) == keys  # the caller's dict stays as it is
            assert model[1].iter_count == 0 and model[1]._history is None
            if state is published:
                assert torch.equal(model[1].running_var, state['running_var'])
            train(model, batches(3))
            assert model[1].iter_count == 3 and model[1]._history.length == 2

    def test_a_batch_norm_checkpoint_gives_the_same_function(self):
        """eps outside the root included, which counts where the variance is small."""
        plain = nn.BatchNorm2d(6)
        plain.running_mean.normal_(), plain.running_var.uniform_(0, 1e-4), nn.init.normal_(plain.weight)
        x = torch.randn(2, 6, 5, 5)
        for kwargs in (dict(eps_in_sqrt=True), dict()):
            layer = CBN(6, **kwargs)
            layer.load_state_dict(plain.state_dict())
            assert relative(layer.eval()(x), plain.eval()(x)) < 1e-6

    def test_other_parts_of_a_partial_checkpoint_reset_nothing(self):
        model = conv_cbn()
        train(model, batches(4))
        result = model.load_state_dict({'0.weight': model[0].weight.detach()}, strict=False)
        assert model[1].iter_count == 4 and model[1]._history.length == 3
        assert set(result.missing_keys) == {f'1.{key}' for key in PUBLISHED}

    def test_a_torn_history_is_reported(self):
        model = conv_cbn()
        train(model, batches(4))
        state = model.state_dict()
        del state['1.history_grad']
        with pytest.raises(RuntimeError, match=r'Missing key.*1\.history_grad'):
            conv_cbn().load_state_dict(state)

    @pytest.mark.parametrize('steps', [0, 1, 2, 3, 4, 7])
    @pytest.mark.parametrize('ramp', [True, False])
    def test_resuming_is_bit_exact_and_survives_the_file(self, steps, ramp):
        kwargs = dict(burnin=4, two_stage=False) if ramp else dict(burnin=1)
        data = batches(12)
        straight, first, resumed = (conv_cbn(**kwargs) for _ in range(3))
        train(straight, data[:steps])
        train(first, data[:steps])
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        resumed.load_state_dict(torch.load(file, weights_only=True), strict=True)
        expected = train(straight, data[steps:])
        assert_same_run(expected, train(resumed, data[steps:]), straight, resumed)
        assert all(f'1.{key}' in resumed.state_dict() for key in HISTORY)

    @pytest.mark.parametrize('rows', [1, 2, 5])
    def test_a_history_saved_with_another_buffer_num_keeps_its_newest_rows(self, rows):
        model, other = conv_cbn(), conv_cbn(buffer_num=rows)
        train(model, batches(6))
        other.load_state_dict(model.state_dict())
        ours, theirs = model[1]._history, other[1]._history
        assert theirs.length == min(rows, 3)
        for i in range(theirs.length):
            assert torch.equal(ours.grad[(ours.next - 1 - i) % 3], theirs.grad[(theirs.next - 1 - i) % rows])
        train(other, batches(2))
        assert theirs.length == min(rows, 5)

    def test_dropping_the_history_leaves_the_published_keys(self):
        model = nn.Sequential(conv_cbn(), nn.BatchNorm2d(6))
        model.register_buffer('iter_count', torch.zeros(()))  # somebody else's
        train(model, batches(4))
        state = model.state_dict()
        keys = set(state)
        dropped = CBN.drop_history(state)
        assert set(state) == keys and type(dropped) is type(state) and dropped._metadata is state._metadata
        assert keys - set(dropped) == {f'0.1.{key}' for key in HISTORY | {'iter_count'}}
        assert set(CBN.drop_history(model[0][1].state_dict())) == PUBLISHED
        model.load_state_dict(dropped, strict=True)

    def test_running_statistics_are_updated_in_place(self):
        model = conv_cbn()
        before = [(b, b.data_ptr()) for b in model.buffers()]
        train(model, batches(4))
        assert all(a is b and b.data_ptr() == p for a, (b, p) in zip(model.buffers(), before))

    def test_the_history_is_in_no_buffers(self):
        model = conv_cbn()
        names = [name for name, _ in model.named_buffers()]
        train(model, batches(4))
        assert [name for name, _ in model.named_buffers()] == names

    @pytest.mark.parametrize('clone', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    @pytest.mark.parametrize('linked', [True, False])
    def test_clones_continue_as_the_original(self, clone, linked):
        model = conv_cbn(linked=linked)
        train(model, batches(4))
        model[0](batches(1)[0])  # something may be in flight
        other = clone(model)
        assert other[1]._history.grad.data_ptr() != model[1]._history.grad.data_ptr()
        data = batches(4, seed=5)
        assert_same_run(train(model, data), train(other, data), model, other)
        if linked:
            assert next(iter(other[0]._forward_hooks.values())).__self__ is other[1]

    @pytest.mark.parametrize('update_buffers', [True, False])
    @pytest.mark.parametrize('steps_before', [0, 2, 5])
    def test_ema_of_mmengine_works_whenever_it_is_made(self, update_buffers, steps_before):
        from mmengine.model import ExponentialMovingAverage

        model = conv_cbn()
        train(model, batches(steps_before))
        ema = ExponentialMovingAverage(model, momentum=0.5, update_buffers=update_buffers)
        ema.update_parameters(model)
        old = model[1].running_mean.clone()
        train(model, batches(4))
        ema.update_parameters(model)
        expected = (old + model[1].running_mean) / 2 if update_buffers else model[1].running_mean
        torch.testing.assert_close(ema.module[1].running_mean, expected)
        assert ema.module.eval()(batches(1)[0]).isfinite().all()

    def test_an_ema_made_before_the_history_existed_saves_and_loads_strictly(self):
        from mmengine.model import ExponentialMovingAverage

        model = conv_cbn()
        ema = ExponentialMovingAverage(model, momentum=0.5)
        for x in batches(5):
            train(model, [x]), ema.update_parameters(model)
        other = ExponentialMovingAverage(conv_cbn(), momentum=0.5)
        other.load_state_dict(ema.state_dict(), strict=True)
        assert torch.equal(other.module[1].running_mean, ema.module[1].running_mean)

    def test_half_and_double_models_move_the_history_but_never_below_fp32(self):
        model = conv_cbn()
        train(model, batches(3))
        grad = model[1]._history.grad.clone()
        assert model.to(memory_format=torch.channels_last).half()[1]._history.grad.dtype == torch.float32
        assert torch.equal(model[1]._history.grad, grad)
        model.double()
        assert model[1]._history.grad.dtype == torch.float64
        train(model, batches(2, dtype=torch.float64))


class TestSituations:
    @pytest.mark.parametrize('dtype, atol', [(torch.bfloat16, 0.15), (torch.float16, 0.03)])
    @pytest.mark.parametrize('linked', [True, False])
    def test_autocast_keeps_fp32_state_and_is_close(self, dtype, atol, linked):
        full, low = conv_cbn(linked=linked), conv_cbn(linked=linked)

        def run(x):
            with torch.autocast('cpu', dtype=dtype):
                return low(x)

        expected, actual = train(full, batches(6)), train(low, batches(6), run=run)
        assert actual[-1].dtype == dtype and low[1]._history.length == 3
        assert all(v.dtype in (torch.float32, torch.int64) for v in low.state_dict().values())
        for a, b in zip(actual, expected):
            torch.testing.assert_close(a.float(), b, rtol=0.05, atol=atol)
        ours, theirs = low[1]._history, full[1]._history
        for name in ('patch', 'grad', 'moments'):
            assert relative(getattr(ours, name), getattr(theirs, name)) < 0.05, name
        torch.testing.assert_close(low[0].weight.grad, full[0].weight.grad, rtol=0.1, atol=0.02)

    def test_under_autocast_the_weight_that_moves_is_the_parameter(self):
        """The rounded copies of two nearby weights are often equal; the parameters are not."""
        model = conv_cbn(burnin=0)
        x = batches(1)[0]
        with torch.autocast('cpu', dtype=torch.bfloat16):
            z = model[0](x)
        found = model[1]._conv_in_front(z, None, False)
        assert found.weight.dtype == torch.float32 and torch.equal(found.weight, model[0].weight)
        model[0].requires_grad_(False)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            z = model[0](x.requires_grad_())
        assert model[1]._conv_in_front(z, None, False).weight.shape == found.weight.shape

    @pytest.mark.parametrize('scale, offset', [(3e3, 0), (100, 1000)])
    def test_large_half_activations_do_not_overflow(self, scale, offset):
        model = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), CBN(2, burnin=0)).half()
        nn.init.eye_(model[0].weight.data[:, :, 0, 0])
        model[1].float()
        for _ in range(4):
            y = model((torch.randn(4, 2, 16, 16) * scale + offset).clamp(-6e4, 6e4).half())
        assert y.dtype == torch.half and y.isfinite().all() and model[1]._history.grad.isfinite().all()
        assert model[1].running_var.isfinite().all()

    @pytest.mark.parametrize('dtype', [torch.bfloat16, torch.half])
    def test_a_model_converted_to_low_precision_trains(self, dtype):
        model = conv_cbn().to(dtype)
        outputs = train(model, [x.to(dtype) for x in batches(4)], lr=0.01)
        assert outputs[-1].dtype == dtype and outputs[-1].isfinite().all() and model[1]._history.length == 3

    @pytest.mark.parametrize('burnin', [0, 100])
    def test_a_single_value_per_channel_is_finite_and_leaves_the_running_variance(self, burnin):
        model = conv_cbn(kernel=1, padding=0, burnin=burnin)
        data = [torch.randn(1, 4, 1, 1) for _ in range(4)]
        outputs = train(model, data)
        torch.testing.assert_close(outputs[0].flatten(), conv_cbn(kernel=1, padding=0)[1].bias.detach())
        assert all(y.isfinite().all() for y in outputs)
        assert model[1].running_var.eq(1).all() and model[1].running_mean.isfinite().all()
        assert all(p.isfinite().all() for p in model.parameters())

    @pytest.mark.parametrize('burnin', [0, 100])
    @pytest.mark.parametrize('eps_in_sqrt', [True, False])
    def test_constant_channels_have_finite_outputs_and_gradients(self, burnin, eps_in_sqrt):
        model = conv_cbn(kernel=1, padding=0, burnin=burnin, eps_in_sqrt=eps_in_sqrt)
        bias = model[1].bias.detach().clone().view(-1, 1, 1)
        outputs = train(model, [torch.full((2, 4, 5, 6), value) for value in (1.5, 1.5, 0.0, 1.5)])
        torch.testing.assert_close(outputs[0], bias.expand_as(outputs[0]))
        assert all(y.isfinite().all() for y in outputs) and all(p.isfinite().all() for p in model.parameters())

    def test_channels_last_and_strided_inputs_give_the_same_result_in_their_layout(self):
        plain, last = conv_cbn(), conv_cbn().to(memory_format=torch.channels_last)
        data = batches(5)
        expected = train(plain, data)
        actual = train(last, [x.contiguous(memory_format=torch.channels_last) for x in data])
        assert_same_run(expected, actual, plain, last, exact=False)
        assert actual[-1].is_contiguous(memory_format=torch.channels_last)
        strided = conv_cbn()
        actual = train(strided, [x.transpose(2, 3).contiguous().transpose(2, 3) for x in data])
        assert_same_run(expected, actual, plain, strided, exact=False)
        assert expected[-1].is_contiguous()

    def test_a_strided_upstream_gradient_is_understood(self):
        grads = []
        for layout in (lambda g: g, lambda g: g.transpose(2, 3).contiguous().transpose(2, 3)):
            model, x = conv_cbn(burnin=0), batches(1)[0]
            y = model(x)
            y.backward(layout(torch.linspace(-1, 1, y.numel()).view(y.shape).square()))
            grads.append(model[0].weight.grad)
        torch.testing.assert_close(*grads)

    def test_a_module_shared_by_two_maps_counts_both_and_equals_the_reference(self):
        conv, layer = nn.Conv2d(4, 6, 3).double(), CBN(6, burnin=2).double()
        reference = Reference(layer, burnin=2)
        for large, small in zip(batches(4, dtype=torch.float64), batches(4, size=4, seed=3, dtype=torch.float64)):
            ours = [layer(conv(x)) for x in (large, small)]
            theirs = [reference(conv(x), conv.weight) for x in (large, small)]
            grads = [torch.autograd.grad(sum(y.pow(3).sum() for y in ys), conv.weight)[0] for ys in (ours, theirs)]
            assert all(relative(a, b) < 1e-11 for a, b in zip(ours, theirs)) and relative(*grads) < 1e-10
        assert layer.iter_count == 8

    def test_an_iteration_with_one_bad_channel_is_remembered_for_none(self):
        bad, short = (conv_cbn(4, 4, conv=dict(groups=4), burnin=0, rho=0.0, buffer_num=rows) for rows in (3, 2))
        for step, x in enumerate(batches(3)):
            if step == 1:
                x[0, 0, 0, 0] = float('nan')
            else:
                short(x)
            bad(x)
        x = batches(1, seed=9)[0]
        torch.testing.assert_close(bad(x), short(x))

    def test_gradient_accumulation_counts_micro_batches_and_compensates_nothing(self):
        model, uncorrected = conv_cbn(burnin=0), conv_cbn(burnin=0, rho=0.0)
        for x in batches(4):
            ours, theirs = model(x), uncorrected(x)
            ours.square().sum().backward(), theirs.square().sum().backward()
        torch.testing.assert_close(ours, theirs)  # the weights did not move
        assert model[1]._history.length == 3

    @pytest.mark.parametrize('reentrant', [True, False])
    @pytest.mark.parametrize('burnin', [0, 3])
    def test_unlinked_models_under_checkpointing_are_told_to_link(self, reentrant, burnin):
        model = conv_cbn(burnin=burnin)
        with pytest.raises(RuntimeError, match=r'checkpointing.*link_convs\(model\) before training'):
            checkpoint(model, batches(1)[0].requires_grad_(), use_reentrant=reentrant)

    @pytest.mark.parametrize('reentrant', [True, False])
    def test_checkpointing_the_norm_alone_needs_no_link(self, reentrant):
        plain, saved = conv_cbn(), conv_cbn()
        expected = train(plain, batches(5))
        actual = train(saved, batches(5), run=lambda x: checkpoint(saved[1], saved[0](x), use_reentrant=reentrant))
        assert_same_run(expected, actual, plain, saved)

    def test_saved_tensors_on_the_host_are_no_obstacle(self):
        plain, offloaded = conv_cbn(), conv_cbn()

        def run(x):
            with torch.autograd.graph.save_on_cpu():
                return offloaded(x)

        assert_same_run(train(plain, batches(4)), train(offloaded, batches(4), run=run), plain, offloaded)

    def test_norm_eval_of_a_backbone_does_not_reach_it_but_eval_does(self):
        model = conv_cbn()
        for module in model.modules():  # what mmdet's norm_eval does
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        assert model[1].training
        model[1].eval()
        before = model[1].running_mean.clone()
        train(model, batches(3))
        assert torch.equal(before, model[1].running_mean) and model[1]._history is None

    def test_conv_bn_fusion_of_mmcv_leaves_it_alone(self):
        from mmcv.cnn import fuse_conv_bn

        module = ConvModule(4, 6, 3, norm_cfg=dict(type=CBN)).eval()
        module.bn.running_mean.normal_(), module.bn.running_var.uniform_(0.5, 2)
        x = batches(1)[0]
        expected = copy.deepcopy(module)(x)
        torch.testing.assert_close(fuse_conv_bn(module)(x), expected)


class TestBadArguments:
    @pytest.mark.parametrize(
        'key, value',
        [
            ('burnin', -1),
            ('burnin', 1.5),
            ('burnin', 'e'),
            ('burnin', '8'),
            ('burnin', '-1e'),
            ('burnin', True),
            ('burnin', None),
            ('buffer_num', -1),
            ('buffer_num', 1.0),
            ('rho', -0.5),
            ('rho', '1'),
            ('eps', 0),
            ('momentum', 1.5),
            ('momentum', None),
        ],
    )
    def test_a_value_out_of_range_is_named(self, key, value):
        with pytest.raises(ValueError, match=f"norm_cfg.*'CBN'.*{key}={value!r}"):
            CBN(4, **{key: value})

    def test_an_unknown_key_is_named_with_the_valid_ones(self):
        with pytest.raises(TypeError, match=r"unknown key burn_in=5 \(did you mean 'burnin'\?\).*momentum"):
            CBN(4, burn_in=5)

    @pytest.mark.parametrize('shape', [(2, 5, 3, 3), (2, 4), (4, 3, 3)])
    def test_an_input_of_another_shape_is_named(self, shape):
        with pytest.raises(ValueError, match=r'CBN\(4\) got an input of shape .*must be \(N, 4, H, W\)'):
            CBN(4)(torch.randn(shape))
