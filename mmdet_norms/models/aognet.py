"""AOGNet: a backbone whose blocks are And-Or graphs over channel slices, with batch norm or attentive normalization.

Li, Song, Wu, "AOGNets: Compositional Grammatical Architectures for Deep Learning", CVPR 2019,
https://arxiv.org/abs/1711.05847; with AN: Li, Sun, Wu, ECCV 2020, https://arxiv.org/abs/1908.01259.
Independent implementation from the papers' maths; the graph itself is in :mod:`.aog_grammar`.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from itertools import pairwise
from numbers import Integral, Real

import torch
from mmcv.cnn import build_conv_layer, build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..layers import NORMS as OWN_NORMS
from ..layers import contract_of
from ..layers._args import ConfigError
from ..layers._running_statistics import run_batch_norm
from ..registry import MODELS
from .aog_grammar import AND, TERMINAL, Grammar, Node, build_grammar

NORMS = ('BN', 'AN')


def _tuple(key: str, values, of: type, low: float) -> tuple:
    numbers = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    if not numbers or any(isinstance(v, bool) or not isinstance(v, of) or not v >= low for v in values):
        kind = 'integers' if of is Integral else 'numbers'
        raise ConfigError(f'AOGNet: {key}={values!r} must be a list of {kind}, each at least {low}')
    return tuple(values)


@dataclass(frozen=True)
class Arch:
    """What an AOGNet is made of; one entry per stage where it is a tuple.

    Args:
        filter_list: channels of the stem, then of each stage's output.
        blocks: AOG blocks per stage.
        dims: cells of the grammar, i.e. slices that a block cuts its channels into. Default (2, 2, 4, 4).
        pruning: which splits the grammar keeps, see :func:`.aog_grammar.build_grammar`. Default (1, 2, 1, 2).
        dropout: rate of the ``Dropout2d`` at the end of every node's branch. Default (0, 0, 0.1, 0.1).
        lateral: the grammar's lateral edges. Default True.
        bottleneck_ratio: inner over outer channels of a node, at least 4 inner ones. Default 0.25.

    Raises:
        ConfigError: an entry is missing, unknown or out of range; a width that its grid does not divide.
    """

    filter_list: tuple[int, ...]
    blocks: tuple[int, ...]
    dims: tuple[int, ...] = (2, 2, 4, 4)
    pruning: tuple[int, ...] = (1, 2, 1, 2)
    dropout: tuple[float, ...] = (0.0, 0.0, 0.1, 0.1)
    lateral: bool = True
    bottleneck_ratio: float = 0.25

    def __post_init__(self):
        stages = len(_tuple('arch.blocks', self.blocks, Integral, 1))
        for key, of, low in (('blocks', Integral, 1), ('dims', Integral, 1), ('pruning', Integral, 0),
                             ('dropout', Real, 0), ('filter_list', Integral, 1)):  # fmt: skip
            values = _tuple(f'arch.{key}', getattr(self, key), of, low)
            expected = stages + (key == 'filter_list')
            if len(values) != expected:
                after = f', after {values[0]} for the stem' if key == 'filter_list' else ''
                raise ConfigError(
                    f'AOGNet: arch.{key}={list(values)} has {len(values)} entries, but arch.blocks={list(self.blocks)} '
                    f'says {stages} stages; write one per stage{after}'
                )
            object.__setattr__(self, key, values)
        if max(self.dropout) >= 1:
            raise ConfigError(f'AOGNet: arch.dropout={list(self.dropout)} must be rates below 1; 0 for none')
        ratio = self.bottleneck_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, Real) or ratio <= 0:
            raise ConfigError(f'AOGNet: arch.bottleneck_ratio={ratio!r} must be a number above 0; AOGNets have 0.25')
        if self.filter_list[0] % 2:
            raise ConfigError(
                f'AOGNet: arch.filter_list[0]={self.filter_list[0]}, the channels of the stem, must be even, because '
                'its first convolutions have half of them'
            )
        for stage, cells in enumerate(self.dims):
            for i in (stage, stage + 1):
                self._check_width(i, stage, cells)

    def _check_width(self, i: int, stage: int, cells: int) -> None:
        width = self.filter_list[i]
        if width % cells:
            lower = width - width % cells
            choice = ' or '.join(str(w) for w in (lower, lower + cells) if w)
            raise ConfigError(
                f'AOGNet: arch.filter_list[{i}]={width}, {"input" if i == stage else "output"} channels of stage '
                f'{stage}, does not divide into the arch.dims[{stage}]={cells} slices of its blocks; write {choice}, '
                f'or other dims'
            )

    @property
    def num_stages(self) -> int:
        return len(self.blocks)

    def widths(self, stage: int) -> list[int]:
        """Channels of the stage's input, then of each block's output: equal steps, rounded to whole slices."""
        first, last = self.filter_list[stage : stage + 2]
        count, cells = self.blocks[stage], self.dims[stage]
        step = (last - first) // count
        excess = step % cells
        step += cells - excess if 2 * excess > cells else -excess
        widths = [first + i * step for i in range(count)] + [last]
        if min(widths) < 1:
            raise ConfigError(
                f'AOGNet: arch.blocks[{stage}]={count} blocks of arch.dims[{stage}]={cells} slices cannot lead from '
                f'{first} to {last} channels (arch.filter_list), as rounding gives {widths}; use fewer blocks'
            )
        return widths

    def mid_channels(self, channels: int) -> int:
        """Inner channels of a node; halves are rounded up."""
        return max(4, int(self.bottleneck_ratio * channels + 0.5))


ARCHS = {
    '12m': Arch(filter_list=(32, 128, 256, 512, 824), blocks=(2, 2, 2, 1)),
    '40m': Arch(filter_list=(56, 224, 448, 896, 1400), blocks=(2, 2, 3, 1)),
}
"""The published architectures by name."""


def _arch(arch) -> Arch:
    if isinstance(arch, Arch):
        return arch
    if isinstance(arch, Mapping):
        valid = [field.name for field in fields(Arch)]
        unknown = next((key for key in arch if key not in valid), None)
        if unknown is not None:
            raise ConfigError(f'AOGNet: arch has an unknown key {unknown!r}; valid keys: {", ".join(valid)}')
        missing = next((key for key in ('filter_list', 'blocks') if key not in arch), None)
        if missing is not None:
            raise ConfigError(f'AOGNet: arch={dict(arch)} lacks {missing!r}; see mmdet_norms.models.aognet.Arch')
        return Arch(**arch)
    if not isinstance(arch, str) or arch not in ARCHS:
        raise ConfigError(
            f'AOGNet: arch={arch!r} is unknown; choose one of: {", ".join(ARCHS)}, or write a dict such as '
            'dict(filter_list=(32, 128, 256, 512, 824), blocks=(2, 2, 2, 1))'
        )
    return ARCHS[arch]


@dataclass(frozen=True)
class Layers:
    """How the convolutions and norms of a stage are built.

    Args:
        conv_cfg: of every convolution.
        norm_cfg: of every norm but the attentive ones.
        attentive_cfg: of the norm behind the 3x3 convolution of nodes that span all cells.
    """

    conv_cfg: Mapping | None
    norm_cfg: Mapping
    attentive_cfg: Mapping

    def conv(self, in_channels: int, out_channels: int, kernel_size: int, stride: int) -> nn.Module:
        padding = kernel_size // 2
        return build_conv_layer(self.conv_cfg, in_channels, out_channels, kernel_size, stride, padding, bias=False)

    def norm(self, channels: int, attentive: bool = False) -> nn.Module:
        return build_norm_layer(self.attentive_cfg if attentive else self.norm_cfg, channels)[1]


def _normalize(norm: nn.Module, x: Tensor) -> Tensor:
    """Call a norm; a plain batch norm with the care for tiny and repeated batches that the package's own ones take."""
    return norm(x) if isinstance(norm, tuple(OWN_NORMS.values())) else run_batch_norm(norm, x)


class ConvNorm(nn.Module):
    """Convolution, norm and perhaps dropout. Named as in the checkpoints."""

    def __init__(self, layers, in_channels, out_channels, kernel_size, stride=1, attentive=False, dropout=0.0):
        super().__init__()
        self.conv_norm = nn.Sequential(
            layers.conv(in_channels, out_channels, kernel_size, stride),
            layers.norm(out_channels, attentive),
            *([nn.Dropout2d(dropout)] if dropout else []),
        )

    def forward(self, x: Tensor) -> Tensor:
        conv, norm, *dropout = self.conv_norm
        x = _normalize(norm, conv(x))
        return dropout[0](x) if dropout else x


class ConvNormReLU(nn.Module):
    """Convolution, norm and ReLU."""

    def __init__(self, layers, in_channels, out_channels, kernel_size, **kwargs):
        super().__init__()
        self.conv_norm = ConvNorm(layers, in_channels, out_channels, kernel_size, **kwargs)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv_norm(x))


class NodeOp(nn.Module):
    r"""The operation of every node: a bottleneck with an input for the branch and one for the residual.

    .. math::
        F(p, r) = \mathrm{ReLU}(\mathrm{branch}(p) + S(r))

    The branch is 1x1, 3x3, 1x1 convolution, each with its norm, the first two with ReLU, the last with dropout. S is
    the identity, or 1x1 convolution and norm where the widths of input and output differ.

    Shapes: p and r ``(N, in_channels, H, W)``, the result ``(N, out_channels, H, W)``.
    """

    def __init__(self, layers, in_channels, out_channels, mid_channels, attentive, dropout):
        super().__init__()
        self.conv_norm_ac_1 = ConvNormReLU(layers, in_channels, mid_channels, 1)
        self.conv_norm_ac_2 = ConvNormReLU(layers, mid_channels, mid_channels, 3, attentive=attentive)
        self.conv_norm_3 = ConvNorm(layers, mid_channels, out_channels, 1, dropout=dropout)
        if in_channels != out_channels:
            self.shortcut = ConvNorm(layers, in_channels, out_channels, 1)
        else:
            self.shortcut = nn.Identity()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, p: Tensor, r: Tensor) -> Tensor:
        branch = self.conv_norm_3(self.conv_norm_ac_2(self.conv_norm_ac_1(p)))
        return self.relu(branch + self.shortcut(r))


class AOGBlock(nn.Module):
    """An And-Or graph whose nodes are :class:`NodeOp`; the root's output, normalized once more, is the block's.

    - A terminal takes its slice of the block's channels, and is the only one to change their number.
    - An AND concatenates its children, an OR sums them. The residual input scales each by ``residual_scale``.
    - A lateral child is added; to the residual input as well if it is among ``residual_lateral``.

    Shapes: x ``(N, in_channels, H, W)``, the result ``(N, out_channels, H, W)``.

    Args:
        name: of the block; the ops are its children ``{name}_node_{id}_op``, registered in order of evaluation.
        grammar: the graph.
        layers: how convolutions and norms are built.
        in_channels, out_channels: multiples of the number of cells.
        arch: says the nodes' inner width.
        dropout: rate in every node.
        with_cp: recompute the block in the backward pass instead of keeping its maps.
    """

    def __init__(self, name, grammar, layers, in_channels, out_channels, arch, dropout=0.0, with_cp=False):
        super().__init__()
        self.name = name
        self.grammar: Grammar = grammar
        self.with_cp = with_cp
        self.cell_in, self.cell_out = in_channels // grammar.grid, out_channels // grammar.grid
        for node in (grammar.nodes[i] for i in grammar.order):
            width = node.symbol.width
            channels = width * self.cell_out
            op = NodeOp(
                layers,
                width * self.cell_in if node.symbol.kind == TERMINAL else channels,
                channels,
                arch.mid_channels(channels),
                attentive=width == grammar.grid,
                dropout=dropout,
            )
            self.add_module(self._op_name(node), op)
        last = layers.norm(out_channels)
        if contract_of(last).behind == 'Conv2d':
            raise ConfigError(
                "AOGNet: norm_cfg.type='CBN' corrects the statistics by the weights of the convolution before it, and "
                'the last norm of an AOG block has none before it; choose another norm'
            )
        self.extra_norm_ac = nn.Sequential(last, nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        if self.with_cp and self.training and torch.is_grad_enabled():
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        made: dict[int, Tensor] = {}
        for node in (self.grammar.nodes[i] for i in self.grammar.order):
            p, r = self._slices(node, x) if node.symbol.kind == TERMINAL else _combine(node, made)
            made[node.id] = getattr(self, self._op_name(node))(p, r)
        norm, relu = self.extra_norm_ac
        return relu(_normalize(norm, made[0]))

    def _op_name(self, node: Node) -> str:
        return f'{self.name}_node_{node.id}_op'

    def _slices(self, node: Node, x: Tensor) -> tuple[Tensor, Tensor]:
        part = x[:, node.symbol.first * self.cell_in : (node.symbol.last + 1) * self.cell_in]
        return part, part

    def extra_repr(self) -> str:
        return f'grid={self.grammar.grid}, {len(self.grammar.nodes)} nodes, with_cp={self.with_cp}'


def _combine(node: Node, made: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
    """Inputs of an AND or OR for branch and residual."""
    parts = [made[i] for i in node.children]
    p = r = _join(node.symbol.kind, parts)
    if any(scale != 1 for scale in node.residual_scale):
        r = _join(node.symbol.kind, [part * scale for part, scale in zip(parts, node.residual_scale)])
    for i in node.lateral:
        p = p + made[i]
    for i in node.residual_lateral:
        r = r + made[i]
    return p, r


def _join(kind: str, parts: list[Tensor]) -> Tensor:
    return torch.cat(parts, 1) if kind == AND else reduce(torch.add, parts)


@MODELS.register_module()
class AOGNet(BaseModule):
    r"""AOGNet-12m, AOGNet-40m, or any other one that an ``arch`` dict describes.

    stem -> stage 0 -> ... -> stage 3. The stem is three 3x3 convolutions (the first with stride 2) and a 2x2 max pool.
    A stage is a number of :class:`AOGBlock`; each but the first halves the map before, by a 1x1 convolution with norm
    and ReLU, and a 2x2 average pool. ``print(backbone.grammars[2])`` shows the graph of stage 2.

    ===========  ======================  ==================  ======================
    ``arch``     output channels         parameters          with ``norm='AN'``
    ===========  ======================  ==================  ======================
    ``'12m'``    128, 256, 512, 824      11 434 099          11 548 355
    ``'40m'``    224, 448, 896, 1400     38 752 004          38 987 880
    ===========  ======================  ==================  ======================

    The output channels are the ``in_channels`` of an FPN, and the attribute ``out_channels``.

    Shapes: x ``(N, in_channels, H, W)``, H and W at least 32; a tuple of maps with strides 4, 8, 16, 32 (rounded down:
    pad images to a multiple of 32, as mmdet does).

    State dict: the published keys in the published order. The authors' ImageNet files put ``module.network.`` before
    them: convert them (``tools/convert_checkpoint.py --from aognet``), or load one with
    ``init_cfg=dict(type='Pretrained', checkpoint=FILE, prefix='module.network')``. Weights of ``norm='BN'`` load into
    ``norm='AN'`` as the same function.

    Where torch's batch norm fails or counts twice, plain positions behave as :class:`~mmdet_norms.layers.AN` does: a
    1x1 map of one image is normalized with the running statistics, and a block that activation checkpointing repeats
    does not update them again.

    Args:
        arch: '12m', '40m', or a dict with the arguments of :class:`Arch`. Default '12m'.
        norm: 'BN' has ``norm_cfg`` everywhere; 'AN' puts attentive normalization behind the 3x3 convolution of every
            node that spans all cells, 24 in the 12m and 28 in the 40m, as published. Default 'BN'.
        in_channels: of the image. Default 3.
        norm_k: components of the AN layers, per stage or one number. Default (10, 10, 20, 20), as published. Not used
            with ``norm='BN'``.
        norm_cfg: the norm of all positions that AN does not take. Default ``dict(type='BN', requires_grad=True)``.
            With ``type='SyncBN'``, AN keeps the statistics of its own process; ``sync_bn='torch'`` in the runner's
            config synchronizes both.
        conv_cfg: of every convolution; MABN wants ``dict(type='CenConv')``. Default None: ``Conv2d``.
        out_indices: stages that are returned. Default all four.
        frozen_stages: -1 none, 0 the stem, i the stem and the first i stages: no gradients, eval mode, right after the
            construction too. Default -1; published detectors have 1.
        norm_eval: running statistics stay as they are in training, those of AN's attention included. Dropout remains
            active. Default True, as published.
        with_cp: recompute each block in the backward pass: less memory, more time. Default False.
        init_cfg: mmengine's; for weights ``dict(type='Pretrained', checkpoint=...)``. Default None: Kaiming's normal
            rule (fan-out, ReLU) for convolutions, 1 and 0 for norms; AN's mixtures N(1, 0.1) and N(0, 0.1).

    Raises:
        ConfigError: unknown ``arch`` or ``norm``; widths that do not divide into the grid; ``norm_k``, ``out_indices``
            or ``frozen_stages`` that do not fit the stages; CBN, which needs a convolution before every norm.

    Source: arXiv:1711.05847, section 3; arXiv:1908.01259, section 4.
    """

    def __init__(
        self,
        arch: str | Mapping | Arch = '12m',
        norm: str = 'BN',
        in_channels: int = 3,
        norm_k: int | Sequence[int] = (10, 10, 20, 20),
        norm_cfg: Mapping = dict(type='BN', requires_grad=True),
        conv_cfg: Mapping | None = None,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = True,
        with_cp: bool = False,
        init_cfg: Mapping | Sequence[Mapping] | None = None,
    ):
        default_init = [
            dict(type='Kaiming', layer='Conv2d'),
            dict(type='Constant', val=1, layer=['_BatchNorm', 'GroupNorm']),
        ]
        super().__init__(init_cfg or default_init)
        self.arch = _arch(arch)
        stages = self.arch.num_stages
        if norm not in NORMS:
            raise ConfigError(
                f"AOGNet: norm={norm!r} is unknown; choose 'BN' (norm_cfg everywhere) or 'AN'; another norm goes into "
                'norm_cfg'
            )
        self.norm = norm
        self.norm_k = _per_stage_k(norm_k, stages) if norm == 'AN' else None
        self.out_indices = _checked_out_indices(out_indices, stages)
        if isinstance(frozen_stages, bool) or frozen_stages not in range(-1, stages + 1):
            raise ConfigError(
                f'AOGNet: frozen_stages={frozen_stages!r} must be -1 (none), 0 (the stem) or up to {stages} (the stem '
                'and that many stages)'
            )
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.with_cp = with_cp
        self.out_channels = [self.arch.filter_list[i + 1] for i in self.out_indices]
        self.grammars = [build_grammar(n, p, self.arch.lateral) for n, p in zip(self.arch.dims, self.arch.pruning)]

        self.stem = _stem(Layers(conv_cfg, norm_cfg, norm_cfg), in_channels, self.arch.filter_list[0])
        for i in range(stages):
            attentive_cfg = dict(type='AN', norm='BN', k=self.norm_k[i]) if norm == 'AN' else norm_cfg
            self.add_module(f'stage{i}', self._stage(i, Layers(conv_cfg, norm_cfg, attentive_cfg)))
        self._freeze_stages()

    def _stage(self, stage: int, layers: Layers) -> nn.Sequential:
        widths = self.arch.widths(stage)
        parts = OrderedDict()
        if stage > 0:
            parts[f'stage_{stage}_block_0_transition'] = nn.Sequential(
                ConvNormReLU(layers, widths[0], widths[0], 1), nn.AvgPool2d(2, 2)
            )
        for i, (in_channels, out_channels) in enumerate(pairwise(widths)):
            name = f'stage_{stage}_block_{i}'
            parts[name] = AOGBlock(
                name,
                self.grammars[stage],
                layers,
                in_channels,
                out_channels,
                self.arch,
                self.arch.dropout[stage],
                self.with_cp,
            )
        return nn.Sequential(parts)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x)
        maps = []
        for i in range(max(self.out_indices) + 1):
            x = getattr(self, f'stage{i}')(x)
            maps.append(x)
        return tuple(maps[i] for i in self.out_indices)

    def train(self, mode: bool = True):
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _freeze_stages(self) -> None:
        frozen = ['stem', *(f'stage{i}' for i in range(self.frozen_stages))] if self.frozen_stages >= 0 else []
        for part in (getattr(self, name) for name in frozen):
            part.eval()
            part.requires_grad_(False)


def _stem(layers: Layers, in_channels: int, channels: int) -> nn.Sequential:
    half = channels // 2
    return nn.Sequential(
        ConvNormReLU(layers, in_channels, half, 3, stride=2),
        ConvNormReLU(layers, half, half, 3),
        ConvNormReLU(layers, half, channels, 3),
        nn.MaxPool2d(2, 2),
    )


def _per_stage_k(norm_k, stages: int) -> tuple[int, ...]:
    per_stage = (norm_k,) * stages if isinstance(norm_k, Integral) else _tuple('norm_k', norm_k, Integral, 1)
    if len(per_stage) != stages:
        raise ConfigError(f'AOGNet: norm_k={norm_k!r} must be one number, or one for each of the {stages} stages')
    return per_stage


def _checked_out_indices(out_indices, stages: int) -> tuple[int, ...]:
    indices = _tuple('out_indices', out_indices, Integral, 0)
    if max(indices) >= stages:
        raise ConfigError(f'AOGNet: out_indices={list(indices)} must be stages from 0 to {stages - 1}')
    return indices
