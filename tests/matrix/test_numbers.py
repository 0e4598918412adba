"""The norms by their numbers: formulas, types, sizes, layouts, gradients."""

import copy

import torch

from mmdet_norms.reference import ReferenceAN, ReferenceBNET, ReferenceCBN, ReferenceGroupedMABN, ReferenceMABN

from .harness import batch, build, counts, finite, gradients, loss_of, ready, same, state
from .norms import BNETS, NORMS
from .situation import situation


def per_channel(values):
    return values.view(1, -1, 1, 1)


def plain(z, norm, bn=None):
    """Batch norm with running statistics, written out; statistics from ``bn``, weight and bias from ``norm``."""
    bn = bn or norm
    x_hat = (z - per_channel(bn.running_mean)) / per_channel(bn.running_var + bn.eps).sqrt()
    return x_hat * per_channel(norm.weight) + per_channel(norm.bias)


def over(z, dims, norm, groups=None):
    shaped = z if groups is None else z.view(len(z), groups, -1)
    var, mean = torch.var_mean(shaped, dims, correction=0, keepdim=True)
    x_hat = ((shaped - mean) / (var + norm.eps).sqrt()).view(z.shape)
    return x_hat * per_channel(norm.weight) + per_channel(norm.bias)


def _sn(z, n):
    sets = [torch.var_mean(z, dims, correction=0, keepdim=True) for dims in ((2, 3), (1, 2, 3))]
    sets.append((per_channel(n.bn.running_var), per_channel(n.bn.running_mean)))
    mean = sum(w * m for w, (_, m) in zip(n.mean_weight.softmax(0), sets))
    var = sum(w * v for w, (v, _) in zip(n.var_weight.softmax(0), sets))
    return (z - mean) / (var + n.eps).sqrt() * per_channel(n.weight) + per_channel(n.bias)


def _rbn(z, n):
    centred = z + per_channel(n.center_weight) * z.mean((2, 3), keepdim=True)
    x_hat = (centred - per_channel(n.bn.running_mean)) / per_channel(n.bn.running_var + n.bn.eps).sqrt()
    gate = per_channel(n.scale_weight) * x_hat.mean((2, 3), keepdim=True) + per_channel(n.scale_bias)
    return x_hat * gate.sigmoid() * per_channel(n.weight) + per_channel(n.bias)


def _bin(z, n):
    rho, var, mean = per_channel(n.gate.clamp(0, 1)), n.bn.running_var, n.bn.running_mean
    of_batch = (z - per_channel(mean)) / per_channel(var + n.bn.eps).sqrt()
    of_instance = torch.nn.functional.instance_norm(z, eps=n.bn.eps)
    return (rho * of_batch + (1 - rho) * of_instance) * per_channel(n.weight) + per_channel(n.bias)


def by(reference_class, *arguments):
    """The reference of a layer, with its arguments of these names and its state."""

    def formula(z, norm):
        reference = reference_class(norm.num_features, **{name: getattr(norm, name) for name in arguments})
        reference.to(z.dtype).load_state_dict(norm.state_dict(), strict=False)  # ours may have a counter and a history
        return reference.eval()(z)

    return formula


EVAL_FORMULA = {
    'BN': plain,
    'SyncBN': plain,
    'FrozenBN': plain,
    'GN': lambda z, n: over(z, 2, n, groups=4),
    'IN': lambda z, n: over(z, (2, 3), n),
    'LN2d': lambda z, n: over(z, 1, n),
    'LN2d CHW': lambda z, n: over(z, (1, 2, 3), n),
    **dict.fromkeys(('BN norm_batch', 'BRN', 'BRN norm_batch'), lambda z, n: plain(z, n.bn)),
    'SN': _sn,
    'RBN': _rbn,
    'BIN': _bin,
    **dict.fromkeys(BNETS, by(ReferenceBNET, 'kernel_size')),
    'CBN': by(ReferenceCBN),
    'MABN': by(ReferenceMABN, 'buffer_size'),
    'MABN norm_batch': by(ReferenceGroupedMABN, 'norm_batch', 'buffer_size'),
    **dict.fromkeys(('AN-BN', 'AN-GN'), by(ReferenceAN, 'norm', 'k', 'num_groups')),
}


@situation('eval is the documented formula and changes no state')
def test_eval_formula(norm):
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
    for training in (True, False):
        module = ready(norm).train(training)
        # eight images: the attention of AN-BN normalizes over images, which for two is a matter of sign
        exact, x = copy.deepcopy(module), batch(9, (8, 4, 6, 6))
        expected = gradients(exact, x)
        with torch.autocast('cpu', dtype=dtype):
            outcome = gradients(module, x)
            assert copy.deepcopy(module.norm).eval()(batch(9, (2, 8, 6, 6))).dtype == torch.float32
        assert outcome['y'].dtype == dtype
        finite(outcome, state(module))
        for key, value in outcome.items():
            if expected[key] is not None:
                distance = (value.float() - expected[key]).norm() / (expected[key].norm() + 1e-3)
                assert distance < tolerance, f'{key} is {distance:.3f} off'
                assert value.dtype == (dtype if key == 'y' else torch.float32), key
        ours, theirs = state(module), state(exact)
        assert all(value.dtype == theirs[key].dtype for key, value in ours.items())
        assert all(v.dtype == torch.float32 for v in ours.values() if v.is_floating_point())
        same(ours, theirs, rtol=tolerance, atol=tolerance)


@situation('bf16 autocast: close to fp32, state stays fp32')
def test_bf16(norm):
    # over single images more cancels in the gradient of the convolution, for torch's batch norm called on each, too
    _autocast(norm, torch.bfloat16, 0.2 if 'norm_batch' in NORMS[norm].cfg else 0.15)


@situation('fp16 autocast: close to fp32, state stays fp32')
def test_fp16(norm):
    _autocast(norm, torch.float16, 0.03)


@situation('N = 0: zero gradients, state unchanged')
def test_no_sample(norm):
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
def test_one_sample(norm):
    _finite_step(norm, batch(9, (1, 4, 6, 6)))


@situation('1x1 maps')
def test_single_pixels(norm):
    _finite_step(norm, batch(9, (3, 4, 1, 1)))


@situation('a single value per channel')
def test_single_value(norm):
    _finite_step(norm, batch(9, (1, 4, 1, 1)))


@situation('constant channels: finite output and gradients')
def test_constant_channels(norm):
    for value in (0.0, 7.0):
        for training in (True, False):
            module = ready(norm).train(training)
            module.conv.padding = (0, 0)  # zeros around the map would make it vary
            finite(gradients(module, torch.full((2, 4, 6, 6), value)), state(module))


@situation('huge means: as in float64')
def test_huge_means(norm):
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
        y, of_plain = b(change(z)), a(z)
        torch.testing.assert_close(y, of_plain, rtol=1e-8, atol=1e-8)
        assert of_plain.is_contiguous()
        same(state(a), state(b), rtol=1e-8, atol=1e-8)
    return module(other), y


@situation('non-contiguous input')
def test_non_contiguous(norm):
    _layout(norm, lambda x: x.transpose(2, 3).contiguous().transpose(2, 3))
    _layout(norm, lambda x: torch.cat([x, x], 1)[:, : x.shape[1]])


@situation('channels_last input: same result, layout kept')
def test_channels_last(norm):
    for y in _layout(norm, lambda x: x.to(memory_format=torch.channels_last)):
        assert y.is_contiguous(memory_format=torch.channels_last)


@situation('requires_grad=False: nothing of the norm is trained')
def test_frozen_parameters(norm):
    module = build(norm, requires_grad=False)
    outcome = gradients(module, batch(9))
    assert all(p.grad is None for p in module.norm.parameters())
    assert outcome['x'].any() and outcome['conv.weight'].any()
    finite(outcome)


@situation('shared module called twice before backward')
def test_shared(norm):
    module = ready(norm)
    before, alone = counts(module), copy.deepcopy(module)
    xs = batch(8), batch(9, (2, 4, 3, 5))
    sum(loss_of(module(x)) for x in xs).backward()
    finite({key: p.grad for key, p in module.named_parameters()}, state(module))
    assert counts(module) == [count + 2 for count in before]
    single = [gradients(alone, x) for x in xs]
    total = {key: single[0][key] + single[1][key] for key in dict(alone.named_parameters())}
    same({key: p.grad for key, p in module.named_parameters()}, total, rtol=1e-4, atol=1e-6)
    same(state(module), state(alone), rtol=1e-5, atol=1e-6)


def check_gradient(module):
    module = module.double()
    names = [key for key, _ in module.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in module.parameters()]
    x = batch(9, (2, 4, 3, 3), dtype=torch.float64).requires_grad_()

    def run(x, *values):
        # on a copy: the training state must be the same in each evaluation
        return torch.func.functional_call(copy.deepcopy(module), dict(zip(names, values)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True, atol=1e-6)


@situation('gradcheck in float64, training and eval')
def test_gradcheck(norm):
    for training in (True, False):
        check_gradient(ready(norm).train(training))
