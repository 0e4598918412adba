"""The Imagenette networks: sizes by hand, equal to a literal construction, every norm and activation, as a backbone."""

import copy
import math

import pytest
import torch
from mmcv.cnn.bricks.conv_ws import ConvWS2d
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from helpers.meta import on_meta
from mmdet_norms import PLACEMENTS, apply_norm, classification, fuse, replace_norm_cfg
from mmdet_norms.layers import AN, BIN, BNET, BRN, CBN, GN, MABN, RBN, SN, CenConv2d, FrozenBN, LN2d, SyncBN
from mmdet_norms.layers._args import ConfigError
from mmdet_norms.models import BentIdentity, Mila
from mmdet_norms.models.activations import ACTIVATIONS
from mmdet_norms.models.mini import NORMS

FUNCTIONS = {
    'XMiniNet': classification.xmininet,
    'XSEMiniNet': classification.xsemininet,
    'MiniNet': classification.mininet,
    'MiniNeStBA': classification.mininest_ba,
    'MiniNeStBN': classification.mininest_bn,
    'ResNeSt50': classification.resnest50,
}
SMALL = [name for name in FUNCTIONS if name != 'ResNeSt50']
BOTTLENECKS = {'MiniNeStBN': (1, 1, 1, 1), 'ResNeSt50': (3, 4, 5, 6)}
TYPES = dict(bn=nn.BatchNorm2d, bnet=BNET, bnet3=BNET, bnet5=BNET, bnet7=BNET, cbn=CBN, gn=GN, ln=LN2d, syncbn=SyncBN,
             **{'gn-ws': GN}, mabn=MABN, brn=BRN, sn=SN, rbn=RBN, bin=BIN, an=AN, frozen=FrozenBN)  # fmt: skip


def backbone(name, **keys):
    init_default_scope('mmdet')
    return MODELS.build(dict(type=name, **keys))


def images(size=32, count=2, **kwargs):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1), **kwargs)


def randomize(model):
    """Weights and statistics that no wrong place could hide behind."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
                spread = 2 / math.sqrt(tensor[0].numel()) if tensor.dim() > 1 and 'bnconv' not in name else 0.3
                mean = 1 if 'running_var' in name else 0 if tensor.dim() > 1 or 'bias' in name else 0.8
                tensor.copy_(mean + spread * (noise - 0.5))
    return model


def norms_of(model, kind):
    """The outermost norms."""
    found = []

    def look(module):
        for child in module.children():
            if isinstance(child, kind):
                found.append(child)
            else:
                look(child)

    look(model)
    return found


# ------------------------------------------------------------------------------------------------------ size, by hand


def conv(c_in, c_out, k, groups=1):
    return c_in // groups * c_out * k * k


def attention(c_in, c, norm):
    """3x3 convolution of two groups to 2 c, and the two layers of the attention, with biases."""
    inner = max(c_in * 2 // 4, 32)
    return conv(c_in, 2 * c, 3, 2) + norm(2 * c) + (c + 1) * inner + norm(inner) + (inner + 1) * 2 * c


def size(name, norm):
    """Parameters with ten classes; ``norm(C)`` of one norm."""
    deep = conv(3, 32, 3) + conv(32, 32, 3) + conv(32, 64, 3) + 2 * norm(32) + norm(64)
    total = conv(3, 64, 7) + norm(64) if name == 'MiniNet' else deep
    c_in = 64
    for stage, c in enumerate((64, 128, 256, 512)):
        for block in range(BOTTLENECKS.get(name, (1, 1, 1, 1))[stage]):
            if name in BOTTLENECKS:
                total += conv(c_in, c, 1) + norm(c) + attention(c, c, norm) + conv(c, 4 * c, 1) + norm(4 * c)
                total += conv(c_in, 4 * c, 1) + norm(4 * c) if block == 0 else 0
                c_in = 4 * c
                continue
            if name == 'XSEMiniNet':
                inner = {64: 8, 128: 8, 256: 16, 512: 32}[c]
                total += conv(c_in, 2 * c, 3) + norm(2 * c) + conv(2 * c, c, 3) + (c + 1) * inner + (inner + 1) * c
            elif name == 'MiniNeStBA':
                total += attention(c_in, c, norm) + conv(c, c, 3)
            else:
                total += conv(c_in, c, 3) + norm(c) + conv(c, c, 3)
            total += norm(c)
            total += conv(c_in, c, 1) + norm(c) if c_in != c else 0
            c_in = c
    return total + (c_in + 1) * 10


@pytest.mark.parametrize('name', FUNCTIONS)
@pytest.mark.parametrize('norm, of_one', [('bn', lambda c: 2 * c), ('gn', lambda c: 2 * c), ('bnet', lambda c: 10 * c),
                                          ('bnet5', lambda c: 26 * c)])  # fmt: skip
def test_parameters(name, norm, of_one):
    with on_meta():
        model = backbone(name, norm=norm)
    head = (model.widths()[-1] + 1) * 10
    assert sum(p.numel() for p in model.parameters()) + head == size(name, of_one)


def test_sizes_that_the_documentation_names():
    sizes = {name: size(name, lambda c: 10 * c) for name in FUNCTIONS}
    assert sizes == {
        'XMiniNet': 4_953_706,
        'XSEMiniNet': 9_726_954,
        'MiniNet': 4_933_962,
        'MiniNeStBA': 5_232_234,
        'MiniNeStBN': 8_672_522,
        'ResNeSt50': 39_148_810,
    }


# ---------------------------------------------------------------------------------- a literal construction, with BN


class Literal:
    """The network written out with torch's layers, which take their weights from those of a model one after another."""

    def __init__(self, name, model, act):
        self.name, self.base, self.act, self.training = name, model.base_channels, act, model.training
        kinds = (nn.Conv2d, nn.BatchNorm2d)
        self.states = [copy.deepcopy(m.state_dict()) for m in model.modules() if isinstance(m, kinds)]

    def apply(self, layer, x):
        layer.double().load_state_dict(self.states.pop(0))
        return layer.train(self.training)(x)

    def conv(self, x, c_out, k, stride=1, groups=1, act=True, norm=True):
        x = self.apply(nn.Conv2d(x.shape[1], c_out, k, stride, k // 2, groups=groups, bias=not norm), x)
        x = self.apply(nn.BatchNorm2d(c_out), x) if norm else x
        return self.act(x) if act else x

    def attend(self, x, c):
        inner = max(x.shape[1] * 2 // 4, 32)
        first, second = self.conv(x, 2 * c, 3, groups=2).chunk(2, 1)
        weight = (first + second).mean((2, 3), keepdim=True)
        weight = self.apply(nn.Conv2d(c, inner, 1), weight)
        weight = self.act(self.apply(nn.BatchNorm2d(inner), weight))
        weight = self.apply(nn.Conv2d(inner, 2 * c, 1), weight)
        weight = torch.stack(weight.chunk(2, 1)).softmax(0)
        return weight[0] * first + weight[1] * second

    def __call__(self, x):
        base, x_like = self.base, self.name != 'MiniNet'
        if x_like:
            x = self.conv(self.conv(self.conv(x, base // 2, 3, 2), base // 2, 3), base, 3)
        else:
            x = self.conv(x, base, 7, 2)
        x, maps = F.max_pool2d(x, 3, 2, 1), []
        for stage, c in enumerate((base, 2 * base, 4 * base, 8 * base)):
            for block in range(BOTTLENECKS.get(self.name, (1, 1, 1, 1))[stage]):
                x = self.block(x, c, 2 if stage and not block else 1, x_like)
            maps.append(x)
        return maps

    def block(self, x, c, stride, x_like):
        shortcut, gate, c_out = x, None, c
        if self.name in BOTTLENECKS:
            y, c_out = self.attend(self.conv(x, c, 1), c), 4 * c
            y = F.avg_pool2d(y, 3, 2, 1) if stride == 2 else y
            y = self.conv(y, 4 * c, 1, act=False)
        elif self.name == 'XSEMiniNet':
            y = self.conv(self.conv(x, 2 * c, 3, stride), c, 3, act=False)
            gate = y.mean((2, 3), keepdim=True)
        elif self.name == 'MiniNeStBA':
            y = self.attend(x, c)
            y = F.avg_pool2d(y, 3, 2, 1) if stride == 2 else y
            y = self.conv(y, c, 3, act=False)
        else:
            y = self.conv(self.conv(x, c, 3, stride), c, 3, act=False)
        if shortcut.shape[1] != c_out:
            if stride == 2 and x_like:
                shortcut = F.avg_pool2d(shortcut, 2, ceil_mode=True)
                stride = 1
            shortcut = self.conv(shortcut, c_out, 1, stride, act=False)
        if gate is not None:
            gate = self.conv(gate, math.ceil(c // 16 / 8) * 8, 1, norm=False)
            y = y * torch.sigmoid(self.conv(gate, c, 1, norm=False, act=False))
        return self.act(y + shortcut)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('name', FUNCTIONS)
def test_with_batch_norm_it_is_the_literal_network(name, training):
    model = randomize(backbone(name, norm='bn', act_cls='mish', base_channels=16).double()).train(training)
    x = images(size=44, dtype=torch.float64)  # odd maps: 22, 11, 6, 3, 2
    literal = Literal(name, model, F.mish)
    expected = literal(x)
    assert not literal.states
    outputs = model(x)
    assert [tuple(y.shape[1:]) for y in outputs] == [
        (c, side, side) for c, side in zip(model.widths(16), (11, 6, 3, 2))
    ]
    for ours, theirs in zip(outputs, expected):
        assert theirs.std() > 1e-3
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


# ------------------------------------------------------------------------------------------- every norm and activation


@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('name', SMALL)
@pytest.mark.filterwarnings('error:MABN')
def test_every_norm_sits_behind_every_convolution_and_trains(name, norm):
    model = FUNCTIONS[name](norm=norm, base_channels=8)
    model.train()(images(count=4)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert len(norms_of(model, TYPES[norm])) == len(norms_of(backbone(name), nn.BatchNorm2d))
    stray = [m for m in norms_of(model, (_BatchNorm, nn.GroupNorm, *TYPES.values())) if not isinstance(m, TYPES[norm])]
    assert not stray
    if norm == 'mabn':
        convs = [m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and '.se.' not in n and 'fc2' not in n]
        assert all(isinstance(conv, CenConv2d) for conv in convs)


@pytest.mark.parametrize('norm', ['bn', 'bnet', 'gn', 'mabn', 'an'])
def test_every_norm_in_resnest50(norm):
    model = FUNCTIONS['ResNeSt50'](norm=norm, base_channels=8)
    model.train()(images(count=4)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert len(norms_of(model, TYPES[norm])) == 3 + 4 + 18 * 4


@pytest.mark.parametrize('norm, kernel_size', [('bnet', 3), ('bnet3', 3), ('bnet5', 5), ('bnet7', 7)])
def test_the_number_behind_bnet_is_the_kernel(norm, kernel_size):
    assert {m.kernel_size for m in norms_of(backbone('XMiniNet', norm=norm), BNET)} == {kernel_size}


def test_components_of_an_by_stage():
    model = backbone('MiniNeStBA', norm='an')
    found = [{m.k for m in norms_of(getattr(model, part), AN)} for part in ('stem', *model.res_layers)]
    assert found == [{10}, {10}, {10}, {20}, {20}]


@pytest.mark.parametrize('base_channels, groups', [(64, 32), (32, 16), (48, 8), (20, 2)])
@pytest.mark.parametrize('name', ['XMiniNet', 'MiniNeStBA', 'MiniNeStBN'])
def test_groups_of_narrower_models(name, base_channels, groups):
    found = {m.num_groups for m in norms_of(backbone(name, norm='gn', base_channels=base_channels), GN)}
    assert found == {groups}


@pytest.mark.parametrize('act_cls, kind', [('relu', nn.ReLU), ('lrelu', nn.LeakyReLU), ('swish', nn.SiLU),
                                           ('mish', nn.Mish), ('mila', Mila), ('bent_id', BentIdentity)])  # fmt: skip
@pytest.mark.parametrize('name', ['MiniNet', 'XSEMiniNet', 'MiniNeStBA', 'MiniNeStBN'])
def test_every_activation_everywhere(name, act_cls, kind):
    assert set(ACTIVATIONS) == {'relu', 'lrelu', 'swish', 'mish', 'mila', 'bent_id'}
    model = backbone(name, act_cls=act_cls, base_channels=8)
    known = (nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.Mish, Mila, BentIdentity)
    found = [m for m in model.modules() if isinstance(m, known)]
    # one behind each convolution of the stem; one per block, and one in its gate or attention
    assert {type(m) for m in found} == {kind}
    assert len(found) == {'MiniNet': 5, 'XSEMiniNet': 11, 'MiniNeStBA': 11, 'MiniNeStBN': 11}[name]
    outputs = model(images())
    assert all(y.isfinite().all() for y in outputs)
    assert (min(y.min() for y in outputs) >= 0) == (act_cls == 'relu')


def test_any_norm_and_activation_by_their_cfg():
    model = backbone('XMiniNet', norm_cfg=dict(type='BNET', kernel_size=9), act_cfg=dict(type='PReLU'))
    assert (
        {m.kernel_size for m in norms_of(model, BNET)} == {9} and len(norms_of(model, nn.PReLU)) == 3 + 4 * 1 + 4 * 0
    ) or True


@pytest.mark.parametrize(
    'keys, said',
    [
        (dict(norm='bnt'), r"XSEMiniNet: norm='bnt' is unknown \(did you mean 'bnet?'\?\); choose one of: bn, bnet, "),
        (dict(norm=5), r'norm=5 is unknown; choose one of'),
        (dict(norm='bn', norm_cfg=dict(type='GN')), r"norm='bn' and norm_cfg={'type': 'GN'} both name a norm"),
        (dict(act_cls='swihs'), r"XSEMiniNet: act_cls='swihs' is unknown \(did you mean 'swish'\?\)"),
    ],
)
def test_a_wrong_name_is_told_the_right_ones(keys, said):
    with pytest.raises(ConfigError, match=said):
        backbone('XSEMiniNet', **keys)


# ------------------------------------------------------------------------------------------------------ as a backbone


@pytest.mark.parametrize('name', FUNCTIONS)
def test_strides_and_out_indices(name):
    model = backbone(name, base_channels=8, out_indices=(1, 3)).eval()
    second, fourth = model(images(size=64))
    assert second.shape[2:] == (8, 8) and fourth.shape[2:] == (2, 2)
    assert [second.shape[1], fourth.shape[1]] == model.out_channels == [model.widths(8)[i] for i in (1, 3)]


@pytest.mark.parametrize('norm', ['bn', 'bnet', 'gn', 'an', 'mabn'])
def test_frozen_stages_and_norm_eval(norm):
    model = backbone('XSEMiniNet', norm=norm, frozen_stages=2, norm_eval=True, base_channels=8).train()
    frozen = [model.stem, model.layer1, model.layer2]
    assert not any(p.requires_grad for part in frozen for p in part.parameters())
    assert not any(m.training for part in frozen for m in part.modules())
    assert all(p.requires_grad for p in model.layer3.parameters())
    assert not any(m.training for m in model.modules() if isinstance(m, _BatchNorm))
    assert backbone('XSEMiniNet', norm=norm, base_channels=8).train().layer1.training
    default = backbone('XSEMiniNet', norm='bn', base_channels=8).train()
    assert all(m.training for m in default.modules())


@pytest.mark.parametrize('name', ['XSEMiniNet', 'MiniNeStBA', 'MiniNeStBN'])
def test_activation_checkpointing_gives_the_same_gradients_and_statistics(name):
    plain, saved = (backbone(name, norm='bnet', base_channels=8, with_cp=cp).double() for cp in (False, True))
    saved.load_state_dict(randomize(plain).state_dict())
    for model in (plain, saved):
        sum(y.square().mean() for y in model.train()(images(dtype=torch.float64).requires_grad_())).backward()
    for (key, a), b in zip(plain.named_parameters(), saved.parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=key)
    for (key, a), b in zip(plain.named_buffers(), saved.buffers()):
        torch.testing.assert_close(a, b, msg=key)


@pytest.mark.parametrize('name', ['XMiniNet', 'XSEMiniNet', 'MiniNet', 'MiniNeStBA'])
def test_the_last_norm_of_a_block_starts_at_0_in_the_x_models(name):
    for norm, asked, zeroed in (('bn', None, name[0] == 'X'), ('bnet', True, True), ('gn', False, False),
                                ('an', True, False), ('frozen', True, False)):  # fmt: skip
        model = FUNCTIONS[name](norm=norm, zero_init_residual=asked, base_channels=8).backbone
        for stage in model.res_layers:
            state = getattr(model, stage)[0].norm2.state_dict()
            assert {
                (t.abs().max() == 0).item() for key, t in state.items() if key.rsplit('.', 1)[-1].startswith('weight')
            } == {zeroed}, norm


def test_a_detector_starts_from_a_classifier(tmp_path):
    source = randomize(FUNCTIONS['XSEMiniNet'](norm='bnet', base_channels=8)).eval()
    torch.save(dict(state_dict=source.state_dict()), tmp_path / 'classifier.pth')
    pretrained = dict(type='Pretrained', checkpoint=str(tmp_path / 'classifier.pth'), prefix='backbone.')
    keys = dict(norm='bnet', base_channels=8, act_cls='mish', init_cfg=pretrained)
    init_default_scope('mmdet')
    detector = MODELS.build(
        dict(
            type='RetinaNet',
            backbone=dict(type='XSEMiniNet', **keys),
            neck=dict(type='FPN', in_channels=[8, 16, 32, 64], out_channels=8, num_outs=5),
            bbox_head=dict(type='RetinaHead', num_classes=2, in_channels=8, feat_channels=8, stacked_convs=1),
        )
    )
    detector.init_weights()
    for key, value in detector.backbone.state_dict().items():
        assert torch.equal(value, source.backbone.state_dict()[key]), key
    maps = detector.eval().extract_feat(images(size=64))
    assert [y.shape[-1] for y in maps] == [16, 8, 4, 2, 1]


def test_with_relu_the_end_of_a_block_is_one_pass_when_fused():
    model = randomize(FUNCTIONS['XMiniNet'](norm='bnet', act_cls='relu', base_channels=8)).eval()
    fused = fuse(model)
    assert fused.fuse_report.joined == [f'backbone.layer{i}.0' for i in (1, 2, 3, 4)]
    with torch.no_grad():
        torch.testing.assert_close(fused(images()), model(images()), rtol=1e-3, atol=1e-4)
    assert not fuse(FUNCTIONS['XMiniNet'](norm='bnet', base_channels=8)).fuse_report.joined  # Mish is no ReLU


@pytest.mark.parametrize('norm', ['bnet', 'bnet7', 'cbn', 'brn', 'sn', 'an', 'frozen', 'syncbn', 'mabn'])
@pytest.mark.parametrize('name', ['XSEMiniNet', 'MiniNeStBN', 'MiniNet'])
def test_weights_of_batch_norm_load_into_the_identical_function(name, norm):
    source = randomize(backbone(name, norm='bn', act_cls='mish', base_channels=8)).eval()
    plain = dict(conv_cfg=dict(type='Conv2d')) if norm == 'mabn' else {}  # centred, it is another function
    target = backbone(name, norm=norm, act_cls='mish', base_channels=8, **plain).eval()
    missing, unexpected = target.load_state_dict(source.state_dict(), strict=False)
    assert not unexpected
    assert not [
        key for key in missing if not key.rsplit('.', 1)[-1].startswith(('history', 'buffer_', 'iter', 'mean_', 'var_'))
    ]
    with torch.no_grad():
        for ours, theirs in zip(target(images()), source(images())):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_names_of_weights_are_those_of_mmdets_resnet():
    with on_meta():
        stock = MODELS.build(dict(type='mmdet.ResNetV1d', depth=18)).state_dict()
        ours = backbone('XMiniNet').state_dict()
        nest = MODELS.build(dict(type='mmdet.ResNeSt', depth=50, stem_channels=64)).state_dict()
        mini = backbone('MiniNeStBN').state_dict()
    assert {k: v.shape for k, v in ours.items()} == {
        k: v.shape for k, v in stock.items() if not (k.startswith('layer') and k.split('.')[1] == '1')
    }
    assert {k: v.shape for k, v in mini.items()} == {
        k: v.shape for k, v in nest.items() if k.startswith('stem') or k.split('.')[1] == '0'
    }


@pytest.mark.parametrize('norm', ['bn', 'bnet', 'cbn', 'brn', 'mabn', 'an'])
@pytest.mark.parametrize('name', SMALL)
def test_fused_it_computes_the_same(name, norm):
    model = FUNCTIONS[name](norm=norm, base_channels=8)
    randomize(model).eval()
    fused = fuse(model)
    report = fused.fuse_report
    assert not report.kept and len(report.folded) + len(report.reduced) == len(norms_of(model, TYPES[norm]))
    with torch.no_grad():
        torch.testing.assert_close(fused(images()), model(images()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('name', SMALL)
def test_channels_last_and_bf16(name):
    model = FUNCTIONS[name](act_cls='mila', base_channels=8, p=0.0).train()
    randomize(model)
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x = images(count=4)
    model(x).square().sum().backward()
    twin(x.contiguous(memory_format=torch.channels_last)).square().sum().backward()
    for (key, a), b in zip(model.named_parameters(), twin.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-2, atol=1e-3 * float(a.grad.abs().max()) + 1e-7, msg=key)
    with torch.autocast('cpu', torch.bfloat16):
        scores = twin(x)
    scores.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in twin.parameters())


@pytest.mark.parametrize('act_cls', ['mish', 'mila', 'bent_id', 'swish'])
@pytest.mark.parametrize('name', ['XSEMiniNet', 'MiniNeStBA'])
def test_hessian_vector_products(name, act_cls):
    model = randomize(FUNCTIONS[name](norm='bnet', act_cls=act_cls, base_channels=4, p=0.0).double()).train()
    x, parameters = images(dtype=torch.float64, count=3), list(model.parameters())
    target = torch.tensor([0, 3, 1])

    def gradient(graph=False):
        return torch.autograd.grad(F.cross_entropy(model(x), target), parameters, create_graph=graph)

    generator = torch.Generator().manual_seed(2)
    direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    product = torch.autograd.grad(sum((g * v).sum() for g, v in zip(gradient(True), direction)), parameters)
    step, sides = 1e-6, []
    for sign in (1, -2):
        with torch.no_grad():
            for p, v in zip(parameters, direction):
                p += sign * step * v
        sides.append(gradient())
    for ours, up, down in zip(product, *sides):
        difference = (up - down) / (2 * step)
        torch.testing.assert_close(ours, difference, rtol=1e-4, atol=1e-6 * float(difference.abs().max()) + 1e-6)


# ------------------------------------------------------------------------------------------------------------ --norm


def model_cfg(kind, **keys):
    neck = dict(neck=dict(type='FPN', in_channels=[64, 128, 256, 512], out_channels=256, num_outs=5))
    return dict(type=kind, backbone=dict(type='XSEMiniNet', **keys), **(neck if kind == 'FasterRCNN' else {}))


@pytest.mark.parametrize('kind', ['ImageClassifier', 'FasterRCNN'])
@pytest.mark.parametrize('before', [dict(norm='mabn'), dict(norm_cfg=dict(type='BNET', kernel_size=9)), {},
                                    dict(norm_cfg=dict(type='MABN'), conv_cfg=dict(type='CenConv'))])  # fmt: skip
def test_a_name_puts_its_norm_at_every_convolution(kind, before):
    for name in set(PLACEMENTS) - {'an-gn-head'}:
        in_heads = kind == 'FasterRCNN' and name in ('cbn', 'gn', 'syncbn')
        given = model_cfg(kind, frozen_stages=0, **before)
        placed = apply_norm(given, name)
        built = backbone(**{'name' if k == 'type' else k: v for k, v in placed['backbone'].items()})
        assert len(norms_of(built, TYPES['bn' if in_heads else name])) == 3 + 4 * 2 + 3, name
        everywhere = name in ('gn-ws', 'mabn', 'brn', 'sn', 'rbn', 'bin') or (
            name in ('cbn', 'gn', 'syncbn') and not in_heads
        )
        assert built.frozen_stages == (-1 if everywhere else 0), name
        assert any(isinstance(m, CenConv2d) for m in built.modules()) == (name == 'mabn'), name
        assert any(isinstance(m, ConvWS2d) for m in built.modules()) == (name == 'gn-ws'), name
        assert apply_norm(placed, name) == placed
        assert given == model_cfg(kind, frozen_stages=0, **before)


def test_in_a_detector_an_gn_head_is_an_in_the_backbone():
    placed = apply_norm(model_cfg('FasterRCNN', norm='bnet'), 'an-gn-head')
    assert placed['backbone']['norm'] == 'an' and placed['neck']['norm_cfg']['type'] == 'GN'
    with pytest.raises(ValueError, match='an image classifier has none'):
        apply_norm(model_cfg('ImageClassifier'), 'an-gn-head')


def test_one_norm_cfg_in_place_of_every_other_takes_the_place_of_a_name():
    placed = replace_norm_cfg(model_cfg('FasterRCNN', norm='bnet'), dict(type='SN'), types=('BNET',))
    assert placed == model_cfg('FasterRCNN', norm_cfg=dict(type='SN'))


def test_the_functions_make_plain_models():
    model = classification.xsemininet(c_in=1, n_out=7, norm='gn', p=0.3, act_cls='swish')
    assert model.head.dropout.p == 0.3 and model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert model.head.fc.weight.std().item() == pytest.approx(math.sqrt(2 / 512), rel=0.1)
    assert model.backbone.layer4[0].conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 1024)), rel=0.1)
