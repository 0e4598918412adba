"""Backbones outside the ResNet family with another norm in their blocks: Darknet, CSPDarknet, HRNet and others."""

from collections.abc import Iterator

from mmcv.cnn import ConvModule, build_norm_layer
from mmdet.models.backbones import CSPDarknet, CSPNeXt, Darknet, EfficientNet, HRNet, MobileNetV2
from mmdet.models.backbones.darknet import ResBlock
from mmdet.models.backbones.efficientnet import EdgeResidual
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck
from mmdet.models.layers import InvertedResidual
from mmdet.models.layers.csp_layer import CSPNeXtBlock, DarknetBottleneck
from torch import nn

from ..layers._args import ConfigError
from ..registry import MODELS

_BLOCKS = (ResBlock, DarknetBottleneck, CSPNeXtBlock, InvertedResidual, EdgeResidual, BasicBlock, Bottleneck)


class NormAtBlocks:
    """Mixin for backbones whose stages repeat a block: ``norm_at`` puts another norm at places of every block.

    ``norm_cfg`` stays the norm of everything else: stems, convolutions between blocks, fusions, shortcuts.

    The block is the unit that a shortcut may bridge: ``ResBlock`` of Darknet, ``DarknetBottleneck`` of CSPDarknet,
    ``CSPNeXtBlock`` of CSPNeXt, ``InvertedResidual`` of MobileNetV2 and EfficientNet, ``BasicBlock`` and
    ``Bottleneck`` of HRNet. (CSPDarknet and CSPNeXt leave the shortcut out in their last stage, the others where the
    block changes shape.) A stage is a child of the backbone that holds blocks.

    The norms keep the names that they have in the plain backbone (``conv2.bn``), so its checkpoints load.

    Args:
        norm_at (dict, optional): position -> norm_cfg. ``norm1``, ``norm2``, ...: the norms of a block in the order
            in which they run; ``last``: the last of them. A value may also be a list with one norm_cfg (or None: leave
            ``norm_cfg``) per stage.

    Raises:
        ConfigError: an unknown position, one that a block lacks, a list of the wrong length, one position named twice
            (``last`` and the norm it stands for), or a backbone without norms.
    """

    def __init__(self, *args, norm_at: dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm_at = norm_at or {}
        stages = [[m for m in stage.modules() if isinstance(m, _BLOCKS)] for stage in _children(self)]
        stages = [blocks for blocks in stages if blocks]
        for position, cfg in self.norm_at.items():
            per_stage = _per_stage(position, cfg, len(stages))
            for blocks, stage_cfg in zip(stages, per_stage):
                for block in blocks if stage_cfg is not None else ():
                    _replace(block, position, stage_cfg, self.norm_at)
        if hasattr(self, '_freeze_stages'):
            self._freeze_stages()  # again: the host may have frozen before the norms were replaced

    def train(self, mode: bool = True):
        super().train(mode)
        return self  # as torch does; the host forgets it


def _children(backbone: nn.Module) -> Iterator[nn.Module]:
    """The parts of a backbone, also where a list holds them (EfficientNet)."""
    for child in backbone.children():
        yield from (m for m in child if m is not None) if isinstance(child, nn.ModuleList) else [child]


def _norms(block: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where a block keeps its norms, in the order in which they run: the owner and the name in it."""
    if hasattr(block, 'norm1_name'):
        names = [getattr(block, f'norm{i}_name') for i in (1, 2, 3) if hasattr(block, f'norm{i}_name')]
        return [(block, name) for name in names if isinstance(getattr(block, name, None), nn.Module)]
    return [(m, m.norm_name) for m in block.modules() if isinstance(m, ConvModule) and m.with_norm]


def _per_stage(position: str, cfg: dict | list, num_stages: int) -> list[dict | None]:
    per_stage = [cfg] * num_stages if isinstance(cfg, dict) else list(cfg)
    if len(per_stage) != num_stages:
        raise ConfigError(
            f'norm_at.{position} lists {len(per_stage)} norm_cfgs for a backbone of {num_stages} stages; '
            'write one dict, or one (or None) per stage'
        )
    wrong = next((c for c in per_stage if not (c is None or (isinstance(c, dict) and 'type' in c))), None)
    if wrong is not None:
        raise ConfigError(f"norm_at.{position}={wrong!r} must be a norm_cfg such as dict(type='BNET', kernel_size=5)")
    return per_stage


def _replace(block: nn.Module, position: str, cfg: dict, norm_at: dict) -> None:
    norms = _norms(block)
    places = {f'norm{i}': place for i, place in enumerate(norms, 1)}
    if norms and position == 'last':
        same = f'norm{len(norms)}'
        if same in norm_at:
            raise ConfigError(f'norm_at names one position twice: in {type(block).__name__}, last is {same}; keep one')
        places['last'] = norms[-1]
    if position not in places:
        valid = ', '.join([*places, 'last']) if norms else 'none'
        raise ConfigError(f'norm_at.{position}: {type(block).__name__} has no {position}; choose from: {valid}')
    host, name = places[position]
    old = getattr(host, name)
    channels = getattr(old, 'num_features', None) or old.num_channels  # group norm's name for it
    setattr(host, name, build_norm_layer(cfg, channels)[1])


@MODELS.register_module()
class NormDarknet(NormAtBlocks, Darknet):
    """mmdet's Darknet-53 (YOLOv3) with :class:`NormAtBlocks`'s ``norm_at``; 5 stages, 2 norms per block."""


@MODELS.register_module()
class NormCSPDarknet(NormAtBlocks, CSPDarknet):
    """mmdet's CSPDarknet (YOLOX) with ``norm_at``; 4 stages, 2 norms per block (3 with ``use_depthwise``)."""


@MODELS.register_module()
class NormCSPNeXt(NormAtBlocks, CSPNeXt):
    """mmdet's CSPNeXt (RTMDet) with ``norm_at``; 4 stages, 3 norms per block: 3x3, depthwise, pointwise."""


@MODELS.register_module()
class NormMobileNetV2(NormAtBlocks, MobileNetV2):
    """mmdet's MobileNetV2 with ``norm_at``; 7 stages, 3 norms per block (2 in the first stage, which expands none)."""


@MODELS.register_module()
class NormEfficientNet(NormAtBlocks, EfficientNet):
    """mmdet's EfficientNet with ``norm_at``; 5 stages (fewer for smaller ``out_indices``)."""


@MODELS.register_module()
class NormHRNet(NormAtBlocks, HRNet):
    """mmdet's HRNet with ``norm_at``; 4 stages: one of Bottlenecks, three of BasicBlocks in parallel branches."""
