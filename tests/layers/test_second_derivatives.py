"""Gradients of gradients (``create_graph=True``): exact through every norm, refused by MABN."""

import copy

import pytest
import torch
from mmcv.cnn import ConvModule
from torch import nn
from torch.autograd import grad, gradgradcheck
from torch.utils.checkpoint import checkpoint

from mmdet_norms.engine.tune import tune_mode
from mmdet_norms.kernels import compiled, depthwise
from mmdet_norms.layers import BNET, CBN, MABN, link_convs
from mmdet_norms.layers.bnet import FoldedBNET
from mmdet_norms.reference import ReferenceCBN

NORMS = dict(
    AN=dict(type='AN', k=2),
    AN_GN=dict(type='AN', norm='GN', k=2, num_groups=2),
    BNET1=dict(type='BNET', kernel_size=1),
    BNET3=dict(type='BNET', kernel_size=3),
    BNET7=dict(type='BNET', kernel_size=7),
    BRN=dict(type='BRN'),
    BRN_norm_batch=dict(type='BRN', norm_batch=1),
    CBN_burnin=dict(type='CBN', burnin=100),
    CBN_window=dict(type='CBN', burnin=1, rho=0.0),  # else the gradient is of other constants at other weights
    FrozenBN=dict(type='FrozenBN'),
    BN_norm_batch=dict(type='BN', norm_batch=1),
    GN=dict(type='GN', num_groups=2),
    LN2d=dict(type='LN2d'),
    LN2d_CHW=dict(type='LN2d', over='CHW'),
    SN=dict(type='SN'),
    SyncBN=dict(type='SyncBN'),
)


def double(*shape, layout=torch.contiguous_format):
    return torch.randn(*shape, dtype=torch.double).to(memory_format=layout).requires_grad_()


def net_of(norm_cfg, conv_cfg=None, bias=False):
    """Two convolutions with the norm behind, trained a little, in float64."""
    torch.manual_seed(0)
    options = dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg, act_cfg=None, bias=bias)
    net = nn.Sequential(ConvModule(3, 4, 3, **options), nn.Tanh(), ConvModule(4, 4, 3, **options)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
        link_convs(net)
    for _ in range(4):
        net(torch.randn(2, 3, 8, 8, dtype=torch.double, requires_grad=True))
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p), alpha=0.05)
    return net


def loss_of(net, x, run=lambda net, x: net(x)):
    """On a copy with the same parameters, so that no forward changes the statistics of the next."""
    fresh = copy.deepcopy(net)
    link_convs(fresh)
    for module, own in zip(fresh.modules(), net.modules()):
        module._parameters.update(own._parameters)
    return run(fresh, x).pow(3).sum()


def products(net, x, inputs, direction, run=lambda net, x: net(x)):
    """Hessian-vector product by differentiating twice, and by finite differences of the gradient."""
    gradient = grad(loss_of(net, x, run), inputs, create_graph=True)
    product = grad(sum((g * d).sum() for g, d in zip(gradient, direction)), inputs)
    step, sides = 1e-6, []
    for sign in 1, -1:
        with torch.no_grad():
            for p, d in zip(inputs, direction):
                p += sign * step * d
        sides.append(grad(loss_of(net, x, run), inputs))
        with torch.no_grad():
            for p, d in zip(inputs, direction):
                p -= sign * step * d
    return product, [(a - b) / (2 * step) for a, b in zip(*sides)]


WAYS = {
    'plain': lambda net, x: net(x),
    'channels_last': lambda net, x: net(x.to(memory_format=torch.channels_last)),
    'checkpointed': lambda net, x: checkpoint(net, x, use_reentrant=False),
    'twice': lambda net, x: net[2](net[1](net[0](x)) + net[0](x).sin()),
}


# A second call of a CBN remembers the first, which finite differences move and gradients do not.
CASES = [(norm, way, False) for norm in NORMS for way in WAYS if (norm, way) != ('CBN_window', 'twice')]
CASES += [(norm, 'plain', True) for norm in ('CBN_burnin', 'CBN_window')]


@pytest.mark.parametrize('norm, way, bias', CASES)
def test_hessian_vector_products_are_finite_differences_of_the_gradient(norm, way, bias):
    net, x = net_of(NORMS[norm], bias=bias), double(2, 3, 8, 8)
    inputs = [x, *(p for p in net.parameters() if p.requires_grad)]
    direction = [torch.randn_like(p) for p in inputs]
    for ours, expected in zip(*products(net, x, inputs, direction, WAYS[way])):
        scale = max(float(expected.norm()), 1e-3 * float(direction[0].norm()))
        assert float((ours - expected).norm()) < 1e-5 * scale


@pytest.mark.parametrize('norm', ['BNET3', 'CBN_burnin', 'CBN_window', 'SyncBN'])
def test_the_gradient_is_the_same_with_create_graph(norm):
    net, x = net_of(NORMS[norm]), double(2, 3, 8, 8)
    inputs = [x, *net.parameters()]
    for once, again in zip(grad(loss_of(net, x), inputs), grad(loss_of(net, x), inputs, create_graph=True)):
        torch.testing.assert_close(again, once, rtol=1e-10, atol=1e-10)


@pytest.fixture(params=['compiled', 'torch'])
def way(request, monkeypatch):
    """Both ways of the CPU."""
    if request.param == 'compiled' and not compiled.library():
        pytest.skip('without a C compiler')
    if request.param == 'torch':
        monkeypatch.setattr(compiled, 'library', lambda: None)
    return request.param


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('given', [False, True])
@pytest.mark.parametrize('size', [1, 3, 5, 7])
def test_bnet_kernels(way, size, given, layout):
    x, weight, bias = double(2, 2, 3, 3, layout=layout), double(2, 1, size, size), double(2)
    statistics = (torch.randn(2).double(), torch.rand(2).double() + 0.5) if given else ()

    def function(*inputs):
        return depthwise.normalize_and_convolve(*inputs, 1e-5, *statistics)[0]

    assert type(function(x, weight, bias).grad_fn).__name__ == {'compiled': '_Compiled', 'torch': '_InTorch'}[way] + (
        'Backward'
    )
    assert gradgradcheck(function, (x, weight, bias), double(2, 2, 3, 3))
    weight.requires_grad_(False)
    assert gradgradcheck(lambda x, bias: function(x, weight, bias), (x, bias), double(2, 2, 3, 3))


@pytest.mark.parametrize('mode', ['train', 'eval', 'norm_eval', 'one value'])
def test_bnet_in_each_mode(mode):
    layer = BNET(2).double().train(mode != 'eval')
    layer(torch.randn(2, 2, 3, 3).double())
    if mode == 'norm_eval':
        layer.bn.eval()
    x = double(1, 2, 1, 1) if mode == 'one value' else double(2, 2, 3, 3)
    with torch.no_grad():
        layer.bnconv.weight.add_(torch.randn_like(layer.bnconv.weight))
    assert gradgradcheck(lambda x, *_: copy_with(layer)(x), (x, *layer.parameters()), double(*x.shape))


def copy_with(layer):
    fresh = copy.deepcopy(layer)
    for module, own in zip(fresh.modules(), layer.modules()):
        module._parameters.update(own._parameters)
    return fresh


@pytest.mark.parametrize('residual', [False, True])
def test_folded_bnet(residual):
    layer, x, shortcut = FoldedBNET(2, 3).double().eval(), double(2, 2, 3, 3), double(2, 2, 3, 3)
    with torch.no_grad():
        layer.weight.add_(torch.randn_like(layer.weight))

    def function(x, shortcut, *_):
        return layer(x, shortcut if residual else None).sin()

    assert gradgradcheck(function, (x, shortcut, *layer.parameters()), double(*x.shape))


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('eps_in_sqrt', [False, True])
@pytest.mark.parametrize('window', [False, True])
def test_cbn(window, eps_in_sqrt, layout):
    """History is constant: with the weights of the convolution fixed it is so for finite differences, too."""
    conv, layer = nn.Conv2d(2, 2, 3, bias=False).double(), CBN(2, burnin=0 if window else 9, eps_in_sqrt=eps_in_sqrt)
    layer = layer.double()
    for _ in range(3):
        layer(conv(torch.randn(2, 2, 5, 5).double()))
        with torch.no_grad():
            conv.weight.add_(torch.randn_like(conv.weight), alpha=0.02)

    def function(z, weight, bias):
        fresh = copy.deepcopy(layer)
        fresh._parameters.update(weight=weight, bias=bias)
        return fresh(conv(z))

    layer.weight.data.add_(torch.randn(2).double())
    assert (layer._history is not None and layer._history.length == 3) == window
    assert gradgradcheck(function, (double(1, 2, 4, 5, layout=layout), layer.weight, layer.bias), double(1, 2, 2, 3))


def test_cbn_equals_its_reference_with_constant_history():
    """Also in what reaches the convolution's weight and bias: they move this batch, not what is remembered."""
    torch.manual_seed(0)
    conv, layer, reference = (m.double() for m in (nn.Conv2d(3, 4, 3), CBN(4, burnin=0), ReferenceCBN(4, burnin=0)))
    for _ in range(3):
        y = conv(torch.randn(2, 3, 8, 8, dtype=torch.double))
        layer(y), reference(y, conv.weight)
        with torch.no_grad():
            for p in (*conv.parameters(), *layer.parameters()):
                p.add_(torch.randn_like(p), alpha=0.1)
    assert layer._history.length == len(reference.history) == 3
    x = double(2, 3, 8, 8)
    inputs = x, conv.weight, conv.bias, layer.weight, layer.bias
    direction = [torch.randn_like(p) for p in inputs]
    results = []
    for norm, more in (layer, []), (reference, [conv.weight]):
        norm._parameters.update(layer._parameters)
        gradient = grad(norm(conv(x), *more).pow(3).sum(), inputs, create_graph=True)
        product = grad(sum((g * d).sum() for g, d in zip(gradient, direction)), inputs, create_graph=True)
        third = grad(sum((g * d).sum() for g, d in zip(product, direction)), inputs)
        results.append([*gradient, *product, *third])
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8 * float(expected.norm()))


def test_brn_has_constant_corrections():
    """As in its gradient. Finite differences would move them, too."""
    norm_cfg = dict(type='BRN', warmup_iters=0, r_iters=1, d_iters=1, momentum=0.3)
    layer, x = net_of(norm_cfg)[0].bn, double(2, 4, 5, 5)
    r, d = layer._correction(x.mean((0, 2, 3)).detach(), x.var((0, 2, 3), correction=0).detach(), layer.bn)
    assert (r != 1).any() and (d != 0).any()
    results = []
    for function in (
        lambda: copy_with(layer)(x),
        lambda: nn.functional.batch_norm(x, None, None, r * layer.bn.weight, d * layer.bn.weight + layer.bn.bias, True),
    ):
        inputs = x, layer.bn.weight, layer.bn.bias
        gradient = grad(function().pow(3).sum(), inputs, create_graph=True)
        results.append([*gradient, *grad(sum(g.square().sum() for g in gradient), inputs)])
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected)


def test_cbn_of_constant_and_of_single_values_has_finite_second_derivatives():
    for x in torch.ones(2, 3, 4, 4), torch.randn(1, 3, 1, 1):
        layer, x = CBN(3, burnin=9).double(), x.double().requires_grad_()
        gradient = grad(layer(x).pow(3).sum(), (x, *layer.parameters()), create_graph=True)
        second = grad(sum(g.square().sum() for g in gradient), (x, *layer.parameters()))
        assert all(t.isfinite().all() for t in (*gradient, *second))


@pytest.mark.parametrize('norm', ['FrozenBN', 'BNET3', 'BRN', 'SyncBN'])
def test_tune_mode(norm):
    """Convolution and norm as one function."""
    net = net_of(NORMS[norm])
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    plain, x = copy.deepcopy(net), double(2, 3, 8, 8)
    assert len(tune_mode(net).active) == 2
    direction, results = None, []
    for model in net, plain:
        inputs = [x, *model.parameters()]
        direction = direction or [torch.randn_like(p) for p in inputs]
        gradient = grad(model(x).pow(3).sum(), inputs, create_graph=True)
        product = grad(sum((g * d).sum() for g, d in zip(gradient, direction)), inputs)
        results.append([*gradient, *product])
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * float(expected.norm()))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('norm', ['BNET3', 'CBN_burnin', 'CBN_window'])
def test_other_dtypes(norm, dtype):
    """Gradient penalty in fp32, and under autocast: as in fp64 to their digits."""
    net, x = net_of(NORMS[norm]), torch.randn(2, 3, 8, 8, requires_grad=True)
    penalties = []
    for model in net, net.float():
        z = x.to(next(model.parameters()).dtype)
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32 and z.dtype == torch.float32):
            y = copy.deepcopy(model)(z)
        (gradient,) = grad(y.double().pow(3).sum(), z, create_graph=True)
        (second,) = grad(gradient.double().square().sum(), x)
        penalties.append(second.double())
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert float((penalties[1] - penalties[0]).norm()) < tolerance * float(penalties[0].norm())


@pytest.mark.parametrize('objective', [lambda y: y.pow(3).sum(), lambda y: y.sum()], ids=['cubic', 'linear'])
@pytest.mark.parametrize('place', ['alone', 'in front', 'behind', 'checkpointed'])
def test_mabn_refuses(place, objective):
    """Wherever it is in the net, also where terms would only be lacking (``allow_unused=True``)."""
    parts = dict(alone=[MABN(3)], behind=[BNET(3), nn.Tanh(), MABN(3)]).get(place, [MABN(3), BNET(3)])
    net, x = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), *parts).double(), double(2, 3, 5, 5)
    before = copy.deepcopy(net[-1].state_dict())
    y = checkpoint(net, x, use_reentrant=False) if place == 'checkpointed' else net(x)
    with pytest.raises(RuntimeError, match=r'MABN has no second derivative.*arXiv:2001.06838.*another norm'):
        gradient = grad(objective(y), list(net.parameters()), create_graph=True, allow_unused=True)
        grad(sum(g.square().sum() for g in gradient), list(net.parameters()), allow_unused=True)
    if place == 'alone':
        assert torch.equal(net[-1].buffer_gz, before['buffer_gz'])
    net(x).sum().backward()  # the next step is one as ever


def test_mabn_in_eval_mode_is_an_affine_map():
    layer = MABN(2).double().eval()
    assert gradgradcheck(lambda x, *_: layer(x), (double(2, 2, 3, 3), *layer.parameters()), double(2, 2, 3, 3))


def test_cenconv():
    net = ConvModule(2, 2, 3, conv_cfg=dict(type='CenConv'), act_cfg=None).double()
    assert gradgradcheck(lambda x, *_: net(x), (double(2, 2, 4, 4), *net.parameters()), double(2, 2, 2, 2))


@pytest.mark.parametrize('norm', NORMS)
def test_many_gradients_at_once(norm):
    """``is_grads_batched=True``, which ``hessian(..., vectorize=True)`` uses as well."""
    net, x = net_of(NORMS[norm]), double(2, 3, 8, 8)
    inputs = [x, *(p for p in net.parameters() if p.requires_grad)]
    y = net(x)
    weights = torch.randn(3, *y.shape).double()
    one_by_one = [grad(y, inputs, of_y, retain_graph=True) for of_y in weights]
    for actual, expected in zip(grad(y, inputs, weights, is_grads_batched=True), zip(*one_by_one)):
        expected = torch.stack(expected)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * float(expected.norm()))


@pytest.mark.parametrize('norm', ['BNET3', 'CBN_burnin'])
def test_a_hessian_vectorized(norm):
    block = net_of(NORMS[norm])[0]
    x, w = double(1, 3, 4, 3), double(4, 1, 3, 3) if norm == 'BNET3' else double(4)

    def function(x, w):
        fresh = copy.deepcopy(block)
        getattr(fresh.norm, 'bnconv', fresh.norm)._parameters.update(weight=w)
        return fresh(x).pow(3).sum()

    slow, fast = (torch.autograd.functional.hessian(function, (x, w), vectorize=v) for v in (False, True))
    for actual, expected in zip((*fast[0], *fast[1]), (*slow[0], *slow[1])):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize('norm', ['BNET3', 'CBN_window'])
def test_a_step_of_a_curvature_optimizer(norm):
    """As AdaHessian does it: ``backward(create_graph=True)``, then the diagonal by Hutchinson's estimate."""
    net, x = net_of(NORMS[norm]), torch.randn(2, 3, 8, 8).double()
    net(x.requires_grad_()).pow(3).mean().backward(create_graph=True)
    parameters = list(net.parameters())
    signs = [torch.randint_like(p, 2) * 2 - 1 for p in parameters]
    diagonal = grad([p.grad for p in parameters], parameters, signs, retain_graph=True)
    assert all(d.isfinite().all() and d.any() for d in diagonal)
    for p in parameters:
        p.grad = None  # or the graph keeps itself alive
