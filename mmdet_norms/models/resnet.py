"""ResNets with a norm per position: BNET-k is "the third norm of every bottleneck", not "every norm"."""

from collections.abc import Iterator

from mmcv.cnn import build_norm_layer
from mmdet.models.backbones import (
    DetectoRS_ResNet,
    DetectoRS_ResNeXt,
    RegNet,
    Res2Net,
    ResNeSt,
    ResNet,
    ResNetV1d,
    ResNeXt,
    TridentResNet,
)
from mmengine.model import BaseModule
from torch import nn

from ..layers import BNET
from ..layers._args import ConfigError
from ..registry import MODELS

POSITIONS = ('stem', 'norm1', 'norm2', 'norm3', 'last', 'downsample')


class NormAt:
    """Mixin for mmdet's ResNet family: ``norm_at`` puts another norm at named positions.

    ``norm_cfg`` stays the norm of all other positions. Everything else is the host's: depths, styles, frozen stages,
    ``norm_eval``, ``with_cp``, zero-init of the last norm, init rules.

    A checkpoint of the plain backbone loads: ``layer1.0.bn3.*`` goes to the norm that sits there now
    (``layer1.0.bnet3.*``), which turns a batch norm's weights into its own.

    Args:
        norm_at (dict, optional): position -> norm_cfg. Positions:

            - ``norm1``, ``norm2``, ``norm3``: after that convolution of every block (BasicBlock has two);
            - ``last``: the norm before the residual add (norm3 of Bottleneck, norm2 of BasicBlock);
            - ``downsample``: the norm of the shortcut's convolution;
            - ``stem``: the norm(s) of the stem.

            A value may also be a list with one norm_cfg (or None: leave ``norm_cfg``) per stage; not for ``stem``.

    Raises:
        ConfigError: an unknown position, one that the block lacks, a list of the wrong length, or a position named
            twice (``last`` together with the norm it stands for).
    """

    def __init__(self, *args, norm_at: dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm_at = norm_at or {}
        for position, cfg in _checked(self.norm_at, len(self.res_layers)).items():
            if position == 'stem':
                _replace_stem(self, cfg)
                continue
            for stage, stage_cfg in enumerate(cfg):
                for block in _blocks(getattr(self, self.res_layers[stage])):
                    if stage_cfg is not None:
                        _replace_in_block(block, position, stage_cfg)
        _forbid_overlap(self)
        self._freeze_stages()  # again: the host froze before the norms were replaced

    def train(self, mode: bool = True):
        super().train(mode)
        return self  # as torch does; the host forgets it


def _checked(norm_at: dict, num_stages: int) -> dict:
    """``norm_at`` with one norm_cfg per stage behind every position but the stem."""
    checked = {}
    for position, cfg in norm_at.items():
        if position not in POSITIONS:
            raise ConfigError(f'norm_at has no position {position!r}; choose from: {", ".join(POSITIONS)}')
        if position == 'stem' or isinstance(cfg, dict):
            per_stage = [cfg] * num_stages
        else:
            per_stage = list(cfg)
        if len(per_stage) != num_stages:
            raise ConfigError(
                f'norm_at.{position} lists {len(per_stage)} norm_cfgs for a backbone of {num_stages} stages; '
                'write one dict, or one (or None) per stage'
            )
        wrong = next((c for c in per_stage if not (c is None or (isinstance(c, dict) and 'type' in c))), None)
        if wrong is not None:
            raise ConfigError(
                f"norm_at.{position}={wrong!r} must be a norm_cfg such as dict(type='BNET', kernel_size=5)"
            )
        checked[position] = cfg if position == 'stem' else per_stage
    return checked


def _forbid_overlap(backbone: nn.Module) -> None:
    """``last`` is another name for norm2 or norm3: both at once would silently drop one."""
    if 'last' not in backbone.norm_at:
        return
    block = next(_blocks(getattr(backbone, backbone.res_layers[0])))
    same = f'norm{_last_index(block)}'
    if same in backbone.norm_at:
        raise ConfigError(f'norm_at names one position twice: in {type(block).__name__}, last is {same}; keep one')


def _blocks(stage: nn.Module) -> Iterator[nn.Module]:
    return (m for m in stage.children() if isinstance(m, BaseModule))


def _last_index(block: nn.Module) -> int:
    return 3 if hasattr(block, 'norm3_name') else 2


def _replace_in_block(block: nn.Module, position: str, cfg: dict) -> None:
    if position == 'downsample':
        if block.downsample is not None:
            _replace_in_sequence(block.downsample, cfg)
        return
    index = _last_index(block) if position == 'last' else int(position[-1])
    old_name = getattr(block, f'norm{index}_name', None)
    if old_name is None or not hasattr(block, old_name):
        valid = [f'norm{i}' for i in (1, 2, 3) if hasattr(block, getattr(block, f'norm{i}_name', '?'))]
        raise ConfigError(
            f'norm_at.{position}: {type(block).__name__} has no {position}; choose from: {", ".join(valid)}, last'
        )
    channels = _channels_before(block, old_name)
    new_name, layer = build_norm_layer(cfg, channels, postfix=index)
    _swap_child(block, old_name, new_name, layer)
    setattr(block, f'norm{index}_name', new_name)


def _replace_stem(backbone: nn.Module, cfg: dict) -> None:
    if getattr(backbone, 'deep_stem', False):
        _replace_in_sequence(backbone.stem, cfg)
        return
    new_name, layer = build_norm_layer(cfg, _channels_before(backbone, backbone.norm1_name), postfix=1)
    _swap_child(backbone, backbone.norm1_name, new_name, layer)
    backbone.norm1_name = new_name


def _replace_in_sequence(sequence: nn.Sequential, cfg: dict) -> None:
    """In ``conv, norm, (relu), conv, norm, ...`` the norms are what directly follows a convolution."""
    for i in range(1, len(sequence)):
        if hasattr(sequence[i - 1], 'out_channels'):
            sequence[i] = build_norm_layer(cfg, sequence[i - 1].out_channels)[1]


def _channels_before(host: nn.Module, norm_name: str) -> int:
    """Output channels of the convolution registered before the norm."""
    channels = None
    for name, child in host.named_children():
        if name == norm_name:
            return channels
        channels = getattr(child, 'out_channels', channels)
    raise AssertionError(f'{norm_name} is no child of {type(host).__name__}')


def _swap_child(host: nn.Module, old_name: str, new_name: str, layer: nn.Module) -> None:
    """Replace a child in place: conv-BN fusion and people read the order of children."""
    children = [(new_name, layer) if name == old_name else (name, child) for name, child in host.named_children()]
    host._modules.clear()
    for name, child in children:
        host.add_module(name, child)


@MODELS.register_module()
class NormResNet(NormAt, ResNet):
    """mmdet's ResNet (R-18 to R-152) with :class:`NormAt`'s ``norm_at``.

    BNET-5 of the paper: ``norm_at=dict(last=dict(type='BNET', kernel_size=5))``.
    """


@MODELS.register_module()
class NormResNetV1d(NormAt, ResNetV1d):
    """mmdet's ResNetV1d (deep stem, average-pooled shortcut) with ``norm_at``."""


@MODELS.register_module()
class NormResNeXt(NormAt, ResNeXt):
    """mmdet's ResNeXt with ``norm_at``."""


@MODELS.register_module()
class NormRegNet(NormAt, RegNet):
    """mmdet's RegNet with ``norm_at``."""


@MODELS.register_module()
class NormRes2Net(NormAt, Res2Net):
    """mmdet's Res2Net with ``norm_at``; its blocks have no ``norm2``."""


@MODELS.register_module()
class NormResNeSt(NormAt, ResNeSt):
    """mmdet's ResNeSt with ``norm_at``; its blocks have no ``norm2``."""


@MODELS.register_module()
class NormTridentResNet(NormAt, TridentResNet):
    """mmdet's TridentResNet with ``norm_at``; 3 stages. The branches of the last stage share its norms."""


class _DetectoRS(NormAt):
    """DetectoRS zeroes the last norm of each block by its ``weight``, which a BNET does not have itself."""

    def init_weights(self):
        super().init_weights()
        if self.pretrained is not None or not self.zero_init_residual:
            return
        for stage in self.res_layers:
            for block in _blocks(getattr(self, stage)):
                if isinstance(block.norm3, BNET):
                    nn.init.zeros_(block.norm3.bnconv.weight)


@MODELS.register_module()
class NormDetectoRS_ResNet(_DetectoRS, DetectoRS_ResNet):
    """mmdet's DetectoRS_ResNet (recursive feature pyramid, switchable atrous convolution) with ``norm_at``."""


@MODELS.register_module()
class NormDetectoRS_ResNeXt(_DetectoRS, DetectoRS_ResNeXt):
    """mmdet's DetectoRS_ResNeXt with ``norm_at``."""
