"""The matrix norm x situation: every norm, every situation as a function, and where one of them is answered otherwise.

``test_matrix.py`` runs each cell as a test; ``tools/make_matrix.py`` runs them all and writes ``docs/matrix.md``.
Run as a script, this file is the other process of the cells that need one.
"""

import copy
import functools
import importlib.util
import io
import os
import pickle
import re
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from mmcv.cnn import ConvModule
from mmengine.model import ExponentialMovingAverage, revert_sync_batchnorm
from torch import nn
from torch.autograd.gradcheck import GradcheckError
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import mmdet_norms  # noqa: F401  (registers the norms)
from mmdet_norms.layers import AnotherFunctionError, link_convs

ROOT = Path(__file__).resolve().parents[2]


class Norm(NamedTuple):
    cfg: dict
    conv: dict | None = None


def _bnet(kernel_size):
    return Norm(dict(type='BNET', kernel_size=kernel_size))


# Schedules are short, so that the six warm-up steps of `ready` reach what each norm does in the end.
NORMS = {
    'BN': Norm(dict(type='BN')),
    'BN norm_batch': Norm(dict(type='BN', norm_batch=1)),
    'SyncBN': Norm(dict(type='SyncBN')),
    'FrozenBN': Norm(dict(type='FrozenBN')),
    'GN': Norm(dict(type='GN', num_groups=4)),
    'IN': Norm(dict(type='IN', affine=True)),
    'LN2d': Norm(dict(type='LN2d')),
    'BRN': Norm(dict(type='BRN', warmup_iters=2, r_iters=5, d_iters=5, momentum=0.1)),
    'BRN norm_batch': Norm(dict(type='BRN', warmup_iters=2, r_iters=5, d_iters=5, momentum=0.1, norm_batch=1)),
    'SN': Norm(dict(type='SN')),
    'BNET-3': _bnet(3),
    'BNET-5': _bnet(5),
    'BNET-7': _bnet(7),
    'CBN': Norm(dict(type='CBN', buffer_num=3, burnin=2)),
    'MABN': Norm(dict(type='MABN', buffer_size=3, warmup_iters=2), dict(type='CenConv')),
    'MABN norm_batch': Norm(dict(type='MABN', buffer_size=3, warmup_iters=4, norm_batch=1), dict(type='CenConv')),
    'AN-BN': Norm(dict(type='AN', norm='BN', k=3)),
    'AN-GN': Norm(dict(type='AN', norm='GN', k=3, num_groups=4)),
}
WARM_UP = 6
BNETS = ('BNET-3', 'BNET-5', 'BNET-7')
# The counters that a training forward moves; the other norms have none.
COUNTERS = {
    **dict.fromkeys(('BN', 'SyncBN', 'BRN', 'SN', *BNETS), ('num_batches_tracked',)),
    **dict.fromkeys(('BN norm_batch', 'BRN norm_batch'), ('num_batches_tracked',)),
    'CBN': ('iter_count',),
    **dict.fromkeys(('MABN', 'MABN norm_batch'), ('iters',)),
    'AN-BN': ('num_batches_tracked', 'attention_weights.attention.1.num_batches_tracked'),
}


# ---------------------------------------------------------------------------------------------------------- harness


def build(norm: str, *, link: bool = False, seed: int = 0, **norm_cfg) -> ConvModule:
    """Convolution and norm, as a config names them, with weights that are nowhere at their default."""
    torch.manual_seed(seed)
    chosen = NORMS[norm]
    module = ConvModule(4, 8, 3, padding=1, norm_cfg={**chosen.cfg, **norm_cfg}, conv_cfg=chosen.conv, act_cfg=None)
    with torch.no_grad():
        for parameter in module.norm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        if norm == 'FrozenBN':
            module.norm.running_var.uniform_(0.5, 2)
            for buffer in (module.norm.weight, module.norm.bias, module.norm.running_mean):
                buffer.add_(torch.randn_like(buffer) * 0.2)
    if link:
        link_convs(module)
    return module.train()


def batch(seed: int = 0, shape: tuple = (2, 4, 6, 6), **kwargs) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.3
    return x.to(**kwargs)


def loss_of(y: torch.Tensor) -> torch.Tensor:
    """Something that a normalization does not make constant."""
    y = y.float() if y.dtype in (torch.float16, torch.bfloat16) else y
    ramp = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return (y.square() * (ramp + 0.5) + y * ramp).sum() / max(y.numel(), 1)


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)


def train(module, seeds, optimizer=None) -> None:
    optimizer = optimizer or sgd(module)
    for seed in seeds:
        optimizer.zero_grad()
        loss_of(module(batch(seed))).backward()
        optimizer.step()
    module.zero_grad()


def ready(norm: str, **kwargs) -> ConvModule:
    """A module in the middle of its training."""
    module = build(norm, **kwargs)
    train(module, range(WARM_UP))
    return module


def state(module) -> dict:
    return copy.deepcopy(module.state_dict())


def counts(norm: str, module) -> list[int]:
    values = module.norm.state_dict()
    return [int(values[name]) for name in COUNTERS.get(norm, ())]


def gradients(module, x, run=None) -> dict:
    """Output and all gradients of one training step."""
    module.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = (module if run is None else run)(x)
    loss_of(y).backward()
    return dict(y=y.detach(), x=x.grad, **{key: p.grad for key, p in module.named_parameters()})


def same(first: dict, second: dict, rtol: float = 0, atol: float = 0) -> None:
    assert first.keys() == second.keys(), first.keys() ^ second.keys()
    for key in first:
        if first[key] is None or second[key] is None:
            assert first[key] is second[key], key
            continue
        torch.testing.assert_close(first[key], second[key], rtol=rtol, atol=atol, msg=lambda t, key=key: f'{key}: {t}')


def finite(*values) -> None:
    for value in values:
        if isinstance(value, dict):
            for key, entry in value.items():
                assert entry is None or entry.isfinite().all(), f'{key} is not finite'
        else:
            assert value.isfinite().all()


# ------------------------------------------------------------------------------------------------------- situations

SITUATIONS = {}


def situation(name: str):
    def add(function):
        SITUATIONS[name] = function
        return function

    return add


def _per_channel(values):
    return values.view(1, -1, 1, 1)


def _plain(z, norm, bn=None):
    """Batch norm with running statistics, written out; statistics from ``bn``, weight and bias from ``norm``."""
    bn = bn or norm
    x_hat = (z - _per_channel(bn.running_mean)) / _per_channel(bn.running_var + bn.eps).sqrt()
    return x_hat * _per_channel(norm.weight) + _per_channel(norm.bias)


def _over(z, dims, norm, groups=None):
    shaped = z if groups is None else z.view(len(z), groups, -1)
    var, mean = torch.var_mean(shaped, dims, correction=0, keepdim=True)
    x_hat = ((shaped - mean) / (var + norm.eps).sqrt()).view(z.shape)
    return x_hat * _per_channel(norm.weight) + _per_channel(norm.bias)


def _sn(z, n):
    sets = [torch.var_mean(z, dims, correction=0, keepdim=True) for dims in ((2, 3), (1, 2, 3))]
    sets.append((_per_channel(n.bn.running_var), _per_channel(n.bn.running_mean)))
    mean = sum(w * m for w, (_, m) in zip(n.mean_weight.softmax(0), sets))
    var = sum(w * v for w, (v, _) in zip(n.var_weight.softmax(0), sets))
    return (z - mean) / (var + n.eps).sqrt() * _per_channel(n.weight) + _per_channel(n.bias)


def _bnet_eval(z, n):
    x_hat = (z - _per_channel(n.bn.running_mean)) / _per_channel(n.bn.running_var + n.bn.eps).sqrt()
    return F.conv2d(x_hat, n.bnconv.weight, n.bnconv.bias, padding=n.kernel_size // 2, groups=n.num_features)


def _mabn(z, n):
    return z / (_per_channel(n.running_var) + n.eps).sqrt() * _per_channel(n.weight) + _per_channel(n.bias)


def _an(z, n):
    var, mean = torch.var_mean(z, (2, 3), keepdim=True)
    net = n.attention_weights.attention
    logits = F.conv2d(mean / (var + 1e-3).sqrt(), net[0].weight, net[0].bias)
    if n.norm == 'BN':
        logits = _plain(logits, net[1])
        x_hat = (z - _per_channel(n.bn.running_mean)) / _per_channel(n.bn.running_var + n.bn.eps).sqrt()
    else:
        x_hat = F.group_norm(z, n.num_groups, eps=n.eps)
    lam = F.hardsigmoid(logits).flatten(1)
    return (lam @ n.weight_)[..., None, None] * x_hat + (lam @ n.bias_)[..., None, None]


EVAL_FORMULA = {
    'BN': _plain,
    'SyncBN': _plain,
    'FrozenBN': _plain,
    'GN': lambda z, n: _over(z, 2, n, groups=4),
    'IN': lambda z, n: _over(z, (2, 3), n),
    'LN2d': lambda z, n: _over(z, 1, n),
    **dict.fromkeys(('BN norm_batch', 'BRN', 'BRN norm_batch'), lambda z, n: _plain(z, n.bn)),
    'SN': _sn,
    **dict.fromkeys(BNETS, _bnet_eval),
    'CBN': lambda z, n: (
        (z - _per_channel(n.running_mean)) / (_per_channel(n.running_var).sqrt() + n.eps) * _per_channel(n.weight)
        + _per_channel(n.bias)
    ),
    **dict.fromkeys(('MABN', 'MABN norm_batch'), _mabn),
    'AN-BN': _an,
    'AN-GN': _an,
}


@situation('eval is the documented formula and changes no state')
def eval_formula(norm):
    module = ready(norm).double().eval()
    before, x = state(module), batch(9, dtype=torch.float64)
    y = module(x)
    z = module.conv(x)
    torch.testing.assert_close(y, EVAL_FORMULA[norm](z, module.norm), rtol=1e-9, atol=1e-9)
    if hasattr(module.norm, 'to_batch_norm'):
        torch.testing.assert_close(y, module.norm.to_batch_norm()(z), rtol=1e-9, atol=1e-9)
    assert torch.equal(y, module(x))
    same(before, state(module))


def _autocast(norm, dtype, tolerance):
    module = ready(norm)
    # eight images: the attention of AN-BN normalizes over images, which for two is a matter of sign
    exact, x = copy.deepcopy(module), batch(9, (8, 4, 6, 6))
    expected = gradients(exact, x)
    with torch.autocast('cpu', dtype=dtype):
        outcome = gradients(module, x)
    assert outcome['y'].dtype == dtype
    finite(outcome, state(module))
    for key, value in outcome.items():
        if expected[key] is not None:
            distance = (value.float() - expected[key]).norm() / (expected[key].norm() + 1e-3)
            assert distance < tolerance, f'{key} is {distance:.3f} off'
    ours, theirs = state(module), state(exact)
    assert all(value.dtype == theirs[key].dtype for key, value in ours.items())
    assert all(v.dtype == torch.float32 for v in ours.values() if v.is_floating_point())
    same(ours, theirs, rtol=tolerance, atol=tolerance)


@situation('bf16 autocast: close to fp32, state stays fp32')
def bf16(norm):
    # over single images more cancels in the gradient of the convolution, for torch's batch norm called on each, too
    _autocast(norm, torch.bfloat16, 0.2 if 'norm_batch' in NORMS[norm].cfg else 0.15)


@situation('fp16 autocast: close to fp32, state stays fp32')
def fp16(norm):
    _autocast(norm, torch.float16, 0.03)


@situation('N = 0: zero gradients, state unchanged')
def no_sample(norm):
    for training in (True, False):
        module = ready(norm).train(training)
        before = state(module)
        outcome = gradients(module, torch.zeros(0, 4, 6, 6))
        assert outcome.pop('y').shape == (0, 8, 6, 6)
        assert all(g is None or not g.any() for g in outcome.values())
        same(before, state(module))


def _finite_step(norm, x):
    module = ready(norm)
    finite(gradients(module, x), state(module))
    finite(gradients(module.eval(), x))


@situation('N = 1')
def one_sample(norm):
    _finite_step(norm, batch(9, (1, 4, 6, 6)))


@situation('1x1 maps')
def single_pixels(norm):
    _finite_step(norm, batch(9, (3, 4, 1, 1)))


@situation('a single value per channel')
def single_value(norm):
    _finite_step(norm, batch(9, (1, 4, 1, 1)))


@situation('constant channels: finite output and gradients')
def constant_channels(norm):
    for value in (0.0, 7.0):
        for training in (True, False):
            module = ready(norm).train(training)
            module.conv.padding = (0, 0)  # zeros around the map would make it vary
            finite(gradients(module, torch.full((2, 4, 6, 6), value)), state(module))


@situation('huge means: as in float64')
def huge_means(norm):
    for layout in (torch.contiguous_format, torch.channels_last):
        module = ready(norm)
        module.conv.padding = (0, 0)
        exact, x = copy.deepcopy(module).double(), (batch(9) + 1e4).contiguous(memory_format=layout)
        outcome = gradients(module, x)
        finite(outcome, state(module))
        # the ulp of 1e4 is 0.001
        torch.testing.assert_close(outcome['y'].double(), exact(x.double()), rtol=1e-4, atol=0.05)


def _layout(norm, change):
    """The same result through the module in training, and through the norm alone, which then sees this layout.

    In float64: AN's logit norm, over two instances here, multiplies rounding by hundreds.
    """
    module = ready(norm).double()
    x, other = batch(9).double(), change(batch(9).double())
    a, b = copy.deepcopy(module), copy.deepcopy(module)
    same(gradients(a, x), gradients(b, other), rtol=1e-8, atol=1e-8)
    same(state(a), state(b), rtol=1e-8, atol=1e-8)
    z = module.conv(x).detach()
    for training in (True, False):
        a, b = (copy.deepcopy(module.norm).train(training) for _ in range(2))
        y = b(change(z))
        torch.testing.assert_close(y, a(z), rtol=1e-8, atol=1e-8)
        same(state(a), state(b), rtol=1e-8, atol=1e-8)
    return module(other), y


@situation('non-contiguous input')
def non_contiguous(norm):
    _layout(norm, lambda x: x.transpose(2, 3).contiguous().transpose(2, 3))
    _layout(norm, lambda x: torch.cat([x, x], 1)[:, : x.shape[1]])


@situation('channels_last input: same result, layout kept')
def channels_last(norm):
    for y in _layout(norm, lambda x: x.to(memory_format=torch.channels_last)):
        assert y.is_contiguous(memory_format=torch.channels_last)


@situation('requires_grad=False: nothing of the norm is trained')
def frozen_parameters(norm):
    module = build(norm, requires_grad=False)
    outcome = gradients(module, batch(9))
    assert all(p.grad is None for p in module.norm.parameters())
    assert outcome['x'].any() and outcome['conv.weight'].any()
    finite(outcome)


@situation('shared module called twice before backward')
def shared(norm):
    module = ready(norm)
    before, alone = counts(norm, module), copy.deepcopy(module)
    xs = batch(8), batch(9, (2, 4, 3, 5))
    sum(loss_of(module(x)) for x in xs).backward()
    finite({key: p.grad for key, p in module.named_parameters()}, state(module))
    assert counts(norm, module) == [count + 2 for count in before]
    single = [gradients(alone, x) for x in xs]
    total = {key: single[0][key] + single[1][key] for key in dict(alone.named_parameters())}
    same({key: p.grad for key, p in module.named_parameters()}, total, rtol=1e-4, atol=1e-6)
    same(state(module), state(alone), rtol=1e-5, atol=1e-6)


def _checkpointed(norm, reentrant, link=False):
    plain = ready(norm, link=link)
    saved = copy.deepcopy(plain)
    for seed in range(3):
        ours = gradients(saved, batch(seed + 7), lambda x: checkpoint(saved, x, use_reentrant=reentrant))
        same(ours, gradients(plain, batch(seed + 7)), rtol=1e-6, atol=1e-7)
    same(state(saved), state(plain), rtol=1e-6, atol=1e-7)


@situation('activation checkpointing, reentrant')
def checkpoint_reentrant(norm):
    _checkpointed(norm, True)


@situation('activation checkpointing, non-reentrant')
def checkpoint_non_reentrant(norm):
    _checkpointed(norm, False)


@situation('gradient accumulation: gradients add up, each micro-batch counts')
def accumulation(norm):
    module = ready(norm)
    before, twin = counts(norm, module), copy.deepcopy(module)
    for seed in (8, 9):
        loss_of(module(batch(seed))).backward()
    assert counts(norm, module) == [count + 2 for count in before]
    single = [gradients(twin, batch(seed)) for seed in (8, 9)]  # zeroes gradients in between; no weight moves
    total = {key: single[0][key] + single[1][key] for key in dict(twin.named_parameters())}
    same({key: p.grad for key, p in module.named_parameters()}, total, rtol=1e-4, atol=1e-6)
    same(state(module), state(twin), rtol=1e-6, atol=1e-7)


def _independent(norm, clone_of):
    module = ready(norm)
    clone = clone_of(module)
    before = state(module)
    same(state(clone), before)
    train(clone, (8, 9))
    same(state(module), before)
    train(module, (8, 9))
    same(state(module), state(clone))
    assert torch.equal(module.eval()(batch(5)), clone.eval()(batch(5)))


@situation('deepcopy: independent, goes on alike')
def deep_copy(norm):
    _independent(norm, copy.deepcopy)


@situation('pickle: independent, goes on alike')
def pickled(norm):
    _independent(norm, lambda module: pickle.loads(pickle.dumps(module)))


@situation('EMA of parameters and buffers')
def ema(norm):
    def values(module):
        tensors = [*module.named_parameters(), *module.named_buffers()]
        return {key: value.detach().clone() for key, value in tensors if value.is_floating_point()}

    module = ready(norm)
    average = ExponentialMovingAverage(module, momentum=0.5, update_buffers=True)
    average.update_parameters(module)  # the first call copies
    old = values(module)
    train(module, (8,))
    average.update_parameters(module)
    new = values(module)
    same(values(average.module), {key: (old[key] + new[key]) / 2 for key in old}, rtol=1e-5, atol=1e-6)
    finite(average.module.eval()(batch(9)))


@situation('state dict round trip, strict')
def round_trip(norm):
    module, other = ready(norm), build(norm, seed=1)
    other.load_state_dict(_through_file(state(module)), strict=True)
    same(state(module), state(other))
    assert torch.equal(module.eval()(batch(9)), other.eval()(batch(9)))


def _through_file(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@situation('resume: train k, save, load, train k is train 2k bit for bit')
def resume(norm):
    for k in (2, 4):  # in and past the warm-up of the norms that have one
        straight = build(norm)
        train(straight, range(2 * k))
        first = build(norm)
        optimizer = sgd(first)
        train(first, range(k), optimizer)
        saved = _through_file(dict(model=first.state_dict(), optimizer=optimizer.state_dict()))
        resumed = build(norm, seed=1)
        optimizer = sgd(resumed)
        resumed.load_state_dict(saved['model'], strict=True)
        optimizer.load_state_dict(saved['optimizer'])
        train(resumed, range(k, 2 * k), optimizer)
        same(state(straight), state(resumed))


def _gradcheck(module):
    module = module.double()
    names = [key for key, _ in module.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in module.parameters()]
    x = batch(9, (2, 4, 3, 3), dtype=torch.float64).requires_grad_()

    def run(x, *values):
        # on a copy: the training state must be the same in each evaluation
        return torch.func.functional_call(copy.deepcopy(module), dict(zip(names, values)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True, atol=1e-6)


@situation('gradcheck in float64, training and eval')
def gradcheck(norm):
    for training in (True, False):
        _gradcheck(ready(norm).train(training))


@situation('convert_sync_batchnorm and back: the same keys and eval function')
def sync_and_back(norm):
    module = ready(norm).eval()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module))
    for changed in (converted, revert_sync_batchnorm(copy.deepcopy(converted))):
        same(state(changed), state(module))
        torch.testing.assert_close(changed.eval()(batch(9)), module(batch(9)), rtol=1e-6, atol=1e-6)


def _compiled(norm, link=False, fullgraph=True):
    torch._dynamo.reset()
    eager = ready(norm, link=link)
    module = copy.deepcopy(eager)
    run = torch.compile(module, backend='aot_eager', fullgraph=fullgraph)
    for seed in (7, 8):
        same(gradients(module, batch(seed), run), gradients(eager, batch(seed)), rtol=1e-4, atol=1e-5)
    same(state(module), state(eager), rtol=1e-5, atol=1e-6)
    module.eval(), eager.eval()
    full = torch.compile(module, backend='aot_eager', fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(full(batch(9)), eager(batch(9)), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@situation('torch.compile without graph breaks: forward, backward and state as eager')
def compiled(norm):
    _compiled(norm)


@situation('torch.export of the eval graph')
def exported(norm):
    module = ready(norm).eval()
    program = torch.export.export(module, (batch(8),))
    operators = {str(n.target) for n in program.graph.nodes if n.op == 'call_function'}
    assert not {name for name in operators if not name.startswith('aten.') and 'getitem' not in name}
    torch.testing.assert_close(program.module()(batch(9)), module(batch(9)), rtol=1e-5, atol=1e-5)


ONNX_NEEDS = ('onnx', 'onnxscript', 'onnxruntime')


@situation('ONNX of the eval graph, in onnxruntime')
def onnx_runtime(norm):
    import onnxruntime

    module = ready(norm).eval()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        path = Path(folder) / 'norm.onnx'
        torch.onnx.export(module, (batch(8),), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
        (y,) = session.run(None, {session.get_inputs()[0].name: batch(9).numpy()})
    torch.testing.assert_close(torch.from_numpy(y), module(batch(9)).detach(), rtol=1e-4, atol=1e-5)


def _from_batch_norm(norm, missing=(), unexpected=(), cfg=None, tolerance=1e-5, centred=False):
    """Load what a trained batch norm saved; compare the norms on one map, since CenConv uses other weights.

    Returns the loaded norm, the batch norm, the map, and what was warned of.
    """
    source, target = ready('BN').eval(), build(norm, seed=1, **(cfg or {}))
    if centred:
        source.conv.weight.data -= source.conv.weight.data.mean((1, 2, 3), keepdim=True)
    saved = {re.sub(r'^bn\.', f'{target.norm_name}.', key): value for key, value in state(source).items()}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        report = target.load_state_dict(saved, strict=False)
    prefix = f'{target.norm_name}.'
    assert set(report.missing_keys) == {prefix + name for name in missing}, report.missing_keys
    assert set(report.unexpected_keys) == {prefix + name for name in unexpected}, report.unexpected_keys
    z = source.conv(batch(9)).detach()
    loaded = target.eval().norm
    if hasattr(loaded, 'weight'):
        assert torch.equal(loaded.weight, source.norm.weight)
    torch.testing.assert_close(loaded(z), source.norm(z), rtol=tolerance, atol=tolerance)
    return loaded, source.norm, z, ' '.join(str(warning.message) for warning in said)


@situation('a BN checkpoint loads strictly as the identical eval function')
def batch_norm_checkpoint(norm):
    _from_batch_norm(norm)


# -------------------------------------------------------------------------------------- situations of several processes


def _start(job: str, folder: Path, *args) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': path}
    command = [sys.executable, __file__, job, folder, *args]
    return subprocess.Popen(list(map(str, command)), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def _finish(*processes) -> None:
    try:
        errors = [process.communicate(timeout=200)[1].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()  # nothing, where it has ended
    for process, error in zip(processes, errors):
        assert process.returncode == 0, error


@functools.cache
def _in_other_processes() -> dict:
    """All norms at once, since starting a process takes far longer than a cell: {job: {norm: error or None}}."""
    with tempfile.TemporaryDirectory() as name:
        folder, expected = Path(name), {}
        for norm in NORMS:
            module = build(norm)
            optimizer = sgd(module)
            train(module, range(4), optimizer)
            torch.save(dict(model=module.state_dict(), optimizer=optimizer.state_dict()), folder / f'{norm}.pth')
            train(module, range(4, 8), optimizer)
            expected[norm] = state(module)
        torch.save(expected, folder / 'expected.pt')
        try:
            _finish(_start('resume', folder), *(_start('ddp', folder, rank) for rank in (0, 1)))
        except Exception as error:  # returned, so that each further cell does not try again
            return {job: dict.fromkeys(NORMS, f'{type(error).__name__}: {error}') for job in ('resume', 'ddp')}
        results = {job: torch.load(folder / f'{job}.pt') for job in ('resume', 'ddp-0', 'ddp-1')}
    return dict(resume=results['resume'], ddp={n: results['ddp-0'][n] or results['ddp-1'][n] for n in NORMS})


def _outcome(job, norm):
    error = _in_other_processes()[job][norm]
    assert error is None, error


@situation('resume in a new process, bit for bit')
def resume_in_new_process(norm):
    _outcome('resume', norm)


_DISTRIBUTED = 'DDP, two gloo processes: gradients are averaged, statistics local'


@situation(_DISTRIBUTED)
def distributed(norm):
    _outcome('ddp', norm)


def _resume_here(norm, folder):
    saved = torch.load(folder / f'{norm}.pth', weights_only=True)
    module = build(norm, seed=1)
    module.load_state_dict(saved['model'], strict=True)
    optimizer = sgd(module)
    optimizer.load_state_dict(saved['optimizer'])
    train(module, range(4, 8), optimizer)
    same(torch.load(folder / 'expected.pt', weights_only=True)[norm], state(module))


def _distribute_here(norm, rank):
    """One step of DDP against the same two steps made alone; the synchronized norm against BN on both batches."""
    # SyncBN shares BN's state; warmed up alone, so that the processes start equal
    module = ready('BN' if norm == 'SyncBN' else norm)
    alone = [copy.deepcopy(module) for _ in range(2)]
    if norm == 'SyncBN':
        synced = build(norm)
        synced.load_state_dict(module.state_dict(), strict=True)
        module = synced
        y = alone[0](torch.cat([batch(8), batch(9)]))
        (loss_of(y[:2]) + loss_of(y[2:])).div(2).backward()
        expected = {key: p.grad for key, p in alone[0].named_parameters()}
        expected_state = state(alone[0])
    else:
        steps = [gradients(twin, batch(8 + i)) for i, twin in enumerate(alone)]
        expected = {key: (steps[0][key] + steps[1][key]) / 2 for key in dict(module.named_parameters())}
        expected_state = state(alone[rank])
    wrapped = DistributedDataParallel(module, broadcast_buffers=False)
    loss_of(wrapped(batch(8 + rank))).backward()
    same({key: p.grad for key, p in module.named_parameters()}, expected, rtol=1e-4, atol=1e-6)
    same(state(module), expected_state, rtol=1e-5, atol=1e-6)


def _main(job, folder, rank='0'):
    torch.set_num_threads(1)
    folder, results = Path(folder), {}
    if job == 'ddp':
        torch.distributed.init_process_group(
            'gloo', init_method=f'file://{folder}/rendezvous', rank=int(rank), world_size=2
        )
        job = f'ddp-{rank}'
    for norm in NORMS:
        try:
            _resume_here(norm, folder) if job == 'resume' else _distribute_here(norm, int(rank))
            results[norm] = None
        except Exception as error:  # one cell's failure must not take the other norms along
            results[norm] = f'{type(error).__name__}: {error}'
    torch.save(results, folder / f'{job}.pt')
    if job != 'resume':
        torch.distributed.barrier()
        os._exit(0)  # freeing a DDP model and its gloo group at exit sometimes aborts


# ----------------------------------------------------------------------------------- situations that other tests cover

_L = 'tests/layers/'
ORACLE = {
    'SyncBN': _L + 'test_sync_bn.py::TestAlone::test_forward_equals_the_formula_written_out',
    'FrozenBN': _L + 'test_frozen_bn.py::test_forward_equals_the_formula_written_out',
    'GN': _L + 'test_group_norm.py::test_forward_equals_the_formula_written_out',
    'LN2d': _L + 'test_layer_norm.py::test_forward_equals_the_formula_written_out',
    'BRN': _L + 'test_batch_renorm.py::TestMaths::test_three_training_steps_equal_the_formulas_written_out',
    'BN norm_batch': _L + 'test_ghost.py::TestMaths::test_it_equals_a_batch_norm_for_each_group',
    'BRN norm_batch': _L + 'test_batch_renorm.py::TestNormBatch'
    '::test_each_group_equals_the_formulas_written_out_and_the_batch_counts_once',
    'MABN norm_batch': _L + 'test_mabn_groups.py::TestMaths::test_150_iterations_equal_the_published_variant',
    'SN': _L + 'test_switch_norm.py::test_forward_equals_the_formula_written_out',
    **dict.fromkeys(BNETS, _L + 'test_bnet.py::TestMaths::test_forward_equals_the_formula_written_out'),
    'CBN': _L + 'test_cbn.py::TestMaths::test_a_training_run_equals_the_published_algorithm',
    'MABN': _L + 'test_mabn.py::TestMaths::test_every_phase_equals_the_formulas_written_out',
    'AN-BN': _L + 'test_an.py::TestMaths::test_forward_equals_the_formula_written_out',
    'AN-GN': _L + 'test_an.py::TestMaths::test_forward_equals_the_formula_written_out',
}
GOLDEN = {
    **dict.fromkeys(BNETS, _L + 'test_bnet.py::TestMaths::test_twelve_iterations_equal_the_published_layer'),
    'CBN': _L + 'test_cbn.py::TestMaths::test_twelve_iterations_equal_the_published_layer',
    'MABN': _L + 'test_mabn.py::TestMaths::test_24_iterations_equal_the_published_layer',
    **dict.fromkeys(
        ('AN-BN', 'AN-GN'),
        _L + 'test_an.py::TestMaths::test_outputs_gradients_and_statistics_equal_the_published_layer',
    ),
}


@functools.cache
def _test_module(path: str):
    spec = importlib.util.spec_from_file_location(f'matrix_reference_{Path(path).stem}', ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _test_exists(node_id: str) -> None:
    """Fail unless pytest would collect such a test."""
    path, *names = node_id.split('::')
    found = _test_module(path)
    for name in names:
        assert name.startswith(('Test', 'test_')) and hasattr(found, name), f'there is no {node_id}'
        found = getattr(found, name)
    assert callable(found)


@situation('float64 oracle')
def oracle(norm):
    if norm in ORACLE:
        return _test_exists(ORACLE[norm])
    # torch's own layers are tested where they come from; here, that they are what the name gives
    module = ready(norm).double()
    z = module.conv(batch(9, dtype=torch.float64))
    dims = dict(BN=(0, 2, 3), IN=(2, 3))[norm]
    torch.testing.assert_close(module.norm(z), _over(z, dims, module.norm), rtol=1e-12, atol=1e-12)


@situation('golden numbers of the published layer')
def golden(norm):
    _test_exists(GOLDEN[norm])


# ------------------------------------------------------------------------------------------------------- exceptions


@dataclass(frozen=True)
class Otherwise:
    """A cell that is answered otherwise than by the situation's own check.

    Exactly one of:
        error: type and pattern of the error that the situation must end in.
        check: what holds instead.
        Neither: the situation does not exist for the norm.
    """

    reason: str
    error: tuple[type[Exception], str] | None = None
    check: object = None


def _an_empty_batch_is_counted(norm):
    module = ready(norm)
    before = state(module)
    gradients(module, torch.zeros(0, 4, 6, 6))
    before['bn.num_batches_tracked'] += 1
    same(before, state(module))


def _result_is_contiguous(norm):
    module = ready(norm).norm
    z = batch(9, (2, 8, 6, 5))
    y = module(z.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, module(z), rtol=1e-4, atol=1e-5)
    assert y.is_contiguous()


def _the_window_has_moved(norm):
    module = ready(norm)
    before = counts(norm, module)
    sum(loss_of(module(batch(seed))) for seed in (8, 9)).backward()
    finite({key: p.grad for key, p in module.named_parameters()}, state(module))
    assert counts(norm, module) == [count + 2 for count in before]


def _statistics_count_twice(reentrant):
    def check(norm):
        plain = ready(norm)
        saved = copy.deepcopy(plain)
        ours = gradients(saved, batch(9), lambda x: checkpoint(saved, x, use_reentrant=reentrant))
        same(ours, gradients(plain, batch(9)), rtol=1e-6, atol=1e-7)
        plain.norm(plain.conv(batch(9)))  # once more, as the recomputation did
        same(state(saved), state(plain), rtol=1e-6, atol=1e-7)

    return check


def _raises(error, pattern, function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except error as raised:
        assert re.search(pattern, str(raised)), f'{type(raised).__name__} says something else: {raised}'
    else:
        raise AssertionError(f'no {error.__name__}')


def _needs_links(reentrant):
    def check(norm):
        _raises(RuntimeError, r'call mmdet_norms\.layers\.cbn\.link_convs\(model\)', _checkpointed, norm, reentrant)
        _checkpointed(norm, reentrant, link=True)

    return check


def _gradient_until_the_past_takes_part(norm):
    _gradcheck(build(norm))
    _gradcheck(ready(norm).eval())
    _raises(GradcheckError, 'Jacobian mismatch|Backward is not reentrant', _gradcheck, ready(norm))


def _breaks_the_graph_in_training(norm):
    _raises(torch._dynamo.exc.Unsupported, '_forward_train', _compiled, norm, link=True)
    _compiled(norm, link=True, fullgraph=False)


def _exports_under_another_name(export):
    def check(norm):
        _raises(Exception, r'invalid syntax|Failed to decompose', export, norm)
        layer = ready(norm).norm.eval()
        z = batch(9, (2, 8, 6, 6))
        torch.testing.assert_close(torch.export.export(layer, (z,)).module()(z), layer(z))

    return check


def _cbn_loads(norm):
    _from_batch_norm(norm)
    _from_batch_norm(norm, cfg=dict(eps_in_sqrt=True), tolerance=1e-6)


def _mabn_loads(norm):
    try:
        _from_batch_norm(norm)
    except AnotherFunctionError:
        _from_batch_norm(norm, centred=True)
    else:
        raise AssertionError('weights that the convolution would centre were loaded')


def _sn_loads(norm):
    *_, said = _from_batch_norm(norm)
    assert 'hardly learn' in said


_MABNS = ('MABN', 'MABN norm_batch')
_SINGLE = (ValueError, 'Expected more than 1 value per channel when training')
_SPATIAL = (ValueError, 'Expected more than 1 spatial element when training')
_STATISTICS = ('running_mean', 'running_var', 'num_batches_tracked')
_LOADING = 'a BN checkpoint loads strictly as the identical eval function'
_REENTRANT, _NON_REENTRANT = 'activation checkpointing, reentrant', 'activation checkpointing, non-reentrant'
_TWICE = "torch's batch norm: outputs and gradients are the same, but the statistics count the recomputed batch twice"
_LINKED = (
    'needs `link_convs(model)` once, and is then the same as without checkpointing; without it, a `RuntimeError` says '
    'so'
)
_KEYWORD = (
    'under the attribute name that mmcv gives it, `in`, a Python keyword, torch.export fails with a `SyntaxError`; the '
    'layer itself exports'
)
_ATTENTION = 'attention_weights.attention.'
_NO_NUMBERS = 'no numbers of an independent layer recorded; see the float64 oracle'

EXCEPTIONS = {
    ('BN', 'N = 0: zero gradients, state unchanged'): Otherwise(
        "torch's batch norm: gradients are 0 and the statistics stay, but `num_batches_tracked` counts the empty batch",
        check=_an_empty_batch_is_counted,
    ),
    ('IN', 'N = 0: zero gradients, state unchanged'): Otherwise(
        "torch's instance norm: an `IndexError`; where batches may be empty (RoIs), use GN with a group per channel, "
        'which is the same function',
        error=(IndexError, 'out of range'),
    ),
    ('IN', '1x1 maps'): Otherwise(
        "torch's instance norm: a `ValueError` in training, since a single value per channel has no variance",
        error=_SPATIAL,
    ),
    ('IN', 'a single value per channel'): Otherwise(
        "torch's instance norm: a `ValueError` in training, since a single value per channel has no variance",
        error=_SPATIAL,
    ),
    **{
        (norm, 'a single value per channel'): Otherwise(
            "torch's `ValueError` in training, since a single value has no variance; BNET, AN, BRN, SN, CBN and MABN "
            'document what they return instead',
            error=_SINGLE,
        )
        for norm in ('BN', 'SyncBN')
    },
    ('IN', 'channels_last input: same result, layout kept'): Otherwise(
        "torch's instance norm: the same result, but contiguous", check=_result_is_contiguous
    ),
    **{
        (norm, 'shared module called twice before backward'): Otherwise(
            'each call is an iteration, and finite; gradients are not the sum over calls made one by one, since the '
            "backward window sees the calls' rows in another order",
            check=_the_window_has_moved,
        )
        for norm in _MABNS
    },
    ('BN', _REENTRANT): Otherwise(_TWICE, check=_statistics_count_twice(True)),
    ('BN', _NON_REENTRANT): Otherwise(_TWICE, check=_statistics_count_twice(False)),
    ('CBN', _REENTRANT): Otherwise(_LINKED, check=_needs_links(True)),
    ('CBN', _NON_REENTRANT): Otherwise(_LINKED, check=_needs_links(False)),
    **{
        (norm, 'gradcheck in float64, training and eval'): Otherwise(
            'the true gradient in warm-up and eval; past it r and d count as constants, as published',
            check=_gradient_until_the_past_takes_part,
        )
        for norm in ('BRN', 'BRN norm_batch')
    },
    ('CBN', 'gradcheck in float64, training and eval'): Otherwise(
        'the true gradient in burn-in and eval; past it the history counts as constant, as published (`test_cbn.py` '
        'checks the gradient with the history held constant)',
        check=_gradient_until_the_past_takes_part,
    ),
    **{
        (norm, 'gradcheck in float64, training and eval'): Otherwise(
            'the true gradient in warm-up and eval; past it the backward averages over the window, by design the '
            'derivative of nothing',
            check=_gradient_until_the_past_takes_part,
        )
        for norm in _MABNS
    },
    ('CBN', 'torch.compile without graph breaks: forward, backward and state as eager'): Otherwise(
        'equal to eager with `link_convs(model)`, with a graph break at the layer in training and none in eval',
        check=_breaks_the_graph_in_training,
    ),
    **{
        (norm, 'torch.compile without graph breaks: forward, backward and state as eager'): Otherwise(
            'equal to eager, with a graph break at the layer in training and none in eval',
            check=_breaks_the_graph_in_training,
        )
        for norm in _MABNS
    },
    ('IN', 'torch.export of the eval graph'): Otherwise(_KEYWORD, check=_exports_under_another_name(exported)),
    ('IN', 'ONNX of the eval graph, in onnxruntime'): Otherwise(
        _KEYWORD, check=_exports_under_another_name(onnx_runtime)
    ),
    ('SyncBN', _DISTRIBUTED): Otherwise(
        'statistics are those of all processes: gradients and state equal batch norm on the whole batch',
        check=distributed,
    ),
    ('CBN', _LOADING): Otherwise(
        'loads strictly as the identical function; eps, which the published layer adds outside the root, is worked '
        'into the variance',
        check=_cbn_loads,
    ),
    **{
        (norm, _LOADING): Otherwise(
            'behind a CenConv, which would centre the weights, refused with an `AnotherFunctionError`; behind a plain '
            'convolution or with weights that are centred already the identical function',
            check=_mabn_loads,
        )
        for norm in _MABNS
    },
    ('SN', _LOADING): Otherwise(
        'loads strictly as the identical function: `mean_weight` and `var_weight` put all weight on batch norm. A '
        'warning says that they hardly learn from there',
        check=_sn_loads,
    ),
    **{
        (norm, _LOADING): Otherwise(
            'refused with an `AnotherFunctionError`: without running statistics it would be another function',
            error=(AnotherFunctionError, 'would compute something else'),
        )
        for norm in ('GN', 'LN2d', 'AN-GN')
    },
    ('IN', _LOADING): Otherwise(
        "torch's instance norm refuses running statistics with a `RuntimeError`",
        error=(RuntimeError, r'Unexpected running stats buffer'),
    ),
    **{(norm, 'golden numbers of the published layer'): Otherwise(_NO_NUMBERS) for norm in NORMS if norm not in GOLDEN},
}


def run_cell(norm: str, name: str) -> None:
    """Raise unless the cell is what the matrix says it is."""
    function, other = SITUATIONS[name], EXCEPTIONS.get((norm, name))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only wait for each other on such small maps
    try:
        if other is None:
            function(norm)
        elif other.error:
            _raises(*other.error, function, norm)
        elif other.check:
            other.check(norm)
    finally:
        torch.set_num_threads(threads)


# --------------------------------------------------------------------------------------------------------- document

_HEAD = """\
# Norm x situation

Generated from `tests/matrix/cells.py` by `python tools/make_matrix.py`, which runs every cell; `--check` compares only.
`make test` runs the same cells, and checks that this file names all of them.

✓ passes the check that the row's name stands for. A number: answered otherwise, as the note says, which is tested too.
A dash: does not exist for the norm, see the note. ✗ fails. Every norm stands behind a convolution in mmcv's
`ConvModule` and, unless a row says otherwise, in the middle of its training: past warm-up, burn-in or schedule, with a
filled window.

The rows "float64 oracle" and "golden numbers" point to tests in `tests/layers`: here, a ✓ says that the test exists,
and `make test` runs it. Golden numbers that are not in the checkout are skipped. The ONNX row needs onnx, onnxscript
and onnxruntime, which `make test` installs; without them it is skipped.

"""


def render(failed: frozenset = frozenset()) -> str:
    """The matrix as markdown. Cells that are not in ``failed`` were run, and were as declared."""
    reasons: list[str] = []
    rows = [f'| situation | {" | ".join(NORMS)} |', '|---|' + ':-:|' * len(NORMS)]
    for name in SITUATIONS:
        marks = []
        for norm in NORMS:
            other, mark = EXCEPTIONS.get((norm, name)), '✓'
            if other is not None:
                if other.reason not in reasons:
                    reasons.append(other.reason)
                number = reasons.index(other.reason) + 1
                mark = f'{number}' if other.error or other.check else f'- ({number})'
            marks.append('✗' if (norm, name) in failed else mark)
        rows.append(f'| {name} | {" | ".join(marks)} |')
    notes = [f'{number}. {reason[0].upper()}{reason[1:]}.' for number, reason in enumerate(reasons, 1)]
    built = [f'| {norm} | `{cfg}` | {f"`{conv}`" if conv else ""} |' for norm, (cfg, conv) in NORMS.items()]
    return '\n'.join(
        [
            _HEAD.rstrip('\n') + '\n',
            *rows,
            '',
            '## Notes',
            '',
            *notes,
            '',
            '## Built with',
            '',
            'Schedules are short, so that a few iterations reach what each norm does in the end.',
            '',
            '| norm | `norm_cfg` | `conv_cfg` |',
            '|---|---|---|',
            *built,
            '',
        ]
    )


if __name__ == '__main__':
    _main(*sys.argv[1:])
