"""The layouts in which the authors published their checkpoints, as data: which key goes where in mmdet 3.x.

Nothing here runs. :mod:`.convert` walks a file's keys through these tables; a key that no rule names is an error there,
so the tables are complete: they also name what is kept as it is and what is dropped.
"""

from dataclasses import dataclass, field
from typing import NamedTuple


class Rule(NamedTuple):
    """What becomes of the keys that ``old`` matches as a whole.

    Args:
        old: regular expression.
        new: template of the new key (``\\1``: first group; :data:`SAME`: no change); None drops the tensor.
        why: of a drop, for the report.
        beside: template of another key which must be in the file for the rule to hold.
    """

    old: str
    new: str | None
    why: str = ''
    beside: str | None = None


SAME = r'\g<0>'


@dataclass(frozen=True)
class Layout:
    """One layout.

    Args:
        title: whose files these are.
        backbone: rules for the keys of a backbone, without any prefix.
        heads: rules for all other parts of a detector.
        backbone_prefix: what the backbone's keys start with in a detector. It becomes ``backbone.``.
        background_first: whether class 0 of the box and mask heads is the background. mmdet 3.x has it last in
            ``fc_cls`` and not at all in ``fc_reg`` and ``conv_logits``.
        second_moment: whether a ``running_var`` without ``running_mean`` beside it is MABN's, kept as (1, C, 1, 1).
        expects: key of ``cfg.model`` -> value with which the published detectors were trained. State dicts do not show
            it, but without it the weights are another function.
        convention: ``convention`` of anchors, coder and RoI extractor in which the published detectors were trained;
            None: that of mmdet today.
    """

    title: str
    backbone: tuple[Rule, ...]
    heads: tuple[Rule, ...]
    backbone_prefix: str = 'backbone.'
    background_first: bool = True
    second_moment: bool = False
    expects: dict = field(default_factory=dict)
    convention: str | None = None


_CLASSIFIER = Rule(r'fc\.(weight|bias)', None, 'ImageNet classifier')
_STATISTICS = 'running_mean|running_var|num_batches_tracked'
_RGB = {
    'data_preprocessor.bgr_to_rgb': True,
    'data_preprocessor.mean': [123.675, 116.28, 103.53],
    'data_preprocessor.std': [58.395, 57.12, 57.375],
}
_BGR = {
    'data_preprocessor.bgr_to_rgb': False,
    'data_preprocessor.mean': [102.9801, 115.9465, 122.7717],
    'data_preprocessor.std': [1.0, 1.0, 1.0],
}


def _resnet(norms_of_a_block: str) -> tuple[Rule, ...]:
    """A torchvision-style ResNet of Bottlenecks; mmdet's has the same names."""
    return (
        Rule(r'conv1\.weight', SAME),
        Rule(rf'bn1\.(weight|bias|{_STATISTICS})', SAME),
        Rule(r'layer[1-4]\.\d+\.conv[123]\.weight', SAME),
        Rule(rf'layer[1-4]\.\d+\.{norms_of_a_block}\.(weight|bias|{_STATISTICS})', SAME),
        Rule(r'layer[1-4]\.0\.downsample\.0\.weight', SAME),
        Rule(rf'layer[1-4]\.0\.downsample\.1\.(weight|bias|{_STATISTICS})', SAME),
        _CLASSIFIER,
    )


_BNET_BACKBONE = (
    Rule(rf'layer[1-4]\.\d+\.bnet3\.({_STATISTICS}|bnconv\.weight|bnconv\.bias)', SAME),
    # An older naming of the same layer: batch norm bn3 (without weight and bias) and, beside it, its convolution.
    Rule(r'(layer[1-4]\.\d+)\.bnconv3\.(weight|bias)', r'\1.bnet3.bnconv.\2'),
    Rule(rf'(layer[1-4]\.\d+)\.bn3\.({_STATISTICS})', r'\1.bnet3.\2', beside=r'\1.bnconv3.weight'),
    *_resnet('bn[12]'),
)

_MMDET_2_HEADS = (
    Rule(r'neck\.(lateral|fpn)_convs\.\d+\.conv\.(weight|bias)', SAME),
    Rule(r'rpn_head\.rpn_(conv|cls|reg)\.(weight|bias)', SAME),
    Rule(r'roi_head\.bbox_head\.(\d+\.)?(shared_fcs\.\d+|fc_cls|fc_reg)\.(weight|bias)', SAME),
    Rule(r'roi_head\.mask_head\.(\d+\.)?(convs\.\d+\.conv|upsample|conv_logits)\.(weight|bias)', SAME),
    # RetinaNet, whose head is no part of an RoI head
    Rule(r'bbox_head\.(cls_convs\.\d+\.conv|reg_convs\.\d+\.conv|retina_cls|retina_reg)\.(weight|bias)', SAME),
)

# mmdet 0.6 and 1.x: bbox_head and mask_head stand beside the RPN; a cascade numbers them.
_MMDET_1_HEADS = (
    Rule(rf'neck\.(lateral|fpn)_convs\.\d+\.(conv|bn|gn)\.(weight|bias|{_STATISTICS})', SAME),
    Rule(r'rpn_head\.rpn_(conv|cls|reg)\.(weight|bias)', SAME),
    Rule(rf'bbox_head\.(\d+\.)?shared_convs\.\d+\.(conv|bn|gn)\.(weight|bias|{_STATISTICS})', r'roi_head.\g<0>'),
    Rule(r'bbox_head\.(\d+\.)?(shared_fcs\.\d+|fc_cls|fc_reg)\.(weight|bias)', r'roi_head.\g<0>'),
    Rule(rf'mask_head\.(\d+\.)?convs\.\d+\.(conv|bn|gn)\.(weight|bias|{_STATISTICS})', r'roi_head.\g<0>'),
    Rule(r'mask_head\.(\d+\.)?(upsample|conv_logits)\.(weight|bias)', r'roi_head.\g<0>'),
)

_AN = rf'weight_|bias_|{_STATISTICS}|attention_weights\.attention\.[01]\.(weight|bias|{_STATISTICS})'
_AN_HEADS = (
    Rule(rf'(bbox_head\.(?:\d+\.)?shared_convs\.\d+)\.agn\.({_AN})', r'roi_head.\1.bn.\2'),
    *_MMDET_1_HEADS,
)

_MABN = rf'weight|bias|{_STATISTICS}|iters|buffer_x2|buffer_gz'
_IMAGENET_WINDOW = 'simulates small batches inside a large one; detection has other windows'
_MABN_BACKBONE = (
    # The ImageNet code's window and, beside it, a counter of another unit.
    Rule(r'.*\.(sta_matrix|pre_x2|pre_gz)', None, _IMAGENET_WINDOW),
    Rule(r'(.*)\.iters', None, _IMAGENET_WINDOW, beside=r'\1.sta_matrix'),
    Rule(r'(?:stem\.)?(conv1\.(weight|bias))', r'\1'),
    Rule(rf'(?:stem\.)?(bn1\.({_MABN}))', r'\1'),
    Rule(rf'layer[1-4]\.\d+\.(conv[123]\.weight|bn[123]\.({_MABN}))', SAME),
    Rule(rf'layer[1-4]\.0\.downsample\.(0\.weight|1\.({_MABN}))', SAME),
    _CLASSIFIER,
)


def _conv_norm(old_conv: str, old_norm: str, new: str) -> tuple[Rule, Rule]:
    """A convolution and its norm in a Sequential -> mmcv's ConvModule."""
    return Rule(rf'{old_conv}\.weight', f'{new}.conv.weight'), Rule(rf'{old_norm}\.({_MABN})', rf'{new}.bn.\1')


_FPN, _BOX, _MASK = r'backbone\.fpn\.fpn', r'roi_heads\.box', r'roi_heads\.mask'
_XCONVS, _MASK_FCN = rf'{_BOX}\.feature_extractor\.xconvs', rf'{_MASK}\.feature_extractor\.mask_fcn'
_MASKRCNN_BENCHMARK_HEADS = (
    *(rule for i in range(4) for rule in (
        *_conv_norm(rf'{_FPN}_inner{i + 1}\.0', rf'{_FPN}_inner{i + 1}\.1', f'neck.lateral_convs.{i}'),
        *_conv_norm(rf'{_FPN}_layer{i + 1}\.0', rf'{_FPN}_layer{i + 1}\.1', f'neck.fpn_convs.{i}'),
        # conv, norm, ReLU, conv, ...
        *_conv_norm(rf'{_XCONVS}\.{3 * i}', rf'{_XCONVS}\.{3 * i + 1}', f'roi_head.bbox_head.shared_convs.{i}'),
        *_conv_norm(rf'{_MASK_FCN}{i + 1}\.0', rf'{_MASK_FCN}{i + 1}\.1', f'roi_head.mask_head.convs.{i}'),
    )),
    Rule(r'rpn\.head\.conv\.(weight|bias)', r'rpn_head.rpn_conv.\1'),
    Rule(r'rpn\.head\.cls_logits\.(weight|bias)', r'rpn_head.rpn_cls.\1'),
    Rule(r'rpn\.head\.bbox_pred\.(weight|bias)', r'rpn_head.rpn_reg.\1'),
    Rule(r'rpn\.anchor_generator\.cell_anchors\.\d+', None, "anchors; mmdet's generator computes them"),
    Rule(rf'{_BOX}\.feature_extractor\.fc6\.(weight|bias)', r'roi_head.bbox_head.shared_fcs.0.\1'),
    Rule(rf'{_BOX}\.predictor\.cls_score\.(weight|bias)', r'roi_head.bbox_head.fc_cls.\1'),
    Rule(rf'{_BOX}\.predictor\.bbox_pred\.(weight|bias)', r'roi_head.bbox_head.fc_reg.\1'),
    Rule(rf'{_MASK}\.predictor\.conv5_mask\.(weight|bias)', r'roi_head.mask_head.upsample.\1'),
    Rule(rf'{_MASK}\.predictor\.mask_fcn_logits\.(weight|bias)', r'roi_head.mask_head.conv_logits.\1'),
)  # fmt: skip

_AOGNET_BLOCK = r'stage[0-3]\.stage_[0-3]_block_\d+'
_AOGNET_BACKBONE = (
    Rule(rf'stem\.[012]\.conv_norm\.conv_norm\.(0\.weight|1\.(weight|bias|{_STATISTICS}))', SAME),
    Rule(rf'{_AOGNET_BLOCK}_transition\.0\.conv_norm\.conv_norm\.(0\.weight|1\.(weight|bias|{_STATISTICS}))', SAME),
    Rule(rf'{_AOGNET_BLOCK}\.stage_[0-3]_block_\d+_node_\d+_op\.'
         rf'(conv_norm_ac_[12]\.conv_norm|conv_norm_3|shortcut)\.conv_norm\.(0\.weight|1\.(weight|bias|{_AN}))', SAME),
    Rule(rf'{_AOGNET_BLOCK}\.extra_norm_ac\.0\.(weight|bias|{_STATISTICS})', SAME),
    _CLASSIFIER,
)  # fmt: skip

LAYOUTS: dict[str, Layout] = {
    'bnet': Layout(
        title='BNET, mmdet 2.6 and its ImageNet models',
        backbone=_BNET_BACKBONE,
        heads=_MMDET_2_HEADS,
        background_first=False,
        expects={'backbone.style': 'pytorch', **_RGB},
    ),
    'cbn': Layout(
        title='CBN, mmdet 0.6',
        backbone=_resnet('bn[123]'),
        heads=_MMDET_1_HEADS,
        expects={'backbone.style': 'pytorch', **_RGB},
        convention='mmdet-v1',
    ),
    'mabn': Layout(
        title='MABN, maskrcnn-benchmark and its ImageNet models',
        backbone=_MABN_BACKBONE,
        heads=_MASKRCNN_BENCHMARK_HEADS,
        backbone_prefix='backbone.body.',
        second_moment=True,
        expects={'backbone.style': 'caffe', **_BGR},
        convention='maskrcnn-benchmark',
    ),
    'an': Layout(
        title='AN on ResNets, mmdet 1.x and AOGNet-v2 (ImageNet)',
        backbone=(Rule(rf'layer[1-4]\.\d+\.bn2\.({_AN})', SAME), *_resnet('bn[123]')),
        heads=_AN_HEADS,
        expects={'backbone.style': 'pytorch', **_RGB},
        convention='mmdet-v1',
    ),
    'aognet': Layout(
        title='AOGNets with BN or AN, mmdet 1.x and AOGNet-v2 (ImageNet)',
        backbone=_AOGNET_BACKBONE,
        heads=_AN_HEADS,
        expects=_RGB,
        convention='mmdet-v1',
    ),
}
"""The values of ``--from``."""

CLASSIFIER_HEAD = Rule(r'fc\.(weight|bias)', r'head.\g<0>')
"""Of a backbone's file, where the target is a classifier: its last layer is dropped otherwise."""

CLASSES = r'roi_head\.bbox_head\.(\d+\.)?fc_cls\.(weight|bias)'
BOXES = r'roi_head\.bbox_head\.(\d+\.)?fc_reg\.(weight|bias)'
MASKS = r'roi_head\.mask_head\.(\d+\.)?conv_logits\.(weight|bias)'
"""New names of the layers with a row, or four, per class."""

ENTRIES = ('state_dict', 'model', 'model_state_dict')
"""Entries of a checkpoint file in which the state dict may lie, first found first."""

WRAPPERS = ('module.', 'network.')
"""Prefixes that wrappers (DDP; apex' FP16Model inside) put before every key."""

COUNTERS = ('num_batches_tracked', 'iters', 'iter_count')
"""Last parts of the keys of integer buffers."""


class Start(NamedTuple):
    """A buffer that a published file may lack, for all layers or for none, and what the layer starts it with.

    Args:
        value: of every element.
        beside: the tensor of the same layer that must be there.
        group: buffers that this layer of the model has, and that are absent together.
        backbone_only: not of detectors.
    """

    value: float
    beside: str
    group: tuple[str, ...] = ()
    backbone_only: bool = False


_WINDOW = ('iters', 'buffer_x2', 'buffer_gz')
STARTS: dict[str, Start] = {
    'num_batches_tracked': Start(0, beside='running_mean'),  # of torch < 0.4.1
    'iter_count': Start(0, beside='running_mean'),  # CBN's history is in no published file
    **{name: Start(0, beside='weight', group=_WINDOW) for name in _WINDOW},
    # MABN's own loader takes ImageNet weights without it, and keeps its initial 1.
    'running_var': Start(1, beside='weight', group=('running_var', *_WINDOW), backbone_only=True),
}
"""Last part of a key -> when and how it is initialised. Every other missing key is an error."""

DEFAULTS = {'backbone.style': 'pytorch', 'data_preprocessor.bgr_to_rgb': False}
"""What mmdet takes where a config is silent about a key of ``Layout.expects``."""
