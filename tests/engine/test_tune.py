"""Tune mode against the plain model: the same numbers, without the norm's feature maps."""

import copy
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmcv.cnn import ConvModule
from mmdet.models.layers import FrozenBatchNorm2d
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from torch import nn

from helpers import tiny, warm
from mmdet_norms import fuse
from mmdet_norms.benchmark.detectors import Detectors
from mmdet_norms.benchmark.groups import Setting
from mmdet_norms.benchmark.measure import owned_tensors, saved_bytes
from mmdet_norms.cli import train
from mmdet_norms.engine import TuneModeHook, tune_mode, undo_tune_mode
from mmdet_norms.layers import BNET, BRN, FrozenBN, GhostBN, SyncBN

BACKBONES = {
    'bn': dict(type='ResNet', norm_cfg=dict(type='BN')),
    'bnet': dict(type='NormResNet', norm_cfg=dict(type='BN'), norm_at=dict(last=dict(type='BNET', kernel_size=5))),
    'frozen': dict(type='ResNet', norm_cfg=dict(type='FrozenBN'), zero_init_residual=False),
}
CONVS = {
    'plain': lambda: nn.Conv2d(4, 6, 3, padding=1, bias=False),
    'biased': lambda: nn.Conv2d(4, 6, 3, padding=1),
    'grouped and dilated': lambda: nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2),
    'reflecting': lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode='reflect'),
    'transposed': lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
    'centred': lambda: ConvModule(4, 6, 3, conv_cfg=dict(type='CenConv')).conv,
    'padding by itself': lambda: ConvModule(4, 6, 3, stride=2, conv_cfg=dict(type='Conv2dAdaptivePadding')).conv,
}
NORMS = {
    'BN': nn.BatchNorm2d,
    'BN without affine': lambda channels: nn.BatchNorm2d(channels, affine=False),
    'SyncBN': SyncBN,
    'BRN': BRN,
    'GhostBN': GhostBN,
    'BRN norm_batch': lambda channels: BRN(channels, norm_batch=2),
    'FrozenBN': FrozenBN,
    "mmdet's FrozenBatchNorm2d": FrozenBatchNorm2d,
    'BNET': lambda channels: BNET(channels, 3),
}


def randomize(model):
    """No number of a norm at its default."""
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and (tensor.dim() == 1 or tensor.shape[1] == 1):  # kernels of a BNET are
                tensor.add_(torch.rand_like(tensor) * 0.4)
    return model


def norm_eval(model):
    """Training with fixed statistics, as a backbone with ``norm_eval=True`` does it."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


def gradients(model, x, loss=lambda y: (y * torch.arange(y.numel()).view(y.shape).to(y.dtype).cos()).sum()):
    """Output, and gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    y = model(x)
    loss(y).backward()
    return {'y': y.detach(), 'x': x.grad, **{name: p.grad.clone() for name, p in model.named_parameters()}}


def pair(conv='plain', norm='BN'):
    return norm_eval(randomize(nn.Sequential(CONVS[conv](), NORMS[norm](6), nn.ReLU())))


def both(model):
    """A plain copy, and the model in tune mode."""
    plain = copy.deepcopy(model)
    report = tune_mode(model)
    assert report.active, str(report)
    return plain, model


def backbone(name='bn', depth=18, **kwargs):
    torch.manual_seed(0)
    init_default_scope('mmdet')
    cfg = dict(BACKBONES[name], depth=depth, base_channels=8, norm_eval=True, frozen_stages=1)
    model = randomize(MODELS.build(dict(cfg, **kwargs)))
    model.train()
    return model


def features(model, x):
    return torch.cat([y.flatten(1) for y in model(x)], 1)


IMAGE = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(2))
X = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize('conv, norm', [*((conv, 'BN') for conv in CONVS), *(('biased', norm) for norm in NORMS)])
def test_outputs_and_all_gradients_are_those_of_convolution_and_norm(conv, norm):
    plain, tuned = both(pair(conv, norm).double())
    expected, calls = gradients(plain, X), []
    batch_norm = torch.nn.functional.batch_norm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, 'batch_norm', lambda *args: calls.append(args) or batch_norm(*args))
        torch.testing.assert_close(gradients(tuned, X), expected, rtol=1e-9, atol=1e-9)
    assert not calls


@pytest.mark.parametrize('kernel', ['compiled for CPUs', 'of torch'])
def test_a_bnet_keeps_its_borders(kernel, monkeypatch):
    """Zeros around the map are zeros in normalized space: the convolution must not pad what it has shifted."""
    if kernel == 'of torch':
        monkeypatch.setattr('mmdet_norms.engine.tuned_modules.normalize_and_convolve', lambda *args: None)
    plain, tuned = both(pair('biased', 'BNET').double())
    torch.testing.assert_close(gradients(tuned, X), gradients(plain, X), rtol=1e-9, atol=1e-9)


def test_a_zero_weight_of_the_norm_gets_its_gradient():
    model = pair().double()
    model[2] = nn.Identity()
    nn.init.zeros_(model[1].weight)
    plain, tuned = both(model)
    expected = gradients(plain, X)
    assert expected['1.weight'].abs().min() > 0
    torch.testing.assert_close(gradients(tuned, X), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('how', ['autocast', 'half'])
def test_in_bfloat16_results_are_as_near_to_the_truth_as_the_plain_ones(how):
    model = pair()
    model[1].running_var.uniform_(1e-4, 1e-2)
    truth = gradients(copy.deepcopy(model).double(), X)
    if how == 'half':
        model = model.bfloat16()
    x = X.to(model[0].weight.dtype)
    plain, tuned = both(model)
    results = []
    for candidate in (plain, tuned):
        with torch.autocast('cpu', torch.bfloat16, enabled=how == 'autocast'):
            results.append(gradients(candidate, x))
    assert results[1]['y'].dtype == results[0]['y'].dtype == torch.bfloat16
    assert results[1]['0.weight'].dtype == model[0].weight.dtype
    for name, exact in truth.items():
        errors = [float((result[name].double() - exact).norm() / exact.norm()) for result in results]
        assert errors[1] < max(1.5 * errors[0], 0.01), (name, errors)


@pytest.mark.parametrize('how', ['autocast', 'half'])
def test_the_weight_is_multiplied_in_full_precision_and_rounded_once(how):
    torch.manual_seed(0)
    model = norm_eval(nn.Sequential(nn.Conv2d(1, 256, 1, bias=False), nn.BatchNorm2d(256, eps=0, affine=False)))
    model[1].running_var.uniform_(0.5, 2)
    if how == 'half':
        model = model.bfloat16()
    product = model[0].weight.flatten().float() / model[1].running_var.float().sqrt()
    tune_mode(model)
    with torch.autocast('cpu', torch.bfloat16, enabled=how == 'autocast'):
        y = model(torch.ones(1, 1, 1, 1, dtype=model[0].weight.dtype)).flatten()
    torch.testing.assert_close(y, product.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize('name', BACKBONES)
def test_several_optimizer_steps_of_a_detector_are_the_same(name):
    cfg = Config.fromstring(tiny.CONFIG.replace('{root}', 'none'), '.py').model
    stages = dict(depth=18, base_channels=8, num_stages=4, out_indices=(0, 1, 2, 3), norm_eval=True, frozen_stages=1)
    cfg.backbone = dict(BACKBONES[name], **stages)
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(cfg)
    with torch.no_grad():
        for key, buffer in model.backbone.named_buffers():
            if key.endswith('running_var'):
                buffer.uniform_(0.5, 2)
    histories = []
    for candidate in both(model):
        candidate.train()
        optimizer = torch.optim.SGD((p for p in candidate.parameters() if p.requires_grad), lr=0.01, momentum=0.9)
        history = {}
        for step in range(3):
            torch.manual_seed(step)
            np.random.seed(step)
            data = demo_mm_inputs(2, (3, 64, 96), [3, 3], num_classes=2, with_mask=True, use_box_type=True)
            losses = candidate.parse_losses(candidate(**candidate.data_preprocessor(data, True), mode='loss'))[1]
            optimizer.zero_grad()
            losses['loss'].backward()
            optimizer.step()
            history.update({f'{step} {key}': value.detach() for key, value in losses.items()})
            grads = {key: p.grad for key, p in candidate.named_parameters() if p.grad is not None}
            history.update({f'{step} grad {key}': grad.clone() for key, grad in grads.items()})
        history.update({f'after {key}': value.clone() for key, value in candidate.state_dict().items()})
        histories.append(history)
    plain, tuned = histories
    assert plain.keys() == tuned.keys() and '2 grad backbone.layer2.0.conv1.weight' in plain
    for key, value in plain.items():
        scale = float(value.abs().max()) if value.is_floating_point() else 1
        torch.testing.assert_close(tuned[key], value, rtol=1e-4, atol=2e-5 * scale, msg=lambda m, k=key: f'{k}: {m}')
    assert any(not torch.equal(tuned[key], value) for key, value in plain.items())  # it did compute something else


def test_nothing_of_the_norms_is_saved_for_the_backward_pass():
    model = backbone(frozen_stages=-1)
    kept = []  # what batch norm keeps: its inputs
    hooks = [
        m.register_forward_hook(lambda _, args, y: kept.append(y.nbytes))
        for m in model.modules()
        if isinstance(m, nn.Conv2d)
    ]
    image = torch.randn(2, 3, 128, 128)
    before = saved_bytes(lambda: model(image), owned_tensors(model))
    for hook in hooks:
        hook.remove()
    tune_mode(model)
    after = saved_bytes(lambda: model(image), owned_tensors(model))
    assert after < before - 0.99 * sum(kept) < 0.7 * before


# ------------------------------------------------------------------------------------------------- when it applies


def test_batch_statistics_are_left_alone_until_they_are_frozen():
    plain, model = (backbone(norm_eval=False, frozen_stages=-1) for _ in range(2))
    report = tune_mode(model)
    assert report.active == [] and len(report.pairs) == 20
    assert 'which uses batch statistics' in str(report)
    model.train()
    assert torch.equal(features(model, IMAGE), features(plain, IMAGE))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers()))
    for candidate in (plain, model):
        candidate.norm_eval = True
        candidate.train()
    expected, result = features(plain, IMAGE).detach(), features(model, IMAGE)
    assert not torch.equal(result, expected)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_eval_mode_is_bit_by_bit_that_of_the_plain_model():
    plain, tuned = both(backbone('bnet'))
    assert not torch.equal(features(tuned, IMAGE), features(plain, IMAGE))
    assert torch.equal(features(tuned.eval(), IMAGE), features(plain.eval(), IMAGE))


def test_frozen_stages_are_covered_too():
    model = backbone(norm_eval=False, frozen_stages=2)
    assert set(tune_mode(model).active) == {
        name for name, m in model.named_modules()
        if isinstance(m, nn.BatchNorm2d) and name.startswith(('bn1', 'layer1', 'layer2'))
    }  # fmt: skip
    plain = copy.deepcopy(model)
    for candidate in (plain, model):
        candidate.train()
    expected = features(plain, IMAGE).detach()
    torch.testing.assert_close(features(model, IMAGE), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_names_values_and_modes_stay_and_undoing_gives_the_plain_model_back():
    model = backbone('bnet').eval()
    model.layer2.train()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    types, text = [type(m) for m in model.modules()], repr(model)
    tune_mode(model)
    assert list(model.state_dict()) == list(before) and repr(model) == text
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [type(m) for m in model.modules()] != types
    tune_mode(model)  # again, which must not pile up
    undo_tune_mode(model)
    assert [type(m) for m in model.modules()] == types
    assert not any('_tune' in vars(m) for m in model.modules())
    undo_tune_mode(model)


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_plain_models(copied):
    plain, tuned = both(pair())
    twin = copied(tuned)
    assert [type(m) for m in twin.modules()] == [type(m) for m in plain.modules()]
    assert torch.equal(twin(X.float()), plain(X.float()))
    assert torch.equal(copied(tuned[0])(X.float()), plain[0](X.float()))
    twin.load_state_dict(tuned.state_dict())


class TwoUses(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return y + self.bn(y)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bns = nn.Conv2d(4, 4, 1), nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

    def forward(self, x):
        y = self.conv(x)
        return self.bns[0](y) + self.bns[1](self.conv(x + 1))


class Standardized(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight / self.weight.std(), self.bias)


def hooked():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model[0].register_forward_hook(lambda module, args, y: None)
    return model


def module_with(norm_cfg):
    return ConvModule(4, 4, 1, norm_cfg=norm_cfg, conv_cfg=dict(type='CenConv') if norm_cfg['type'] == 'MABN' else None)


@pytest.mark.parametrize('make, reason', [
    (TwoUses, 'its convolution also feeds other modules'),
    (Shared, 'its convolution also feeds other modules'),
    (hooked, 'a hook watches it or its convolution'),
    (lambda: nn.Sequential(Standardized(4, 4, 1), nn.BatchNorm2d(4)), 'is more than an affine map'),
    (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)), 'its input is not the output of a convolution'),
    (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), 'no running statistics'),
    (lambda: module_with(dict(type='CBN')), 'it keeps using batch statistics under norm_eval'),
    (lambda: module_with(dict(type='MABN')), 'it keeps using batch statistics under norm_eval'),
    (lambda: module_with(dict(type='AN', norm='BN', k=2)), 'its scale and shift come from the input'),
    (lambda: module_with(dict(type='GN', num_groups=2)), 'its statistics come from the input'),
])  # fmt: skip
def test_what_is_not_exact_is_skipped_with_the_reason(make, reason):
    model = norm_eval(make())
    before = [type(m) for m in model.modules()]
    report = tune_mode(model)
    assert report.pairs == {} and report.active == [] and report.skipped
    assert all(reason in why for why in report.skipped.values()), report.skipped
    assert reason in str(report) and [type(m) for m in model.modules()] == before


def test_a_fused_model_and_what_is_no_model_are_refused():
    with pytest.raises(RuntimeError, match='fused for inference'):
        tune_mode(fuse(pair()))
    with pytest.raises(TypeError, match='takes a torch module, not dict'):
        tune_mode({})


def test_a_hook_that_comes_later_sees_what_it_would_see_in_the_plain_model():
    for part in (0, 1):
        plain, tuned = both(pair())
        outputs = []
        for model in (plain, tuned):
            model[part].register_forward_hook(lambda module, args, y, outputs=outputs: outputs.append(y))
            model(X.float())
        assert torch.equal(*outputs)


def test_a_norm_that_is_replaced_later_is_not_counted_twice():
    plain, tuned = both(pair())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(tuned)
    assert torch.equal(norm_eval(converted)(X.float()), plain(X.float()))
    plain, tuned = both(pair())
    fused = fuse(tuned, inplace=True)
    torch.testing.assert_close(fused(X.float()), plain.eval()(X.float()))
    fused = fuse(both(pair())[1])
    assert not fused.fuse_report.kept
    torch.testing.assert_close(fused(X.float()), plain(X.float()))


class Deceiving(nn.Module):
    """Cannot be traced, so its layers are taken to be called one after the other."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6))

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.layers(x) + self.layers[0](x)


def test_an_output_that_goes_elsewhere_unseen_is_an_error_and_not_another_number():
    model = norm_eval(Deceiving())
    assert tune_mode(model).active
    with pytest.raises(RuntimeError, match=r'layers\.1 as part of layers\.0, whose output then went elsewhere'):
        for _ in range(2):
            model(X.float())


# ------------------------------------------------------------------------------------------------- beside the rest


@pytest.mark.parametrize('name', ['bn', 'bnet'])
def test_activation_checkpointing_and_channels_last_compose(name):
    plain, tuned = both(backbone(name, depth=50, with_cp=True, frozen_stages=0))
    assert sum(isinstance(m, nn.Conv2d) and '_tune' in vars(m) for m in tuned.modules()) == 53
    tuned.to(memory_format=torch.channels_last)
    last = IMAGE.to(memory_format=torch.channels_last)

    expected, result = parameter_gradients(plain, IMAGE), parameter_gradients(tuned, last)
    for key, value in expected.items():
        torch.testing.assert_close(result[key], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()))


def parameter_gradients(model, x):
    model.zero_grad(set_to_none=True)
    y = features(model, x)
    y.square().mean().backward()
    return {'y': y.detach(), **{key: p.grad for key, p in model.named_parameters() if p.grad is not None}}


def test_rewritten_forwards_are_left_to_whoever_rewrote_them():
    from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval

    model = nn.Sequential(backbone())
    turn_on_efficient_conv_bn_eval(model, '0')
    report = tune_mode(model)
    assert not report.pairs and 'efficient_conv_bn_eval' in str(report)


def test_compiled_code_is_in_tune_mode_too():
    plain, tuned = both(pair().double())
    compiled = torch.compile(tuned, backend='eager', fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(X), plain(X), rtol=1e-9, atol=1e-9)
    undo_tune_mode(tuned)
    torch._dynamo.reset()


_DDP = """
import os, sys
sys.path[:0] = [sys.argv[1], os.path.dirname(sys.argv[1])]
import mmdet_norms
import torch
from mmengine.model import MMDistributedDataParallel
from test_tune import IMAGE, backbone, both, features
torch.distributed.init_process_group('gloo', init_method='file://' + sys.argv[2], rank=0, world_size=1)
plain, tuned = both(backbone('bnet'))
wrapped = MMDistributedDataParallel(tuned)
for _ in range(2):
    losses = []
    for model, run in ((plain, plain), (tuned, wrapped)):
        model.zero_grad()
        loss = features(run, IMAGE).square().mean()
        loss.backward()
    for (name, p), q in zip(plain.named_parameters(), tuned.parameters()):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-4 * float(p.grad.abs().max()))
print('equal', flush=True)
os._exit(0)
"""


def test_distributed_training_has_the_same_gradients(tmp_path):
    command = [sys.executable, '-c', _DDP, str(Path(__file__).parent), str(tmp_path / 'store')]
    done = warm.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and 'equal' in done.stdout, done.stderr[-3000:]


# ------------------------------------------------------------------------------------------------- the commands


def test_a_run_says_what_it_covers_and_its_checkpoints_are_those_of_a_plain_run(tmp_path):
    config = str(tiny.write_config(tmp_path, "\ncustom_hooks = [dict(type='EMAHook', momentum=0.1)]\n"))
    options = [
        '--seed',
        '0',
        '--cfg-options',
        'train_cfg.max_epochs=2',
        'default_hooks.checkpoint.interval=1',
        'train_cfg.val_begin=2',
        'model.backbone.norm_eval=True',
        'model.backbone.frozen_stages=1',
    ]

    def run(folder, *arguments):
        train.main([config, '--work-dir', str(tmp_path / folder), *arguments, *options])
        log = ''.join(path.read_text() for path in (tmp_path / folder).glob('*/*.log'))
        return torch.load(tmp_path / folder / 'epoch_2.pth', weights_only=False), log

    def equal(run, other):
        for key in ('state_dict', 'ema_state_dict'):
            assert list(run[key]) == list(other[key])
            for name, value in run[key].items():
                error = float((other[key][name] - value).abs().max())
                assert error <= 1e-3 * float(value.abs().max()) + 1e-5, (key, name, error)

    tuned, log = run('tuned', '--tune-mode')
    assert 'Tune mode: 20 of 20 norms' in log and 'in tune mode: 20 BatchNorm2d (backbone.bn1, ...)' in log
    plain, log = run('plain')
    assert 'une mode' not in log
    equal(tuned, plain)
    # either goes on from the other's checkpoint
    resumed, log = run('tuned on', '--tune-mode', '--resume', str(tmp_path / 'plain' / 'epoch_1.pth'))
    assert 'Tune mode: 20 of 20 norms' in log
    equal(resumed, run('plain on', '--resume', str(tmp_path / 'tuned' / 'epoch_1.pth'))[0])


def test_the_hook_covers_training_alone():
    model = pair()
    runner = SimpleNamespace(model=model, logger=MMLogger.get_instance('tune'))
    hook, plain = TuneModeHook(), [type(m) for m in model.modules()]
    hook.before_train(runner)
    assert [type(m) for m in model.modules()] != plain
    hook.after_train(runner)
    assert [type(m) for m in model.modules()] == plain


def test_a_run_without_fixed_statistics_is_told_that_nothing_changes(tmp_path):
    config = str(tiny.write_config(tmp_path))
    train.main(
        [
            config,
            '--work-dir',
            str(tmp_path / 'run'),
            '--tune-mode',
            '--cfg-options',
            'val_cfg=None',
            'val_dataloader=None',
            'val_evaluator=None',
            'train_dataloader.batch_size=4',
        ]
    )
    log = ''.join(path.read_text() for path in (tmp_path / 'run').glob('*/*.log'))
    assert 'Tune mode changes nothing here' in log


def test_the_benchmark_trains_detectors_in_tune_mode_beside_themselves():
    cfg = Config.fromstring(tiny.CONFIG.replace('{root}', 'none'), '.py')
    fixed = copy.deepcopy(cfg)
    fixed.model.backbone.norm_eval = True
    detectors = Detectors({'fixed': fixed, 'batch': cfg}, Setting(torch.device('cpu')), (64, 96), 1)
    rows = {row['name']: row for row in detectors.group('train', tuned=True).measure(1, 0)['rows']}
    assert list(rows) == ['fixed', 'fixed, tune mode', 'batch', 'batch, tune mode']
    assert rows['fixed, tune mode']['over'] == 'fixed' and rows['fixed, tune mode']['ms'] > 0
    assert rows['fixed, tune mode']['parameters'] == rows['fixed']['parameters']
    assert rows['fixed, tune mode']['saved_bytes'] != rows['fixed']['saved_bytes']
    assert 'fixed statistics' in rows['batch, tune mode']['note']
