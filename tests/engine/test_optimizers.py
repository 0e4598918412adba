"""Optimizers of pytorch-optimizer: each against its formula, and Lookahead and AdaHessian as parts of a run."""

import ast
import copy
import gc
import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import OPTIMIZERS
from mmengine.runner import Runner
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mmdet_norms
from helpers.processes import run_in_two
from mmdet_norms.engine import SecondOrderOptimWrapper
from mmdet_norms.errors import UserError
from mmdet_norms.layers import BNET, MABN, CenConv2d, SyncBN

RANGER_LARS = dict(type='RangerLars', lr=1e-2, weight_decay=1e-3, betas=(0.9, 0.99), eps=1e-6)
NAMES = ('Ranger', 'Ralamb', 'RangerLars', 'AdaHessian')


def wrapper_of(model, optimizer, **wrapper):
    return build_optim_wrapper(model, {'type': 'OptimWrapper', **wrapper, 'optimizer': optimizer})


# ------------------------------------------------------------------------------------------------- names and arguments


def test_it_is_imported_when_an_optimizer_is_asked_for():
    for path in Path(mmdet_norms.__file__).parent.rglob('*.py'):
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {part for node in top for part in (getattr(node, 'module', None), *(n.name for n in node.names))}
        assert path.stem == 'wrapped_optimizers' or not names & {'pytorch_optimizer', 'wrapped_optimizers'}, path


@pytest.mark.parametrize('name', NAMES)
def test_without_the_package_one_error_says_what_to_install(monkeypatch, name):
    monkeypatch.setitem(sys.modules, 'pytorch_optimizer', None)
    with pytest.raises(UserError, match=rf"type='{name}' needs pytorch-optimizer.*pip install 'pytorch-optimizer>=4"):
        wrapper_of(nn.Linear(2, 2), dict(type=name))


@pytest.mark.parametrize('name', NAMES)
def test_a_wrong_value_names_the_key(name):
    with pytest.raises(UserError, match=f"optim_wrapper.optimizer of type '{name}': beta2 must be"):
        wrapper_of(nn.Linear(2, 2), dict(type=name, betas=(0.9, 1.5)))
    with pytest.raises(UserError, match=f"optim_wrapper.optimizer of type '{name}': learning rate must be"):
        wrapper_of(nn.Linear(2, 2), dict(type=name, lr=-1.0))


@pytest.mark.parametrize(
    ('given', 'said'),
    [
        (
            dict(type='RangerLArs'),
            r"type='RangerLArs' is no optimizer \(did you mean 'RangerLars'\?\); choose from .*SGD",
        ),
        (dict(type='Adam_W', lr=1), r"type='Adam_W' is no optimizer \(did you mean 'AdamW'\?\)"),
        (dict(lr=1), 'optim_wrapper.optimizer has no type; choose from'),
        (
            dict(type='SGD', lr=1, momentun=0.9),
            r"type 'SGD' has an unknown key momentun=0.9 \(did you mean 'momentum'\?\)",
        ),
        (dict(type='Ranger', momentum=0.9), "type 'Ranger' has an unknown key momentum=0.9; valid keys: lr, betas"),
        (dict(type='Ralamb', weight_decouple=False), 'unknown key weight_decouple'),  # theirs leaves the decay out
        (dict(type='AdaHessian', update_period=0), 'update_period=0 must be an integer of at least 1'),
        (dict(type='AdaHessian', num_samples=1.5), 'num_samples=1.5 must be an integer'),
        (dict(type='AdaHessian', hessian_distribution='normal'), "'normal' must be 'rademacher' or 'gaussian'"),
    ],
)
def test_a_wrong_name_is_answered_with_the_right_ones(given, said):
    with pytest.raises(UserError, match=said):
        wrapper_of(nn.Linear(2, 2), given)


@pytest.mark.parametrize('name', ['mmengine.SGD', 'torch.optim.SGD', torch.optim.SGD])
def test_other_ways_to_name_an_optimizer_go_on_working(name):
    assert isinstance(wrapper_of(nn.Linear(2, 2), dict(type=name, lr=0.1)).optimizer, torch.optim.SGD)


# -------------------------------------------------------------------------------------------------------- the formulas


def radam(state, w, g, t, lr, betas, eps, decay):
    """RAdam's step (Liu et al. 2020, algorithm 2, with the threshold and eps of its code), and the decayed weights."""
    b1, b2 = betas
    state['m'] = b1 * state['m'] + (1 - b1) * g
    state['v'] = b2 * state['v'] + (1 - b2) * g * g
    mean = state['m'] / (1 - b1**t)
    last = 2 / (1 - b2) - 1
    rho = last - 2 * t * b2**t / (1 - b2**t)
    step = lr * mean
    if rho >= 5:
        r = math.sqrt((rho - 4) * (rho - 2) * last / ((last - 4) * (last - 2) * rho))
        step = lr * r * mean * math.sqrt(1 - b2**t) / (state['v'].sqrt() + eps)
    return step, w - lr * decay * w


def trust(w, step, eps):
    """min(|w|, 10) / (|w - step| + eps), 1 where there is no weight."""
    weight, stepped = min(float(w.norm()), 10.0), float((w - step).norm())
    return 1.0 if weight == 0 or stepped == 0 else weight / (stepped + eps)


def expected(name, weights, gradients, groups, k=6, alpha=0.5):
    """Weights after all gradients, and before each lookahead."""
    results = []
    for number, w in enumerate(weights):
        options = groups[number]
        state, slow = dict(m=torch.zeros_like(w), v=torch.zeros_like(w)), w.clone()
        for t, gradient in enumerate(gradients, 1):
            step, w = radam(state, w, gradient[number], t, **options)
            w = w - (step if name == 'Ranger' else trust(w, step, options['eps']) * step)
            if name != 'Ralamb' and t % k == 0:
                slow = slow + alpha * (w - slow)
                w = slow.clone()
        results.append(w)
    return results


OTHER = dict(k=4, alpha=0.8)


@pytest.mark.parametrize('betas', [(0.9, 0.99), (0.95, 0.999), (0.5, 0.5)], ids=str)
@pytest.mark.parametrize(
    ('name', 'options'), [('Ranger', {}), ('Ranger', OTHER), ('Ralamb', {}), ('RangerLars', {}), ('RangerLars', OTHER)]
)
def test_weights_are_those_of_the_formula(name, betas, options):
    """20 steps, two groups of other rates, decays and eps; a filter, a vector, a large tensor and one of zeros."""
    torch.manual_seed(0)
    weights = [torch.randn(4, 3, 3, 3), torch.randn(5), 4 * torch.randn(8, 8), torch.zeros(3)]
    weights = [w.double() for w in weights]
    gradients = [[torch.randn_like(w) for w in weights] for _ in range(20)]
    one, two = dict(lr=1e-2, weight_decay=1e-3, eps=1e-6), dict(lr=0.1, weight_decay=0.1, eps=1e-3)
    params = [nn.Parameter(w.clone()) for w in weights]
    groups = [dict(params=params[:2], **one), dict(params=params[2:], **two)]
    optimizer = OPTIMIZERS.build(dict(type=name, params=groups, betas=betas, **options))
    for gradient in gradients:
        for p, g in zip(params, gradient):
            p.grad = g.clone()
        optimizer.step()
    literal = [dict(lr=o['lr'], decay=o['weight_decay'], eps=o['eps'], betas=betas) for o in (one, one, two, two)]
    for p, w in zip(params, expected(name, weights, gradients, literal, **options)):
        torch.testing.assert_close(p.data, w, rtol=1e-11, atol=1e-12)


def test_published_defaults():
    model = nn.Linear(2, 2)
    ranger = wrapper_of(model, dict(type='Ranger')).optimizer
    assert ranger.defaults['k'] == 6 and ranger.defaults['alpha'] == 0.5 and not ranger.use_gc
    lars = wrapper_of(model, RANGER_LARS).optimizer
    assert (lars.k, lars.alpha) == (6, 0.5) and type(lars.optimizer).__name__ == 'Lamb'
    assert lars.param_groups[0]['rectify'] and lars.param_groups[0]['betas'] == (0.9, 0.99)


# ----------------------------------------------------------------------------------------------------------- AdaHessian


def three_layers(norm=lambda: BNET(3), head=nn.Identity):
    """A net of three convolutions in float64, trained a little so that no symmetry is left."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 3, bias=False), norm(), nn.Tanh(), nn.Conv2d(3, 3, 3, bias=False), norm(), nn.Tanh()]
    net = nn.Sequential(*layers, nn.Conv2d(3, 2, 1), head()).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return net


X = torch.randn(3, 2, 7, 7, dtype=torch.double, generator=torch.Generator().manual_seed(1))
TARGET = torch.tensor([0, 1, 1])


def loss_of(net, x=X, target=TARGET):
    return F.cross_entropy(net(x).mean((2, 3)), target)


def differences(net, step=1e-5):
    """The Hessian's diagonal by finite differences of the gradient, each forward with the same statistics."""

    def gradient(name, index, change):
        fresh = copy.deepcopy(net)
        with torch.no_grad():
            fresh.get_parameter(name).view(-1)[index] += change
        return torch.autograd.grad(loss_of(fresh), fresh.get_parameter(name))[0].flatten()[index]

    return {
        name: torch.stack([(gradient(name, i, step) - gradient(name, i, -step)) / (2 * step) for i in range(p.numel())])
        for name, p in net.named_parameters()
        if p.requires_grad
    }


def hadamard(size):
    rows = torch.ones(1, 1, dtype=torch.double)
    while len(rows) < size:
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    return rows


def diagonal(net, monkeypatch):
    """What the wrapper hands to the optimizer, with signs that are an orthogonal basis: the exact diagonal."""
    params = [p for p in net.parameters() if p.requires_grad]
    basis = hadamard(sum(p.numel() for p in params))
    pieces = iter(
        [piece for row in basis for piece in row[: sum(p.numel() for p in params)].split([p.numel() for p in params])]
    )
    monkeypatch.setattr('mmdet_norms.engine.second_order._signs', lambda p, *_: next(pieces).view_as(p))
    wrapper = wrapper_of(net, dict(type='AdaHessian', num_samples=len(basis)))
    seen = []
    step = wrapper.optimizer.step
    monkeypatch.setattr(wrapper.optimizer, 'step', lambda **given: (seen.append(given['hessian']), step(**given)))
    with wrapper.optim_context(net):
        loss = loss_of(net)
    wrapper.update_params(loss)
    return {name: h for (name, p), h in zip(net.named_parameters(), seen[0]) if p.requires_grad}


NORMS = dict(
    bnet=lambda: BNET(3),
    bn=lambda: nn.BatchNorm2d(3),
)


@pytest.mark.parametrize('norm', NORMS)
def test_the_diagonal_is_that_of_finite_differences(norm, monkeypatch):
    net = three_layers(NORMS[norm])
    by_differences = differences(net)
    found = diagonal(net, monkeypatch)
    assert found.keys() == by_differences.keys()
    for name, values in by_differences.items():
        torch.testing.assert_close(found[name].flatten(), values, rtol=1e-6, atol=1e-8, msg=name)
    assert max(float(values.abs().max()) for values in by_differences.values()) > 1e-2


def tune_up(optimizer, **wrapper):
    """A net of one BNET, its wrapper, and a function that trains it for a step on some images."""
    torch.manual_seed(0)
    net = three_layers()
    built = wrapper_of(net, optimizer, **wrapper)

    def step(number, images=6):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(images, 2, 7, 7, dtype=torch.double, generator=generator)
        y = torch.randint(2, (images,), generator=generator)
        with built.optim_context(net):
            loss = loss_of(net, x, y)
        built.update_params(loss)
        return float(loss.detach())

    return net, built, step


@pytest.mark.parametrize('power', [1.0, 0.5])
@pytest.mark.parametrize('foreach', [None, False])
def test_adahessian_is_its_formula(foreach, power, monkeypatch):
    """Of a quadratic loss, whose diagonal is known, with a decay that is decoupled."""
    scales = [torch.tensor([1.0, 4.0, 0.25]).double(), torch.tensor([[2.0], [0.5]]).double()]
    params = nn.ParameterList([nn.Parameter(torch.ones_like(s)) for s in scales])
    options = dict(lr=0.1, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.01, hessian_power=power)
    wrapper = wrapper_of(params, dict(type='AdaHessian', foreach=foreach, **options))
    values = [(torch.ones_like(s), torch.zeros_like(s), torch.zeros_like(s)) for s in scales]
    for t in range(1, 11):
        with wrapper.optim_context(params):
            loss = sum((s * p.square()).sum() / 2 + p.sum() ** 2 * 0 for p, s in zip(params, scales))
        wrapper.update_params(loss)
        for number, (s, (w, m, v)) in enumerate(zip(scales, values)):
            m, v = 0.9 * m + 0.1 * s * w, 0.99 * v + 0.01 * s**2
            w = w * (1 - 0.1 * 0.01)
            w = w - 0.1 * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)) ** (power / 2) + 1e-3)
            values[number] = (w, m, v)
    for p, (w, _, _) in zip(params, values):
        torch.testing.assert_close(p.data, w, rtol=1e-12, atol=1e-13)


def test_the_diagonal_is_renewed_as_often_as_asked_for():
    net, wrapper, step = tune_up(dict(type='AdaHessian', update_period=3))
    state, averages = wrapper.optimizer.state[next(net.parameters())], []
    for number in range(7):
        step(number)
        averages.append(state['exp_hessian_diag_sq'].clone())
        assert 'hessian' not in state and not any(p.grad is not None for p in net.parameters())
    changed = [not torch.equal(*pair) for pair in pairwise(averages)]
    assert changed == [False, False, True, False, False, True]


def test_a_step_of_several_batches_is_that_of_one():
    """Without norms, whose statistics are each batch's own."""
    results = []
    for counts in (1, 3):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 3)).double()
        wrapper = wrapper_of(net, dict(type='AdaHessian'), accumulative_counts=counts, clip_grad=dict(max_norm=0.1))
        wrapper.initialize_count_status(net, 0, 4 * counts)
        torch.manual_seed(1)
        for number in range(4):
            x = torch.randn(6, 2, 7, 7, dtype=torch.double, generator=torch.Generator().manual_seed(number))
            for part in x.chunk(counts):
                with wrapper.optim_context(net):
                    loss = net(part).square().mean()
                wrapper.update_params(loss)
        results.append(net.state_dict())
    for one, three in zip(results[0].values(), results[1].values()):
        torch.testing.assert_close(three, one, rtol=1e-10, atol=1e-12)


def test_no_graph_outlives_its_batch():
    net, wrapper, step = tune_up(dict(type='AdaHessian', num_samples=2), accumulative_counts=10)
    counts = []
    gc.disable()  # what only the collector would find stays for long, too
    try:
        for number in range(4):
            step(number)
            counts.append(sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects()))
            kept = [tensor for p in net.parameters() for tensor in (p.grad, wrapper.optimizer.state[p]['hessian'])]
            assert not any(tensor.requires_grad for tensor in kept)
    finally:
        gc.enable()
    assert len(set(counts[1:])) == 1


def test_in_a_plain_wrapper_one_error_names_the_right_one():
    net = three_layers()
    optimizer = OPTIMIZERS.build(dict(type='AdaHessian', params=net.parameters()))
    wrapper = OptimWrapper(optimizer)  # by a constructor of somebody else
    with pytest.raises(UserError, match=r"needs optim_wrapper.type='SecondOrderOptimWrapper'"):
        wrapper.update_params(loss_of(net))


def test_which_wrapper_is_chosen():
    net, hessian = nn.Linear(2, 2), dict(type='AdaHessian')
    for given, dtype in (
        (dict(), None),
        (dict(type='SecondOrderOptimWrapper'), None),
        (dict(type=OptimWrapper), None),
        (dict(type='CPUAmpOptimWrapper'), 'bfloat16'),
        (dict(type='SecondOrderOptimWrapper', dtype='bfloat16'), 'bfloat16'),
    ):
        wrapper = wrapper_of(net, hessian, clip_grad=dict(max_norm=1), **given)
        assert isinstance(wrapper, SecondOrderOptimWrapper) and wrapper.dtype == dtype
        assert wrapper.clip_grad_kwargs == dict(max_norm=1)
    assert type(wrapper_of(net, RANGER_LARS)) is OptimWrapper
    with pytest.raises(UserError, match=r"AmpOptimWrapper' scales the loss.*dtype='bfloat16'"):
        wrapper_of(net, hessian, type='AmpOptimWrapper')
    with pytest.raises(UserError, match=r"optim_wrapper.dtype='float16': with AdaHessian write 'bfloat16'"):
        wrapper_of(net, hessian, type='SecondOrderOptimWrapper', dtype='float16')
    with pytest.raises(UserError, match='this is SGD: leave the type out'):
        wrapper_of(net, dict(type='SGD', lr=1), type='SecondOrderOptimWrapper')


def test_bfloat16_has_about_the_same_diagonal():
    results = []
    for dtype in (None, 'bfloat16'):
        net = three_layers().float()
        torch.manual_seed(0)
        wrapper = wrapper_of(net, dict(type='AdaHessian', num_samples=20), type='SecondOrderOptimWrapper', dtype=dtype)
        with wrapper.optim_context(net):
            loss = loss_of(net, X.float())
        wrapper.update_params(loss)
        results.append(
            torch.cat([wrapper.optimizer.state[p]['exp_hessian_diag_sq'].flatten() for p in net.parameters()])
        )
        assert all(p.dtype == torch.float32 for p in net.parameters())
    one, two = (r.sqrt() for r in results)
    assert float((one - two).norm() / one.norm()) < 0.05 and not torch.equal(one, two)


# ------------------------------------------------------------------------------------ what has no second derivative


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


class Square(nn.Module):
    def forward(self, x):
        return Once.apply(x)


class Checkpointed(nn.Sequential):
    def __init__(self, *layers, reentrant):
        super().__init__(*layers)
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


def hessian_step(net, x=X):
    wrapper = wrapper_of(net, dict(type='AdaHessian'))
    with wrapper.optim_context(net):
        loss = net(x).square().mean()
    wrapper.update_params(loss)


def test_mabn_is_refused_before_anything_is_computed():
    net = nn.Sequential(CenConv2d(2, 4, 3), MABN(4), CenConv2d(4, 4, 3), MABN(4))
    with pytest.raises(
        UserError, match=r"optimizer.type='AdaHessian'.*MABN at 1, 3\. Take another norm.*'GN', 'CBN' or"
    ):
        wrapper_of(net, dict(type='AdaHessian'))
    assert all(module.training for module in net.modules())
    # built by a constructor of somebody else: when the first batch comes
    wrapper = SecondOrderOptimWrapper(OPTIMIZERS.build(dict(type='AdaHessian', params=net.parameters())))
    with pytest.raises(UserError, match='MABN at 1, 3'), wrapper.optim_context(net):
        pytest.fail('computed')


def test_mabn_that_stays_in_eval_mode_is_an_affine_map():
    class Frozen(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[1].eval()
            return self

    hessian_step(Frozen(CenConv2d(2, 4, 3), MABN(4), nn.Conv2d(4, 1, 1)).double().train())


def test_a_function_that_is_differentiable_once_is_named_with_its_layers():
    net = nn.Sequential(nn.Conv2d(2, 2, 3), Square(), nn.Conv2d(2, 2, 1)).double()
    with pytest.raises(
        UserError, match=r"'AdaHessian' needs second.*once only \(Once, in 1\); otherwise take another optimizer"
    ):
        hessian_step(net)


def test_reentrant_checkpointing_is_refused_and_the_other_kind_is_right(monkeypatch):
    layers = [nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 3)]
    with pytest.raises(UserError, match='activation checkpointing of the reentrant kind: leave out with_cp=True'):
        hessian_step(nn.Sequential(Checkpointed(*layers, reentrant=True)).double(), X.clone().requires_grad_())
    results = []
    for net in (nn.Sequential(*layers), Checkpointed(*layers, reentrant=False)):
        copied = copy.deepcopy(net).double()
        torch.manual_seed(0)
        hessian_step(copied)
        results.append(list(copied.parameters()))
    for one, two in zip(*results):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_errors_of_other_kinds_stay_what_they_are():
    net = nn.Conv2d(2, 2, 3).double()
    wrapper = wrapper_of(net, dict(type='AdaHessian'))
    loss = net(X).square().mean()
    torch.autograd.grad(loss, net.parameters())
    with pytest.raises(RuntimeError, match='second time'):
        wrapper.update_params(loss)


def test_a_parameter_without_curvature_is_named():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Conv2d(2, 2, 3), nn.Conv2d(2, 1, 1)

        def forward(self, x):
            return self.head(self.body(x).tanh()).abs()

    net = Model().double()
    wrapper = wrapper_of(net, dict(type='AdaHessian'))
    with wrapper.optim_context(net):
        loss = net(X).mean()
    with pytest.raises(UserError, match=r'has none in head.bias: it is piecewise linear.*SmoothL1Loss'):
        wrapper.update_params(loss)


# --------------------------------------------------------------------------------------------------------------- runs


class Classifier(BaseModel):
    """A BNET between a convolution and a linear layer, on random images of two classes."""

    def __init__(self, init_cfg=None):
        super().__init__(init_cfg=init_cfg)
        self.conv, self.norm, self.fc = nn.Conv2d(2, 4, 3, bias=False), BNET(4), nn.Linear(4, 2)

    def forward(self, x, y, mode='loss'):
        return dict(loss=F.cross_entropy(self.fc(self.norm(self.conv(x)).tanh().mean((2, 3))), y))


class Images(torch.utils.data.Dataset):
    metainfo = dict(classes=('a', 'b'))

    def __len__(self):
        return 24

    def __getitem__(self, i):
        x = torch.randn(2, 7, 7, generator=torch.Generator().manual_seed(i))
        return dict(x=x + i % 2, y=i % 2)


def train(folder, optimizer, iters=8, **options):
    """The runner after a run of so many iterations, with a checkpoint every third of them."""
    wrapper = options.pop('wrapper', {})
    loader = dict(dataset=Images(), batch_size=4, sampler=dict(type='InfiniteSampler'), num_workers=0)
    runner = Runner(
        model=options.pop('model', None) or Classifier(),
        work_dir=str(folder),
        train_dataloader=dict(**loader, collate_fn=dict(type='default_collate')),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=iters, val_interval=100),
        optim_wrapper={'type': 'OptimWrapper', **wrapper, 'optimizer': optimizer},
        param_scheduler=dict(type='MultiStepLR', by_epoch=False, milestones=[2, 5], gamma=0.5),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1)),
        custom_hooks=[dict(type='RandomStateHook'), dict(type='NonFiniteHook')],
        randomness=dict(seed=1),
        experiment_name=f'{folder.name}_{iters}_{len(list(folder.glob("*.pth")))}',
        **options,
    )
    runner.train()
    return runner


def test_options_of_lookahead_are_resumed_as_those_of_torch_are():
    saved = wrapper_of(nn.Linear(2, 2), dict(type='RangerLars', k=4, alpha=0.3)).optimizer.state_dict()
    optimizer = wrapper_of(nn.Linear(2, 2), dict(type='RangerLars')).optimizer
    assert optimizer.param_groups[0]['lookahead_k'] == 6
    optimizer.load_state_dict(saved)
    assert (optimizer.k, optimizer.alpha) == (4, 0.3)


PARAMWISE = dict(norm_decay_mult=0.0, custom_keys=dict(conv=dict(lr_mult=0.1)))


@pytest.mark.parametrize(
    ('name', 'wrapper', 'at'),
    [
        ('RangerLars', dict(paramwise_cfg=PARAMWISE, clip_grad=dict(max_norm=1.0)), 4),
        ('Ranger', {}, 7),
        ('AdaHessian', dict(paramwise_cfg=PARAMWISE, clip_grad=dict(max_norm=1.0)), 3),
        ('AdaHessian', dict(accumulative_counts=3), 4),  # amid a step
        ('RangerLars', dict(type='CPUAmpOptimWrapper', accumulative_counts=2), 5),
    ],
)
def test_a_resumed_run_is_the_one_that_was_not_stopped(tmp_path, name, wrapper, at):
    optimizer = dict(type=name, lr=0.02, weight_decay=0.01)
    whole = train(tmp_path / 'whole', optimizer, wrapper=dict(wrapper), iters=14)
    rate = whole.optim_wrapper.get_lr()['lr']
    assert len(set(rate)) == (2 if 'paramwise_cfg' in wrapper else 1) and max(rate) == pytest.approx(0.02 / 4)
    (tmp_path / 'resumed').mkdir()
    source = tmp_path / 'whole' / f'iter_{at}.pth'
    torch.manual_seed(99)
    resumed = train(
        tmp_path / 'resumed', optimizer, wrapper=dict(wrapper), iters=14, load_from=str(source), resume=True
    )
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    one, two = (torch.load(tmp_path / run / 'iter_14.pth')['optimizer'] for run in ('whole', 'resumed'))
    assert flat(one) == flat(two)


def flat(node):
    if isinstance(node, dict):
        return {key: flat(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [flat(value) for value in node]
    return node.tolist() if isinstance(node, torch.Tensor) else node


@pytest.mark.parametrize('name', ['Ranger', 'RangerLars'])
def test_slow_weights_begin_with_those_that_were_loaded(tmp_path, name):
    """The runner builds the optimizer in front of them."""
    torch.manual_seed(5)
    loaded = Classifier()
    torch.save(dict(state_dict=loaded.state_dict()), tmp_path / 'weights.pth')
    options = dict(load_from=str(tmp_path / 'weights.pth'), model=Classifier())
    runner = train(tmp_path / 'run', dict(type=name, lr=1e-9), iters=6, **options)
    for key, value in loaded.named_parameters():
        torch.testing.assert_close(runner.model.get_parameter(key), value, rtol=0, atol=1e-6)


class Halves(BaseModel):
    """With a norm that computes over all processes, and a layer that only the second half of the images sees."""

    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.fc, self.extra = (
            nn.Conv2d(2, 4, 3, bias=False),
            norm(4),
            nn.Linear(4, 2),
            nn.Linear(2, 2),
        )
        self.unused = nn.Linear(1, 1)
        self.double()

    def forward(self, x, y, half, mode='loss'):
        z = self.fc(self.norm(self.conv(x)).tanh().mean((2, 3)))
        late = half > 0
        if late.any():
            z = torch.cat([z[~late], self.extra(z[late]).tanh()])
        return dict(loss=F.cross_entropy(z, y))


def train_halves(rank, name, norm, counts):
    """The weights after four steps; alone (``rank`` None) on the batches of both processes."""
    model, alone = Halves(norm), rank is None
    wrapper = wrapper_of(model, dict(type=name, lr=0.05), accumulative_counts=counts, clip_grad=dict(max_norm=0.5))
    wrapper.initialize_count_status(model, 0, 4 * counts)
    if not alone:
        model = MMDistributedDataParallel(model)
    torch.manual_seed(3 + 10 * (rank or 0))  # each process draws other numbers
    for number in range(4 * counts):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(8, 2, 6, 6, dtype=torch.double, generator=generator)
        y, half = torch.arange(8) % 2, torch.arange(8) // 4
        part = slice(None) if alone else slice(4 * rank, 4 * rank + 4)
        model.train_step(dict(x=x[part], y=y[part], half=half[part]), wrapper)
    return copy.deepcopy((model if alone else model.module).state_dict()), wrapper.optimizer.state_dict()[
        'param_groups'
    ]


def train_all_halves(rank):
    return [train_halves(rank, *case) for case in HALVES]


HALVES = [('AdaHessian', nn.Identity, 1), ('AdaHessian', SyncBN, 2)]


@pytest.mark.filterwarnings('ignore:Gradient accumulative')
def test_two_processes_are_one_with_the_images_of_both(tmp_path):
    answers = run_in_two(tmp_path, train_all_halves)
    for case, one, two in zip(HALVES, *answers):
        alone, _ = train_halves(None, *case)
        for key, value in alone.items():
            assert torch.equal(one[0][key], two[0][key]), key
            if 'num_batches' not in key:
                torch.testing.assert_close(one[0][key], value, rtol=1e-9, atol=1e-11, msg=f'{case} {key}')


class SomeWrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


def test_wrappers_that_gather_gradients_their_own_way_are_refused(monkeypatch):
    monkeypatch.setattr('mmdet_norms.engine.second_order.is_model_wrapper', lambda m: isinstance(m, SomeWrapper))
    model = nn.Linear(2, 2)
    wrapper = wrapper_of(model, dict(type='AdaHessian'))
    said = r"in SomeWrapper.*type='MMDistributedDataParallel'"
    with pytest.raises(UserError, match=said), wrapper.optim_context(SomeWrapper(model)):
        pytest.fail('computed')


@pytest.mark.parametrize('optimizer', [dict(type='AdaHessian', lr=0.1), RANGER_LARS], ids=lambda o: o['type'])
def test_digits_are_learned(optimizer):
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float)[:, None] / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, bias=False), BNET(8), nn.ReLU(), nn.Conv2d(8, 16, 3, bias=False), BNET(16), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))
    wrapper, losses = wrapper_of(net, optimizer), []
    for _ in range(60):
        chosen = torch.randint(1400, (64,))
        with wrapper.optim_context(net):
            loss = F.cross_entropy(net(x[chosen]), y[chosen])
        wrapper.update_params(loss)
        losses.append(float(loss.detach()))
    assert losses[0] > 2 and sum(losses[-10:]) / 10 < 1
    with torch.no_grad():
        assert float((net.eval()(x[1400:]).argmax(1) == y[1400:]).float().mean()) > 0.7


def test_the_state_of_another_optimizer_is_refused(tmp_path):
    train(tmp_path / 'run', dict(type='SGD', lr=0.1), iters=2)
    for name in ('RangerLars', 'AdaHessian'):
        with pytest.raises(UserError, match='the state of another optimizer than'):
            train(tmp_path / name, dict(type=name), load_from=str(tmp_path / 'run' / 'iter_2.pth'), resume=True)


def test_a_diagonal_that_is_not_finite_is_no_step(tmp_path):
    class Root(Classifier):
        def forward(self, x, y, mode='loss'):
            return dict(loss=super().forward(x, y)['loss'] + self.fc.bias.pow(1.5).sum())

    model = Root()
    nn.init.zeros_(model.fc.bias)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match='iteration 1: the Hessian is not finite, although loss and gradients are'):
        train(tmp_path / 'run', dict(type='AdaHessian'), model=model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('seen', [True, False])
def test_a_parameter_that_is_not_used_is_left_alone(seen):
    net = nn.ModuleList([nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)]).double()
    before = copy.deepcopy(net.state_dict())
    wrapper = wrapper_of(net, dict(type='AdaHessian'))
    wrapper.update_params(net[0](X).square().mean())
    if seen:  # then it is one that has a state
        wrapper.update_params(net[1](X).square().mean())
    assert torch.equal(net[1].weight, before['1.weight']) is not seen
