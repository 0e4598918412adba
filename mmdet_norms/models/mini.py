"""The small networks of the Imagenette implementation of BNET, as backbones: the norm by name at every convolution.

Stems and shortcuts of the X models are those of fastai's XResNet (He et al., "Bag of Tricks", arXiv:1812.01187); the
squeeze-and-excitation gate is Hu et al.'s (arXiv:1709.01507), split attention Zhang et al.'s (ResNeSt,
arXiv:2004.08955). All are mmdet's ResNet with other blocks, so they are frozen, checkpointed and loaded as that is.
"""

import math
from collections.abc import Mapping

from mmcv.cnn import build_conv_layer, build_norm_layer
from mmdet.models.backbones import ResNet
from mmdet.models.backbones.resnest import Bottleneck as ResNeStBottleneck
from mmdet.models.backbones.resnest import SplitAttentionConv2d
from mmdet.models.backbones.resnet import BasicBlock
from mmdet.models.layers import ResLayer, SELayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..entries import name_of
from ..errors import did_you_mean
from ..layers._args import ConfigError
from ..registry import MODELS
from .activations import act_cfg_of
from .norm_at import NormAt

_BN = dict(type='BN', requires_grad=True)

NORMS = {
    'bn': _BN,
    'bnet': dict(type='BNET', kernel_size=3),
    'bnet3': dict(type='BNET', kernel_size=3),
    'bnet5': dict(type='BNET', kernel_size=5),
    'bnet7': dict(type='BNET', kernel_size=7),
    'cbn': dict(type='CBN'),
    'gn': dict(type='GN', num_groups=32),
    'gn-ws': dict(type='GN', num_groups=32),
    'ln': dict(type='LN2d'),
    'syncbn': dict(type='SyncBN', requires_grad=True),
    'mabn': dict(type='MABN'),
    'brn': dict(type='BRN'),
    'sn': dict(type='SN'),
    'an': dict(type='AN', k=10),
    'frozen': dict(type='FrozenBN'),
}
"""``norm`` -> the ``norm_cfg`` of every convolution. Deviations: 'gn' and 'gn-ws' have fewer groups where 32
do not fit, 'an' has 20 components in stages 3 and 4, and the convolutions are those of :data:`CONVS`."""

CONVS = {'gn-ws': dict(type='ConvWS'), 'mabn': dict(type='CenConv')}
"""``norm`` -> ``conv_cfg``, where it brings one."""

# The paper of AN leaves its mixtures as drawn; a fixed weight of FrozenBN would stay 0.
_NOT_ZEROED = ('AN', 'FrozenBN')


class NormEverywhere(NormAt, ResNet):
    """Base of the networks here: mmdet's ResNet with a norm, an activation and blocks by name.

    Shapes: x ``(N, in_channels, H, W)``; a tuple of maps with strides 4, 8, 16, 32 and ``out_channels`` channels.

    The parts are called as in mmdet's ResNet (``stem``, ``layer1.0.conv1``, ``layer1.0.bn1``), so weights of one norm
    load into another wherever it can be the same function: batch norm's into BNET, for example.

    Args:
        norm: a key of :data:`NORMS`, at every convolution that a norm follows. Default: ``norm_cfg``.
        act_cls: 'relu', 'lrelu', 'swish', 'mish', 'mila' or 'bent_id'. Default 'relu'.
        norm_cfg: any norm, in place of ``norm``. Default BN.
        conv_cfg: of every convolution that a norm follows. Default: that of the norm in :data:`CONVS`, or ``Conv2d``.
        act_cfg: any activation, in place of ``act_cls``.
        norm_eval: running statistics stay as they are in training. Default False, unlike mmdet's: these networks are
            trained from scratch.
        zero_init_residual: the last norm of each block starts at 0 (but for AN, whose paper draws it). Default: that of
            the network.
        kwargs: as for mmdet's ResNet: ``in_channels``, ``base_channels`` (64), ``out_indices`` (all four stages),
            ``frozen_stages``, ``strides``, ``dilations``, ``with_cp``, ``init_cfg`` (Kaiming's rule), ``norm_at`` ...

    Raises:
        ConfigError: an unknown ``norm`` or ``act_cls``; two keys for one thing.
    """

    norms_by_name = NORMS
    """Names that ``--norm`` writes into ``norm``, because the paper of these networks has the norm everywhere."""

    depth: int
    resnet_cfg: dict = {}
    zero_init = False

    def __init__(
        self,
        norm: str | None = None,
        act_cls: str = 'relu',
        norm_cfg: dict = _BN,
        conv_cfg: dict | None = None,
        act_cfg: dict | None = None,
        norm_eval: bool = False,
        zero_init_residual: bool | None = None,
        **kwargs,
    ):
        kind = type(self).__name__
        self.act_cfg = act_cfg_of(kind, act_cls, act_cfg)
        self.norm = norm
        if norm is not None:
            _check_norm(kind, norm, norm_cfg)
            norm_cfg = dict(NORMS[norm])
            if 'num_groups' in norm_cfg:
                norm_cfg['num_groups'] = math.gcd(32, self._narrowest(**kwargs))
            conv_cfg = conv_cfg or CONVS.get(norm)
        self._draws = kwargs.get('init_cfg') is None and kwargs.get('pretrained') is None
        super().__init__(
            depth=self.depth,
            norm_cfg=norm_cfg,
            conv_cfg=conv_cfg,
            norm_eval=norm_eval,
            zero_init_residual=self.zero_init if zero_init_residual is None else zero_init_residual,
            **self.resnet_cfg,
            **kwargs,
        )
        self.out_channels = [self.widths(self.base_channels)[i] for i in self.out_indices]
        _replace_relu(self, self.act_cfg)

    @classmethod
    def widths(cls, base_channels: int = 64) -> list[int]:
        """Channels of the four stages' outputs."""
        return [cls.arch_settings[cls.depth][0].expansion * base_channels * 2**i for i in range(4)]

    @classmethod
    def _narrowest(cls, base_channels: int = 64, stem_channels: int | None = None, **_) -> int:
        """A number that divides as far as all widths do."""
        stem = stem_channels or base_channels
        return math.gcd(base_channels, stem // 2 if 'deep_stem' in cls.resnet_cfg else stem)

    def make_res_layer(self, **kwargs) -> nn.Module:
        """Called by mmdet's ResNet for every stage."""
        stage = len(self.res_layers)
        if self.norm == 'an' and stage > 1:
            kwargs['norm_cfg'] = dict(kwargs['norm_cfg'], k=20)  # as published
        last = 'norm2' if self.block.expansion == 1 else 'norm3'
        zero = dict(type='Constant', val=0, override=dict(name=last))
        zeroed = self.zero_init_residual and self._draws and name_of(kwargs['norm_cfg']) not in _NOT_ZEROED
        kwargs['init_cfg'] = zero if zeroed else None
        return ResLayer(**kwargs)


def _check_norm(kind: str, norm: object, norm_cfg: Mapping) -> None:
    if not isinstance(norm, str) or norm not in NORMS:
        raise ConfigError(
            f'{kind}: norm={norm!r} is unknown{did_you_mean(norm, NORMS)}; choose one of: {", ".join(NORMS)}. '
            "Any other norm goes into norm_cfg, such as dict(type='BNET', kernel_size=9)"
        )
    if norm_cfg != _BN:
        raise ConfigError(f'{kind}: norm={norm!r} and norm_cfg={dict(norm_cfg)} both name a norm; keep one')


def _replace_relu(model: nn.Module, act_cfg: Mapping) -> None:
    """mmdet's blocks and stems have a ReLU of their own."""
    if act_cfg['type'] == 'ReLU':
        return
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.ReLU:
                setattr(parent, name, MODELS.build(act_cfg))


class SEBasicBlock(BasicBlock):
    """Two 3x3 convolutions, the first to twice the width, and a squeeze-and-excitation gate before the sum.

    The gate has ``ceil((C // 16) / 8) * 8`` inner channels, the activation of the network, and a sigmoid.
    """

    def __init__(self, inplanes, planes, stride=1, dilation=1, conv_cfg=None, norm_cfg=_BN, act_cfg=None, **kwargs):
        super().__init__(inplanes, planes, stride, dilation, conv_cfg=conv_cfg, norm_cfg=norm_cfg, **kwargs)
        wide, size = 2 * planes, dict(padding=dilation, dilation=dilation, bias=False)
        self.conv1 = build_conv_layer(conv_cfg, inplanes, wide, 3, stride=stride, **size)
        setattr(self, self.norm1_name, build_norm_layer(norm_cfg, wide, postfix=1)[1])
        self.conv2 = build_conv_layer(conv_cfg, wide, planes, 3, padding=1, bias=False)
        inner = max(math.ceil(planes // 16 / 8) * 8, 8)
        self.se = SELayer(planes, planes / inner, act_cfg=(act_cfg, dict(type='Sigmoid')))

    def forward(self, x: Tensor) -> Tensor:
        return _checkpointed(self, x)

    def branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm1(self.conv1(x)))
        return self.se(self.norm2(self.conv2(x)))


class SplitBasicBlock(BasicBlock):
    """Split attention around the first 3x3 convolution, an average pool for the stride, another 3x3 convolution."""

    def __init__(self, inplanes, planes, stride=1, dilation=1, conv_cfg=None, norm_cfg=_BN, radix=2, **kwargs):
        super().__init__(inplanes, planes, stride, dilation, conv_cfg=conv_cfg, norm_cfg=norm_cfg, **kwargs)
        self.conv1 = SplitAttentionConv2d(
            inplanes,
            planes,
            3,
            padding=dilation,
            dilation=dilation,
            radix=radix,
            conv_cfg=conv_cfg,
            norm_cfg=norm_cfg,
        )
        _conv_as(self.conv1, conv_cfg)
        delattr(self, self.norm1_name)  # the attention has its own
        self.avd_layer = nn.AvgPool2d(3, stride, padding=1) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return _checkpointed(self, x)

    def branch(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.avd_layer(self.conv1(x))))


class SplitBottleneck(ResNeStBottleneck):
    """mmdet's block of ResNeSt, with ``conv_cfg`` in the attention, too."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _conv_as(self.conv2, self.conv_cfg)


def _conv_as(split: SplitAttentionConv2d, conv_cfg: Mapping | None) -> None:
    """Give the convolution of the attention that a norm follows the kind of the others: MABN wants it centred."""
    fc = split.fc1
    split.fc1 = build_conv_layer(conv_cfg, fc.in_channels, fc.out_channels, 1, groups=fc.groups)


def _checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    def forward(x: Tensor) -> Tensor:
        return block.branch(x) + (x if block.downsample is None else block.downsample(x))

    if block.with_cp and x.requires_grad:
        return block.relu(checkpoint(forward, x, use_reentrant=False))
    return block.relu(forward(x))


_X = dict(deep_stem=True, avg_down=True)


@MODELS.register_module()
class XMiniNet(NormEverywhere):
    """XResNet with one basic block per stage (64, 128, 256, 512 channels).

    Stem of three 3x3 convolutions (32, 32, 64; stride 2 in the first) and a max pool; average pool before the 1x1
    convolution of a shortcut that halves the map; the last norm of a block starts at 0, as fastai's does. Arguments:
    :class:`NormEverywhere`.
    """

    depth, arch_settings = 10, {10: (BasicBlock, (1, 1, 1, 1))}
    resnet_cfg, zero_init = _X, True


@MODELS.register_module()
class XSEMiniNet(NormEverywhere):
    """:class:`XMiniNet` with blocks that are twice as wide inside and end in a gate: :class:`SEBasicBlock`."""

    depth, arch_settings = 10, {10: (SEBasicBlock, (1, 1, 1, 1))}
    resnet_cfg, zero_init = _X, True

    def make_res_layer(self, **kwargs) -> nn.Module:
        return super().make_res_layer(act_cfg=self.act_cfg, **kwargs)


@MODELS.register_module()
class MiniNet(NormEverywhere):
    """ResNet with one basic block per stage (64, 128, 256, 512 channels): 7x7 stem, strides in the convolutions.

    Arguments: :class:`NormEverywhere`.
    """

    depth, arch_settings = 10, {10: (BasicBlock, (1, 1, 1, 1))}


@MODELS.register_module()
class MiniNeStBA(NormEverywhere):
    """ResNeSt with one basic block per stage (64, 128, 256, 512 channels), radix 2: :class:`SplitBasicBlock`.

    ResNeSt has bottlenecks only: as there, the attention is at the convolution that would have the stride, and one
    convolution follows it; its width is ``max(in_channels * 2 / 4, 32)``. Arguments: :class:`NormEverywhere`.
    """

    depth, arch_settings = 10, {10: (SplitBasicBlock, (1, 1, 1, 1))}
    resnet_cfg = _X


@MODELS.register_module()
class MiniNeStBN(NormEverywhere):
    """ResNeSt with one bottleneck per stage (256, 512, 1024, 2048 channels), radix 2.

    Deep stem (32, 32, 64), average pools in shortcuts and in place of strides. Arguments: :class:`NormEverywhere`.
    """

    depth, arch_settings = 14, {14: (SplitBottleneck, (1, 1, 1, 1))}
    resnet_cfg = _X


@MODELS.register_module()
class ResNeSt50(NormEverywhere):
    """The ResNeSt-50 of the Imagenette implementation, with 3, 4, 5, 6 blocks in its stages, radix 2.

    That of the paper, 3, 4, 6, 3, is ``NormResNeSt(depth=50, stem_channels=64)``. Arguments: :class:`NormEverywhere`.
    """

    depth, arch_settings = 50, {50: (SplitBottleneck, (3, 4, 5, 6))}
    resnet_cfg = _X
