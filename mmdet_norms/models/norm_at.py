"""A norm per position in mmdet's backbones: BNET-k is "the last norm of every block", not "every norm"."""

from collections.abc import Iterator
from typing import NamedTuple

from mmcv.cnn import ConvModule, build_norm_layer
from mmdet.models.backbones import ResNet
from mmdet.models.backbones.darknet import ResBlock
from mmdet.models.backbones.efficientnet import EdgeResidual
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck
from mmdet.models.layers import InvertedResidual
from mmdet.models.layers.csp_layer import CSPNeXtBlock, DarknetBottleneck
from torch import nn

from ..layers._args import ConfigError

_BLOCKS = (BasicBlock, Bottleneck, ResBlock, DarknetBottleneck, CSPNeXtBlock, InvertedResidual, EdgeResidual)
_IN_RESNETS = ('stem', 'norm1', 'norm2', 'norm3', 'last', 'downsample')


class NormAt:
    """Mixin for mmdet's backbones whose stages repeat a block: ``norm_at`` puts another norm at places of every block.

    ``norm_cfg`` stays the norm of everything else, and all else is the backbone's own: depths, frozen stages,
    ``norm_eval``, ``with_cp``, zero-init of the last norm, init rules. A stage is a child that holds blocks. A block is
    what a shortcut may bridge: ``BasicBlock`` and ``Bottleneck`` of ResNets and HRNet, ``ResBlock`` of Darknet,
    ``DarknetBottleneck`` of CSPDarknet, ``CSPNeXtBlock``, ``InvertedResidual`` of MobileNetV2 and EfficientNet.

    Checkpoints of the plain backbone load. In a ResNet the norm has its own name, and ``layer1.0.bn3.*`` goes to
    ``layer1.0.bnet3.*``; elsewhere names stay (``conv2.bn``).

    Args:
        norm_at (dict, optional): position -> norm_cfg, or a list with one norm_cfg (or None: leave ``norm_cfg``) per
            stage. Positions:

            - ``norm1``, ``norm2``, ``norm3``: of every block, in the order in which they run;
            - ``last``: the last of these, before the residual add (norm3 of Bottleneck, norm2 of BasicBlock);
            - in a ResNet, ``downsample``: the norm of a shortcut's convolution;
            - in a ResNet, ``stem``: the norm(s) of the stem; no list.

    Raises:
        ConfigError: an unknown position, one that a block lacks, a list of the wrong length, or a position named twice
            (``last`` together with the norm it stands for).
    """

    def __init__(self, *args, norm_at: dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm_at = norm_at or {}
        for position, cfg in self.norm_at.items():
            for norm, norm_cfg in _places(self, position, cfg):
                norm.replace(norm_cfg)
        if hasattr(self, '_freeze_stages'):
            self._freeze_stages()  # again: the backbone may have frozen before the norms were replaced

    def train(self, mode: bool = True):
        super().train(mode)
        return self  # as torch does; some backbones forget it


class _Norm(NamedTuple):
    """Where a norm is: the module that has it, and its name there, which ends in ``number`` if it follows the norm."""

    owner: nn.Module
    name: str
    number: str = ''

    def replace(self, norm_cfg: dict) -> None:
        name, layer = build_norm_layer(norm_cfg, self._channels(), postfix=self.number)
        if not self.number:
            setattr(self.owner, self.name, layer)
            return
        children = list(self.owner.named_children())
        self.owner._modules.clear()  # all are added again, in order: conv-BN fusion and people read it
        for key, child in children:
            self.owner.add_module(*((name, layer) if key == self.name else (key, child)))
        setattr(self.owner, f'norm{self.number}_name', name)

    def _channels(self) -> int:
        """Output channels of the convolution in front: the last one that is registered before the norm."""
        names, children = zip(*self.owner.named_children())
        before = children[: names.index(self.name)]
        return next(child.out_channels for child in reversed(before) if hasattr(child, 'out_channels'))


def _places(backbone: nn.Module, position: str, cfg: dict | list) -> Iterator[tuple[_Norm, dict]]:
    """The norms at a position, and the norm_cfg that each gets."""
    in_resnet = isinstance(backbone, ResNet)
    if in_resnet and position not in _IN_RESNETS:
        raise ConfigError(f'norm_at has no position {position!r}; choose from: {", ".join(_IN_RESNETS)}')
    stages = list(_stages(backbone))
    per_stage = _per_stage(position, cfg, len(stages))
    if in_resnet and position == 'stem':
        yield from ((norm, cfg) for norm in _norms_of_stem(backbone))
        return
    for blocks, norm_cfg in zip(stages, per_stage):
        for block in blocks if norm_cfg is not None else ():
            if in_resnet and position == 'downsample':
                norms = [] if block.downsample is None else _norms_in_sequence(block.downsample)
            else:
                norms = [_norm_of_block(block, position, backbone.norm_at, in_resnet)]
            yield from ((norm, norm_cfg) for norm in norms)


def _stages(backbone: nn.Module) -> Iterator[list[nn.Module]]:
    """The blocks of each stage; a list may hold the stages (EfficientNet)."""
    for child in backbone.children():
        for stage in child.children() if isinstance(child, nn.ModuleList) else [child]:
            blocks = [module for module in stage.modules() if isinstance(module, _BLOCKS)]
            if blocks:
                yield blocks


def _per_stage(position: str, cfg: dict | list, num_stages: int) -> list[dict | None]:
    in_list = isinstance(cfg, (list, tuple)) and position != 'stem'
    per_stage = list(cfg) if in_list else [cfg] * num_stages
    if len(per_stage) != num_stages:
        raise ConfigError(
            f'norm_at.{position} lists {len(per_stage)} norm_cfgs for a backbone of {num_stages} stages; '
            'write one dict, or one (or None) per stage'
        )
    for norm_cfg in per_stage:
        is_norm_cfg = isinstance(norm_cfg, dict) and 'type' in norm_cfg
        if not is_norm_cfg and not (in_list and norm_cfg is None):
            raise ConfigError(
                f"norm_at.{position}={norm_cfg!r} must be a norm_cfg such as dict(type='BNET', kernel_size=5)"
            )
    return per_stage


def _norm_of_block(block: nn.Module, position: str, norm_at: dict, in_resnet: bool) -> _Norm:
    kind = type(block).__name__
    norms = _norms_of_block(block, in_resnet)
    if norms and position == 'last':
        position = list(norms)[-1]
        if position in norm_at:
            raise ConfigError(f'norm_at names one position twice: in {kind}, last is {position}; keep one')
    if position not in norms:
        valid = ', '.join([*norms, 'last']) if norms else 'none'
        raise ConfigError(f'norm_at.{position}: {kind} has no {position}; choose from: {valid}')
    return norms[position]


def _norms_of_block(block: nn.Module, in_resnet: bool) -> dict[str, _Norm]:
    """By position, in the order in which they run."""
    if not hasattr(block, 'norm1_name'):
        convs = [module for module in block.modules() if isinstance(module, ConvModule) and module.with_norm]
        return {f'norm{i}': _Norm(conv, conv.norm_name) for i, conv in enumerate(convs, 1)}
    names = {i: getattr(block, f'norm{i}_name', '') for i in '123'}
    there = {i: name for i, name in names.items() if name in block._modules}
    return {f'norm{i}': _Norm(block, name, i if in_resnet else '') for i, name in there.items()}


def _norms_of_stem(backbone: ResNet) -> list[_Norm]:
    return _norms_in_sequence(backbone.stem) if backbone.deep_stem else [_Norm(backbone, backbone.norm1_name, '1')]


def _norms_in_sequence(sequence: nn.Sequential) -> list[_Norm]:
    """In ``conv, norm, (relu), conv, norm, ...`` the norms are what directly follows a convolution."""
    return [_Norm(sequence, str(i)) for i in range(1, len(sequence)) if hasattr(sequence[i - 1], 'out_channels')]
