"""What training leaves in a norm, and what copies, checkpoints and conversions make of it."""

import copy
import pickle
import re
import warnings

import torch
from mmengine.model import ExponentialMovingAverage, revert_sync_batchnorm
from mmengine.runner.checkpoint import get_state_dict
from torch import nn
from torch.utils.checkpoint import checkpoint

from .harness import batch, build, counts, finite, gradients, loss_of, ready, same, sgd, state, through_file, train
from .situation import situation


def check_checkpointed(norm, reentrant, link=False):
    plain = ready(norm, link=link)
    saved = copy.deepcopy(plain)

    def twice(run):
        return lambda x: run(x) + 2 * run(x[:1])  # as a head that levels of a pyramid share

    for seed in range(3):
        ours = gradients(saved, batch(seed + 7), twice(lambda x: checkpoint(saved, x, use_reentrant=reentrant)))
        same(ours, gradients(plain, batch(seed + 7), twice(plain)), rtol=1e-6, atol=1e-7)
    same(state(saved), state(plain), rtol=1e-6, atol=1e-7)


@situation('activation checkpointing, reentrant')
def test_checkpoint_reentrant(norm):
    check_checkpointed(norm, True)


@situation('activation checkpointing, non-reentrant')
def test_checkpoint_non_reentrant(norm):
    check_checkpointed(norm, False)


@situation('gradient accumulation: gradients add up, each micro-batch counts')
def test_accumulation(norm):
    module = ready(norm)
    before, twin = counts(module), copy.deepcopy(module)
    for seed in (8, 9):
        loss_of(module(batch(seed))).backward()
    assert counts(module) == [count + 2 for count in before]
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
def test_deep_copy(norm):
    _independent(norm, copy.deepcopy)


@situation('pickle: independent, goes on alike')
def test_pickled(norm):
    _independent(norm, lambda module: pickle.loads(pickle.dumps(module)))


@situation('EMA of parameters and buffers')
def test_ema(norm):
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
def test_round_trip(norm):
    module, other = ready(norm), build(norm, seed=1)
    other.load_state_dict(through_file(state(module)), strict=True)
    same(state(module), state(other))
    assert torch.equal(module.eval()(batch(9)), other.eval()(batch(9)))
    same(get_state_dict(module), state(module))  # what mmengine saves


@situation('resume: train k, save, load, train k is train 2k bit for bit')
def test_resume(norm):
    for k in (2, 4):  # in and past the warm-up of the norms that have one
        straight = build(norm)
        train(straight, range(2 * k))
        first = build(norm)
        optimizer = sgd(first)
        train(first, range(k), optimizer)
        saved = through_file(dict(model=first.state_dict(), optimizer=optimizer.state_dict()))
        resumed = build(norm, seed=1)
        optimizer = sgd(resumed)
        resumed.load_state_dict(saved['model'], strict=True)
        optimizer.load_state_dict(saved['optimizer'])
        train(resumed, range(k, 2 * k), optimizer)
        same(state(straight), state(resumed))


@situation('convert_sync_batchnorm and back: the same keys and eval function')
def test_sync_and_back(norm):
    module, x = ready(norm).double(), batch(9, dtype=torch.float64)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module))
    reverted = revert_sync_batchnorm(copy.deepcopy(converted))
    for changed in (converted, reverted):
        same(state(changed), state(module))
        y = copy.deepcopy(changed).eval()(x)
        torch.testing.assert_close(y, copy.deepcopy(module).eval()(x), rtol=1e-9, atol=1e-9)
    assert all(part.training for part in reverted.modules())
    same(gradients(reverted, x), gradients(module, x), rtol=1e-7, atol=1e-9)
    same(state(reverted), state(module), rtol=1e-9, atol=1e-9)


def load_batch_norm(norm, missing=(), unexpected=(), cfg=None, tolerance=1e-5, centred=False, weight=None):
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
        assert torch.equal(loaded.weight, weight(source.norm.weight) if weight else source.norm.weight)
    torch.testing.assert_close(loaded(z), source.norm(z), rtol=tolerance, atol=tolerance)
    return loaded, source.norm, z, ' '.join(str(warning.message) for warning in said)


@situation('a BN checkpoint loads strictly as the identical eval function')
def test_batch_norm_checkpoint(norm):
    load_batch_norm(norm)
