"""AN against its reference in float64, the published numbers, and the states a layer lives through."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from mmcv.cnn import ConvModule, build_norm_layer, fuse_conv_bn
from mmengine.model import revert_sync_batchnorm
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval_for_single_model
from torch import nn
from torch.fx.experimental.optimization import fuse as fx_fuse
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from helpers.choice import full
from mmdet_norms.layers import an
from mmdet_norms.layers.an import AN
from mmdet_norms.reference import ReferenceAN

ROOT = Path(__file__).resolve().parents[2]
BOTH = pytest.mark.parametrize('norm', ['BN', 'GN'])


def by_reference(layer, x):
    """y by the reference. Where the published layer fails or yields nan: as :class:`AN` documents."""
    reference = ReferenceAN(layer.num_features, layer.norm, layer.k, layer.num_groups, layer.eps).double()
    reference.load_state_dict(layer.state_dict())
    reference.train(layer.training)
    if len(x) == 1:
        reference.attention_weights.eval()
    if x.numel() == x.shape[1]:
        reference.eval()
    if x.shape[2:] == (1, 1):  # whose variance is 0, as that of four equal pixels
        return reference(x.expand(-1, -1, 2, 2))[..., :1, :1]
    return reference(x)


def random_an(norm='BN', channels=4, k=3, num_groups=2, dtype=torch.float64, seed=0, **kwargs):
    torch.manual_seed(seed)
    layer = AN(channels, norm, k, num_groups, **kwargs).to(dtype)
    for batch_norm in batch_norms(layer):
        batch_norm.running_mean.normal_()
        batch_norm.running_var.uniform_(0.5, 2)
        if batch_norm.affine:
            nn.init.normal_(batch_norm.weight), nn.init.normal_(batch_norm.bias)
    return layer


def batch_norms(module):
    return [m for m in module.modules() if isinstance(m, _BatchNorm)]


def statistics(layer):
    return {name: value.clone() for name, value in layer.named_buffers()}


def assert_same_state(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key


def plain_norm(norm, channels=4, num_groups=2, dtype=torch.float32):
    plain = nn.BatchNorm2d(channels) if norm == 'BN' else nn.GroupNorm(num_groups, channels)
    nn.init.normal_(plain.weight), nn.init.normal_(plain.bias)
    if norm == 'BN':
        plain.running_mean.normal_(), plain.running_var.uniform_(0.5, 2)
    return plain.to(dtype)


def attention_keys(norm):
    base = 'attention_weights.attention.'
    if norm == 'GN':
        return {base + '0.weight', base + '0.bias'}
    names = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
    return {base + '0.weight', *(f'{base}1.{name}' for name in names)}


def published_keys(norm):
    own = {'weight_', 'bias_'} | attention_keys(norm)
    return own | {'running_mean', 'running_var', 'num_batches_tracked'} if norm == 'BN' else own


class TestMaths:
    @BOTH
    @pytest.mark.parametrize('k', [1, 5, 10, 20])
    @pytest.mark.parametrize('training', [True, False])
    def test_forward_equals_the_formula_written_out(self, norm, k, training):
        layer = random_an(norm, k=k).train(training)
        x = torch.randn(3, 4, 5, 4, dtype=torch.float64) * 3 + 1
        lam = copy.deepcopy(layer).attention_weights(x)
        assert ((lam == 0) | (lam == 1)).sum() < lam.numel()  # some gates are open
        expected = by_reference(layer, x)
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)

    @BOTH
    @pytest.mark.parametrize('shape', [(1, 4, 3, 3), (2, 4, 1, 1), (1, 4, 1, 1), (2, 4, 1, 3)])
    @pytest.mark.parametrize('training', [True, False])
    def test_one_instance_and_single_pixels_follow_the_documented_formula(self, norm, shape, training):
        layer = random_an(norm).train(training)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        expected = by_reference(layer, x.detach())
        y = layer(x)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        y.square().sum().backward()
        assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())

    def test_a_group_of_one_value_is_normalized_to_zero(self):
        layer = random_an('GN', num_groups=4)
        y = layer(torch.randn(1, 4, 1, 1, dtype=torch.float64, requires_grad=True))
        y.sum().backward()
        assert y.isfinite().all() and layer.weight_.grad.abs().max() == 0 and layer.bias_.grad.abs().max() > 0

    @BOTH
    @pytest.mark.parametrize('shape', [(3, 2, 3, 2), (1, 2, 2, 2), (2, 2, 1, 1)])
    @pytest.mark.parametrize('training', [True, False])
    def test_gradients_are_those_of_the_formula(self, norm, shape, training):
        layer = random_an(norm, 2, k=2, num_groups=1).train(training)
        names, values = zip(*layer.named_parameters())
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

        def run(x, *values):
            return torch.func.functional_call(copy.deepcopy(layer), dict(zip(names, values)), (x,))

        assert torch.autograd.gradcheck(run, (x, *(v.detach().clone().requires_grad_() for v in values)))

    @pytest.mark.parametrize('name', ['anbn_m2_C8_k2', 'anbn_m2_C16_k5', 'angn_G4_C8_k3', 'angn_G8_C16_k10'])
    def test_outputs_gradients_and_statistics_equal_the_published_layer(self, name, golden):
        data = golden(f'an/{name}.npz')
        norm = 'BN' if 'bn_' in name else 'GN'
        for mode in ('train', 'eval'):
            layer = AN(data['x'].shape[1], norm, int(data['k']), int(data.get('num_groups', 32))).double()
            layer.load_state_dict(golden_state(data), strict=True)
            layer.train(mode == 'train')
            lam = copy.deepcopy(layer).attention_weights(torch.from_numpy(data['x']))
            close(lam.flatten(1), data[f'{mode}.lam'], 'lam')
            compare_with_golden(layer, data, mode)

    def test_a_bottleneck_with_an_on_its_second_norm_equals_the_published_one(self, golden):
        """mmdet's own block, and the published names of its entries as they are."""
        from mmdet.models.backbones.resnet import Bottleneck

        data = golden('an/bottleneck_an_id.npz')
        for mode in ('train', 'eval'):
            block = Bottleneck(data['x'].shape[1], int(data['planes']))
            name, layer = build_norm_layer(dict(type=AN, k=int(data['k'])), int(data['planes']), postfix=2)
            assert name == 'bn2'
            block.bn2 = layer
            block.double().load_state_dict(golden_state(data), strict=True)
            compare_with_golden(block.train(mode == 'train'), data, mode)

    @BOTH
    def test_nothing_depends_on_other_instances_in_eval_mode(self, norm):
        layer = random_an(norm).eval()
        x = torch.randn(4, 4, 5, 5, dtype=torch.float64)
        torch.testing.assert_close(layer(x)[1:2], layer(x[1:2]))

    def test_both_batch_norms_update_their_running_statistics_with_torchs_rule(self):
        layer = random_an(momentum=0.3)
        outer, inner = copy.deepcopy(layer.bn), copy.deepcopy(layer.attention_weights.attention[1])
        x = torch.randn(3, 4, 5, 5, dtype=torch.float64) + 2
        layer(x), outer(x)
        d = x.mean((2, 3), keepdim=True) / (x.var((2, 3), keepdim=True) + 1e-3).sqrt()
        inner(layer.attention_weights.attention[0](d))
        torch.testing.assert_close(statistics(layer.bn), statistics(outer))
        torch.testing.assert_close(statistics(layer.attention_weights.attention[1]), statistics(inner))


def golden_state(data):
    return {k[len('sd.') :]: torch.from_numpy(np.array(data[k])) for k in data if k.startswith('sd.')}


def close(actual, expected, key):
    expected = torch.from_numpy(np.asarray(expected))
    scale = expected.abs().max().clamp(min=1e-30)
    assert actual.shape == expected.shape, key
    assert (actual - expected).abs().max() <= 1e-10 * scale, key


def compare_with_golden(module, data, mode):
    x = torch.from_numpy(data['x']).requires_grad_()
    y = module(x)
    y.backward(torch.from_numpy(data['gy']))
    close(y, data[f'{mode}.y'], 'y')
    close(x.grad, data[f'{mode}.gx'], 'gx')
    for name, parameter in module.named_parameters():
        close(parameter.grad, data[f'{mode}.g.{name}'], name)
    state = module.state_dict()
    for key in data:
        if mode == 'train' and key.startswith('after.'):
            close(state[key[len('after.') :]].double(), data[key], key)


class TestStateDict:
    @BOTH
    def test_saves_the_published_keys(self, norm):
        assert set(random_an(norm).state_dict()) == published_keys(norm)
        assert set(nn.Sequential(random_an(norm)).state_dict()) == {f'0.{key}' for key in published_keys(norm)}

    @BOTH
    def test_parameters_are_in_the_published_order_and_shapes(self, norm):
        shapes = [(name, tuple(p.shape)) for name, p in AN(64, norm, 10).named_parameters()]
        last = '0.bias' if norm == 'GN' else '1.weight'
        assert shapes[:4] == [
            ('weight_', (10, 64)),
            ('bias_', (10, 64)),
            ('attention_weights.attention.0.weight', (10, 64, 1, 1)),
            (f'attention_weights.attention.{last}', (10,)),
        ]
        count = sum(p.numel() for p in AN(256, norm, 20).parameters())
        assert count == 3 * 20 * 256 + (20 if norm == 'GN' else 40)

    @BOTH
    def test_half_precision_checkpoints_load_into_a_full_precision_layer(self, norm):
        source, target = random_an(norm, dtype=torch.float16), random_an(norm, dtype=torch.float32, seed=1)
        target.load_state_dict(source.state_dict(), strict=True)
        torch.testing.assert_close(target.weight_, source.weight_.float())
        assert target.weight_.dtype == torch.float32

    @BOTH
    @pytest.mark.parametrize('k', [1, 10, 20])
    def test_a_plain_norm_checkpoint_gives_the_identical_function(self, norm, k):
        plain, layer = plain_norm(norm, dtype=torch.float64), random_an(norm, k=k)
        holder = nn.Sequential(layer)
        holder.load_state_dict(nn.Sequential(plain).state_dict())
        x = torch.randn(3, 4, 6, 5, dtype=torch.float64) * 3 + 1
        for training in (False, True):
            y, expected = layer.train(training)(x), plain.train(training)(x)
            torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)

    @BOTH
    def test_components_of_a_loaded_plain_norm_can_grow_apart(self, norm):
        layer = random_an(norm, k=3)
        layer.load_state_dict(plain_norm(norm, dtype=torch.float64).state_dict(), strict=False)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1e-4)
        x = torch.randn(4, 4, 5, 5, dtype=torch.float64) + torch.randn(4, 4, 1, 1, dtype=torch.float64)
        target = torch.randn(4, 4, 5, 5, dtype=torch.float64) * torch.randn(4, 1, 1, 1, dtype=torch.float64)
        for _ in range(3):
            optimizer.zero_grad()
            (layer(x) - target).square().sum().backward()
            optimizer.step()
        lam = layer.attention_weights(x).flatten(1)
        assert lam.std(dim=1).min() > 1e-5 and lam.std(dim=0).min() > 1e-5

    def test_a_plain_norm_leaves_an_attention_that_the_checkpoint_holds_alone(self):
        layer = random_an(dtype=torch.float32)
        state = plain_norm('BN').state_dict()
        state |= {key: value for key, value in layer.state_dict().items() if key.startswith('attention_weights')}
        before = layer.attention_weights.attention[1].weight.clone()
        layer.load_state_dict(state, strict=True)
        assert torch.equal(layer.attention_weights.attention[1].weight, before)

    @BOTH
    def test_a_plain_norm_of_the_wrong_width_is_one_clear_error(self, norm):
        with pytest.raises(RuntimeError, match=r'size mismatch for 0.weight.*\(4,\).*0.weight_.*has \(6,\)'):
            state = {f'0.{key}': value for key, value in plain_norm(norm).state_dict().items()}
            nn.Sequential(AN(4, norm, 3, 2)).load_state_dict(state | {'0.weight': torch.ones(6)}, strict=False)

    def test_missing_keys_are_reported_by_their_published_names(self):
        report = nn.Sequential(AN(4)).load_state_dict({}, strict=False)
        assert set(report.missing_keys) >= {'0.running_mean', '0.running_var', '0.weight_', '0.bias_'}
        assert not any('.bn.' in key for key in report.missing_keys)
        with pytest.raises(RuntimeError, match='running_mean'):
            nn.Sequential(AN(4)).load_state_dict({}, strict=True)


@BOTH
class TestGenericTools:
    """Each of these silently breaks a layer that subclasses BatchNorm."""

    def block(self, norm):
        """AN between convolutions, with a batch norm behind the last: what fusion may mistake."""
        torch.manual_seed(1)
        last = plain_norm('BN', 3)
        return nn.Sequential(nn.Conv2d(2, 4, 1), random_an(norm, dtype=torch.float32), nn.Conv2d(4, 3, 1), last).eval()

    def assert_same_function(self, norm, tool):
        before, x = self.block(norm), torch.randn(2, 2, 7, 7)
        expected = copy.deepcopy(before)(x)
        torch.testing.assert_close(tool(before)(x), expected, rtol=1e-4, atol=1e-5)

    def test_sync_bn_conversion_and_back_is_the_identity(self, norm):
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(self.block(norm))[1]
        assert isinstance(converted, AN) and set(converted.state_dict()) == published_keys(norm)
        assert all(isinstance(m, nn.SyncBatchNorm) for m in batch_norms(converted))
        assert len(batch_norms(converted)) == (2 if norm == 'BN' else 0)
        self.assert_same_function(norm, nn.SyncBatchNorm.convert_sync_batchnorm)
        self.assert_same_function(norm, lambda m: revert_sync_batchnorm(nn.SyncBatchNorm.convert_sync_batchnorm(m)))

    @pytest.mark.parametrize('shape', [(3, 4, 5, 5), (1, 4, 5, 5), (0, 4, 5, 5)])
    def test_a_converted_layer_trains_the_same_in_one_process(self, norm, shape):
        layer = random_an(norm, dtype=torch.float32)
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(layer))
        reverted = revert_sync_batchnorm(copy.deepcopy(converted))
        x = torch.randn(shape)
        expected = layer(x)
        for other in (converted, reverted):
            torch.testing.assert_close(other(x), expected)
            torch.testing.assert_close(statistics(other), statistics(layer))

    def test_mmcv_conv_bn_fusion_keeps_the_function(self, norm):
        self.assert_same_function(norm, fuse_conv_bn)
        fused = fuse_conv_bn(self.block(norm))
        # The logit norm is folded away (exactly), the norm of x has no convolution of its own to go to.
        assert len(batch_norms(fused[1])) == (1 if norm == 'BN' else 0)

    def test_fx_conv_bn_fusion_keeps_the_function(self, norm):
        self.assert_same_function(norm, fx_fuse)

    def test_torch_conv_bn_fusion_of_the_attention_keeps_the_function(self, norm):
        def fuse(model):
            attention = model[1].attention_weights
            if norm == 'BN':
                fused = torch.nn.utils.fusion.fuse_conv_bn_eval(*attention.attention)
                attention.attention = nn.Sequential(fused)
            return model

        self.assert_same_function(norm, fuse)

    def test_efficient_conv_bn_eval_of_mmengine_keeps_the_function(self, norm):
        def turn_on(model):
            turn_on_efficient_conv_bn_eval_for_single_model(model)
            return model

        self.assert_same_function(norm, turn_on)

    @pytest.mark.parametrize('training', [True, False])
    def test_efficient_conv_bn_eval_of_conv_module_keeps_the_function(self, norm, training):
        norm_cfg = dict(type=AN, norm=norm, k=3, num_groups=2)
        plain = ConvModule(2, 4, 1, norm_cfg=norm_cfg).train(training)
        tuned = ConvModule(2, 4, 1, norm_cfg=norm_cfg, efficient_conv_bn_eval=True).train(training)
        tuned.load_state_dict(plain.state_dict())
        x = torch.randn(2, 2, 6, 6)
        torch.testing.assert_close(tuned(x), plain(x))

    def test_precise_bn_re_estimates_the_statistics_it_finds(self, norm):
        """The recipe of PreciseBN hooks: momentum 1, average the batch statistics of the norms found."""
        layer = random_an(norm, dtype=torch.float32).train()
        found = batch_norms(layer)
        assert len(found) == (2 if norm == 'BN' else 0) and all(m.track_running_stats for m in found)
        batches = [torch.randn(3, 4, 5, 5) * 3 + 1 for _ in range(3)]
        sums = [torch.zeros_like(m.running_mean) for m in found]
        for m in found:
            m.momentum = 1.0
        for batch in batches:
            layer(batch)
            sums = [total + m.running_mean for total, m in zip(sums, found)]
        if norm == 'BN':
            torch.testing.assert_close(sums[0] / 3, torch.cat(batches).mean((0, 2, 3)))
            logits = [layer.attention_weights.attention[0](describe(batch)) for batch in batches]
            torch.testing.assert_close(sums[1] / 3, torch.cat(logits).mean((0, 2, 3)))


def describe(x):
    return x.mean((2, 3), keepdim=True) / (x.var((2, 3), keepdim=True) + 1e-3).sqrt()


@BOTH
class TestFewPasses:
    """In eager mode a few passes over the map compute what the formula, written in torch's operators, computes."""

    def results(self, layer, x, grad):
        x = x.detach().requires_grad_()
        y = layer(x)
        parameters = list(layer.parameters())
        return [y, *torch.autograd.grad(y, [x, *parameters], grad), *statistics(layer).values()]

    @pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize('mode', ['training', 'norm_eval', 'eval'])
    @pytest.mark.parametrize('shape', [(3, 4, 5, 6), (1, 4, 5, 6), (3, 4, 1, 1), (1, 4, 1, 1)])
    def test_both_ways_give_the_same_output_gradients_and_state(self, norm, shape, mode, layout, monkeypatch):
        layer = random_an(norm).train(mode != 'eval')
        for module in batch_norms(layer):
            module.train(mode == 'training')
        x, grad = torch.randn(2, *shape, dtype=torch.float64)
        x = x.contiguous(memory_format=layout)
        calls = count_calls(monkeypatch)
        ours = self.results(copy.deepcopy(layer), x, grad)
        assert calls == [shape]
        monkeypatch.setattr('mmdet_norms.layers.an.is_supported', lambda x: False)
        for a, b in zip(ours, self.results(layer, x, grad)):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert calls == [shape]

    def test_the_gradient_can_be_differentiated_again(self, norm):
        layer, x = random_an(norm, channels=2, k=2), torch.randn(2, 2, 2, 3, dtype=torch.float64, requires_grad=True)

        def function(x, weight, bias):
            return torch.func.functional_call(copy.deepcopy(layer), {'weight_': weight, 'bias_': bias}, (x,))

        inputs = x, layer.weight_, layer.bias_
        once, again = (
            torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=graph) for graph in (False, True)
        )
        torch.testing.assert_close(again, once)
        assert torch.autograd.gradgradcheck(function, inputs)

    def test_frozen_parameters_or_input_leave_the_other_gradients_as_they_are(self, norm):
        layer, x = random_an(norm), torch.randn(3, 4, 5, 5, dtype=torch.float64)
        _, of_x, *of_parameters = self.results(copy.deepcopy(layer), x, torch.ones_like(x))
        frozen, leaf = copy.deepcopy(layer).requires_grad_(False), x.clone().requires_grad_()
        frozen(leaf).backward(torch.ones_like(x))
        torch.testing.assert_close(leaf.grad, of_x)
        layer(x).backward(torch.ones_like(x))
        for ours, expected in zip(layer.parameters(), of_parameters):
            torch.testing.assert_close(ours.grad, expected)

    def test_it_saves_the_input_and_vectors_only(self, norm):
        layer, x, saved = random_an(norm, dtype=torch.float32), torch.randn(2, 4, 20, 30, requires_grad=True), {}

        def pack(tensor):
            return saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = layer(x)
        saved.pop(x.untyped_storage().data_ptr())
        assert y.requires_grad and saved and all(t.untyped_storage().nbytes() < 4 * 20 * 30 for t in saved.values())

    def test_children_that_were_replaced_or_are_watched_are_called(self, norm, monkeypatch):
        layer, seen = random_an(norm), []
        for name in dict(layer.named_children()):
            watched = copy.deepcopy(layer)
            watched.get_submodule(name).register_forward_hook(lambda *args, name=name: seen.append(name))
            watched(torch.randn(2, 4, 5, 5, dtype=torch.float64))
            assert seen.pop() == name
        calls = count_calls(monkeypatch)
        for prepare in (nn.SyncBatchNorm.convert_sync_batchnorm, torch.fx.symbolic_trace):
            prepare(copy.deepcopy(layer)).eval()(torch.randn(2, 4, 5, 5, dtype=torch.float64))
        # what replaces batch norms finds none within a group norm's layer, as long as it is not traced
        assert len(calls) == (norm == 'GN')


def count_calls(monkeypatch):
    calls, real = [], an.ImageGroups
    monkeypatch.setattr(an, 'ImageGroups', lambda x: (calls.append(tuple(x.shape)), real(x))[1])
    return calls


@BOTH
class TestInit:
    def test_a_new_layer_is_drawn_as_published(self, norm):
        torch.manual_seed(0)
        layer = AN(512, norm, 20)
        assert abs(layer.weight_.mean() - 1) < 0.01 and abs(layer.weight_.std() - 0.1) < 0.005
        assert abs(layer.bias_.mean()) < 0.01 and abs(layer.bias_.std() - 0.1) < 0.005
        conv, *rest = layer.attention_weights.attention
        if norm == 'BN':
            assert conv.bias is None and abs(conv.weight.std() - (2 / 20) ** 0.5) < 0.01
            assert (rest[0].weight == 1).all() and (rest[0].bias == 0).all()
        else:
            assert conv.weight.abs().max() <= 512**-0.5 and conv.bias.abs().max() <= 512**-0.5 and not rest
        y = layer(torch.randn(4, 512, 8, 8))
        assert 8 < y.std() < 12  # about k / 2

    def test_a_resnets_init_rules_give_the_published_backbone_init(self, norm):
        from mmengine.model import Sequential

        rules = [dict(type='Kaiming', layer='Conv2d'), dict(type='Constant', val=1, layer=['_BatchNorm', 'GroupNorm'])]
        model = Sequential(nn.Conv2d(2, 256, 1), AN(256, norm, 20), init_cfg=rules)
        mixture = copy.deepcopy([model[1].weight_, model[1].bias_])
        model.init_weights()
        assert torch.equal(model[1].weight_, mixture[0]) and torch.equal(model[1].bias_, mixture[1])
        conv, *rest = model[1].attention_weights.attention
        assert abs(conv.weight.std() - (2 / 20) ** 0.5) < 0.02
        assert all((m.weight == 1).all() and (m.bias == 0).all() for m in rest)

    def test_conv_module_leaves_the_layer_alone(self, norm):
        torch.manual_seed(0)
        module = ConvModule(2, 4, 1, norm_cfg=dict(type=AN, norm=norm, k=3, num_groups=2))
        before = copy.deepcopy(module.norm.state_dict())
        module.init_weights()
        assert_same_state(module.norm.state_dict(), before)
        assert module.norm.weight_.std() > 0


@BOTH
class TestSituations:
    @pytest.mark.parametrize('dtype, atol', [(torch.bfloat16, 0.1), (torch.float16, 0.015)])
    @pytest.mark.parametrize('autocast', [True, False])
    def test_half_inputs_keep_their_dtype_and_fp32_state_and_are_close(self, norm, dtype, atol, autocast):
        layer = random_an(norm, dtype=torch.float32)
        reference = copy.deepcopy(layer)
        low = (torch.randn(3, 4, 8, 8) + 1).to(dtype)
        expected = reference(low.float())
        low.requires_grad_()
        with torch.autocast('cpu', dtype=dtype, enabled=autocast):
            y, from_fp32 = layer(low), copy.deepcopy(reference).eval()(low.float())
            # The attention sees fp32 whatever the input's or autocast's dtype: equal to the last bits.
            lam = copy.deepcopy(reference).eval().attention_weights(low)
        y.float().square().mean().backward()
        assert y.dtype == dtype and from_fp32.dtype == torch.float32
        assert all(v.dtype in (torch.float32, torch.int64) for v in layer.state_dict().values())
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())
        assert low.grad.dtype == dtype and low.grad.isfinite().all()
        torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=atol)
        torch.testing.assert_close(from_fp32, copy.deepcopy(reference).eval()(low.detach().float()))
        if not autocast:  # called outside the layer, the attention alone is at autocast's mercy
            torch.testing.assert_close(lam, copy.deepcopy(reference).eval().attention_weights(low.float()))
        for ours, theirs in zip(layer.buffers(), reference.buffers()):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
    def test_a_whole_layer_in_half_precision_stays_finite(self, norm, dtype):
        layer = random_an(norm, dtype=torch.float32)
        half = copy.deepcopy(layer).to(dtype)
        x = torch.randn(3, 4, 6, 6) + 1
        torch.testing.assert_close(half.eval()(x.to(dtype)).float(), layer.eval()(x), rtol=0.1, atol=0.1)
        flat = torch.full((3, 4, 6, 6), 6e4, dtype=dtype)  # mean over deviation is 2e6, beyond fp16
        y = half.train()(flat)
        assert y.dtype == dtype and y.isfinite().all()

    def test_statistics_of_large_half_inputs_do_not_overflow(self, norm):
        layer = random_an(norm, 2, dtype=torch.float32, num_groups=1)
        y = layer((torch.randn(4, 2, 16, 16) * 300 + 1000).half())
        assert y.dtype == torch.half and y.isfinite().all()
        assert all(value.isfinite().all() for value in layer.state_dict().values())

    @pytest.mark.parametrize('training', [True, False])
    def test_an_empty_batch_passes_through_with_zero_gradients_and_no_change_of_state(self, norm, training, recwarn):
        layer = random_an(norm, dtype=torch.float32).train(training)
        before = copy.deepcopy(layer.state_dict())
        x = torch.zeros(0, 4, 6, 5, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.shape == x.grad.shape == (0, 4, 6, 5)
        assert_same_state(layer.state_dict(), before)
        assert all(p.grad.abs().max() == 0 for p in layer.parameters())
        assert not recwarn.list

    def test_one_training_instance_leaves_the_attention_statistics_alone(self, norm):
        layer = random_an(norm, dtype=torch.float32)
        before = statistics(layer.attention_weights)
        layer(torch.randn(1, 4, 6, 5))
        assert_same_state(statistics(layer.attention_weights), before)
        if norm == 'BN':
            counter = layer.bn.num_batches_tracked.clone()
            layer(torch.randn(1, 4, 1, 1))
            assert layer.bn.num_batches_tracked == counter == 1

    @pytest.mark.parametrize('training', [True, False])
    @pytest.mark.parametrize('value', [0, 5, -1e6, 1e10])
    def test_constant_channels_stay_finite(self, norm, training, value):
        layer = random_an(norm, dtype=torch.float32).train(training)
        x = torch.full((2, 4, 5, 5), float(value), requires_grad=True)
        y = layer(x)
        y.square().mean().backward()
        assert y.isfinite().all() and x.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in layer.parameters())
        assert all(v.isfinite().all() for v in layer.state_dict().values())

    @pytest.mark.parametrize('mean', [1e4, 1e6, -1e8])
    def test_huge_means_stay_finite(self, norm, mean):
        layer = random_an(norm, dtype=torch.float32)
        x = (torch.randn(3, 4, 6, 6) + mean).requires_grad_()
        y = layer(x)
        y.square().mean().backward()
        assert y.isfinite().all() and x.grad.isfinite().all()
        assert all(v.isfinite().all() for v in layer.state_dict().values())

    @pytest.mark.parametrize('mean', [1e4, -1e6])
    def test_huge_means_follow_the_formula_in_float64(self, norm, mean):
        layer = random_an(norm)
        x = torch.randn(3, 4, 6, 6, dtype=torch.float64) + mean
        expected = by_reference(layer, x)
        torch.testing.assert_close(layer(x), expected, rtol=1e-7, atol=1e-7)

    def test_norm_eval_freezes_statistics_while_parameters_train(self, norm):
        layer = random_an(norm, dtype=torch.float32).train()
        for module in batch_norms(layer):
            module.eval()
        before = statistics(layer)
        y = layer(torch.randn(2, 4, 6, 6))
        y.square().sum().backward()
        assert_same_state(statistics(layer), before)
        assert all(p.grad.abs().sum() > 0 for p in layer.parameters())

    @pytest.mark.parametrize('reentrant', [True, False])
    @pytest.mark.parametrize('shape', [(2, 4, 6, 6), (1, 4, 6, 6), (0, 4, 6, 6)])
    def test_activation_checkpointing_gives_the_same_output_gradients_and_statistics(self, norm, reentrant, shape):
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Conv2d(4, 4, 1), random_an(norm, dtype=torch.float32), nn.ReLU(), nn.Conv2d(4, 4, 1))
        saved = copy.deepcopy(plain)
        for _ in range(2):
            x1 = torch.randn(shape, requires_grad=True)
            x2 = x1.detach().clone().requires_grad_()
            y1, y2 = plain(x1), checkpoint(saved, x2, use_reentrant=reentrant)
            y1.square().sum().backward(), y2.square().sum().backward()
            assert torch.equal(y1, y2) and torch.equal(x1.grad, x2.grad)
        for ours, theirs in zip(saved.parameters(), plain.parameters()):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)
        assert_same_state(saved.state_dict(), plain.state_dict())
        assert all(m.track_running_stats for m in batch_norms(saved))

    def test_an_unusual_momentum_of_none_averages_over_all_batches(self, norm):
        layer = AN(4, norm, 3, 2, momentum=None)
        batches = [torch.randn(2, 4, 5, 5) + i for i in range(3)]
        for batch in batches:
            layer(batch)
        if norm == 'BN':
            torch.testing.assert_close(layer.bn.running_mean, torch.cat(batches).mean((0, 2, 3)))


class TestCompile:
    @pytest.mark.parametrize(
        'norm, backend, autocast',
        [
            ('BN', 'aot_eager', True),
            ('GN', 'aot_eager', True),
            pytest.param('BN', 'inductor', False, marks=pytest.mark.slow),
            pytest.param('GN', 'inductor', True, marks=pytest.mark.slow),
            full('BN', 'inductor', True),
            full('GN', 'inductor', False),
        ],
    )
    def test_compiled_training_equals_eager_without_graph_breaks(self, norm, backend, autocast):
        torch._dynamo.reset()
        # torch traces the backward pass under the forward's autocast: its small matmuls are in bf16, eager's in fp32.
        tolerance = 0.05 if autocast else 1e-5
        eager = random_an(norm, dtype=torch.float32)
        other = copy.deepcopy(eager)
        compiled = torch.compile(other, backend=backend, fullgraph=True)
        for _ in range(2):
            x1 = torch.randn(3, 4, 6, 6, requires_grad=True)
            x2 = x1.detach().clone().requires_grad_()
            with torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast):
                y1, y2 = eager(x1), compiled(x2)
            y1.square().sum().backward(), y2.square().sum().backward()
            torch.testing.assert_close(y1, y2, rtol=1e-4, atol=1e-5)
            assert (x1.grad - x2.grad).norm() <= tolerance * x1.grad.norm()
        for ours, theirs in zip(other.parameters(), eager.parameters()):
            assert (ours.grad - theirs.grad).norm() <= tolerance * theirs.grad.norm()
        for ours, theirs in zip(other.buffers(), eager.buffers()):
            torch.testing.assert_close(ours, theirs)


class TestBadArguments:
    @pytest.mark.parametrize('norm', ['LN', 'bn', None, 3, ['BN']])
    def test_an_unknown_norm_is_refused_with_the_choices(self, norm):
        with pytest.raises(ValueError, match=r"norm_cfg.*'AN': norm=.*'BN'.*'GN'"):
            AN(4, norm)

    @pytest.mark.parametrize('k', [0, -5, 2.0, '10', True, None])
    @BOTH
    def test_a_k_that_is_not_positive_is_refused(self, norm, k):
        with pytest.raises(ValueError, match=r"norm_cfg.*'AN': k=.*positive integer.*10 and 20"):
            AN(32, norm, k)

    @pytest.mark.parametrize('num_groups', [32, 5, 0, -4, 4.0, None])
    def test_groups_that_do_not_divide_the_channels_are_refused_with_the_divisors(self, num_groups):
        with pytest.raises(ValueError, match=r'num_groups=.* must divide the 12 channels.*1, 2, 3, 4, 6, 12'):
            AN(12, 'GN', num_groups=num_groups)

    def test_groups_are_not_looked_at_for_batch_norm(self):
        assert AN(12, 'BN').num_features == 12

    def test_an_unknown_key_is_named_with_the_valid_ones(self):
        with pytest.raises(TypeError, match=r"unknown key num_group=5 \(did you mean 'num_groups'\?\).*momentum"):
            AN(4, num_group=5)

    @pytest.mark.parametrize('key, value', [('eps', 0), ('eps', -1e-5), ('momentum', 1.5), ('momentum', 'x')])
    def test_a_number_out_of_range_is_named(self, key, value):
        with pytest.raises(ValueError, match=f'{key}={value!r}'):
            AN(4, **{key: value})
