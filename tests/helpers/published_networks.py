"""The published detectors, small and in eval mode, written by hand: layers by role, and the layouts' names for them.

Their norms are those of :mod:`mmdet_norms.reference`. A model that loaded the converted checkpoint computes the same.
"""

import torch
from torch import nn
from torch.nn import functional as F

DEPTHS = (3, 4, 6, 3)
WIDTH, NECK, FC, CLASSES = 8, 16, 24, 3
FULL_SIZE = dict(width=64, neck=256, fc=1024, classes=80)

# Where the layouts put a layer. s, b: stage and block; i, n: index from 0 and from 1; c: index of a convolution among
# convolution, norm, ReLU; abbr: the norm's name.
MMDET_1 = dict(
    stem='backbone.conv1', stem_norm='backbone.bn1', block='backbone.layer{s}.{b}',
    lateral='neck.lateral_convs.{i}.conv', lateral_norm='neck.lateral_convs.{i}.{abbr}',
    out='neck.fpn_convs.{i}.conv', out_norm='neck.fpn_convs.{i}.{abbr}',
    rpn='rpn_head.rpn_conv', objectness='rpn_head.rpn_cls', rpn_boxes='rpn_head.rpn_reg',
    box='bbox_head.shared_convs.{i}.conv', box_norm='bbox_head.shared_convs.{i}.{abbr}', fc='bbox_head.shared_fcs.{i}',
    classes='bbox_head.fc_cls', boxes='bbox_head.fc_reg',
    mask='mask_head.convs.{i}.conv', mask_norm='mask_head.convs.{i}.{abbr}',
    upsample='mask_head.upsample', masks='mask_head.conv_logits',
)  # fmt: skip
MMDET_2 = MMDET_1 | {
    role: 'roi_head.' + MMDET_1[role] for role in ('box', 'fc', 'classes', 'boxes', 'mask', 'upsample', 'masks')
}
BENCHMARK = dict(
    stem='backbone.body.stem.conv1', stem_norm='backbone.body.stem.bn1', block='backbone.body.layer{s}.{b}',
    lateral='backbone.fpn.fpn_inner{n}.0', lateral_norm='backbone.fpn.fpn_inner{n}.1',
    out='backbone.fpn.fpn_layer{n}.0', out_norm='backbone.fpn.fpn_layer{n}.1',
    rpn='rpn.head.conv', objectness='rpn.head.cls_logits', rpn_boxes='rpn.head.bbox_pred',
    box='roi_heads.box.feature_extractor.xconvs.{c}', box_norm='roi_heads.box.feature_extractor.xconvs.{c_norm}',
    fc='roi_heads.box.feature_extractor.fc6', classes='roi_heads.box.predictor.cls_score',
    boxes='roi_heads.box.predictor.bbox_pred',
    mask='roi_heads.mask.feature_extractor.mask_fcn{n}.0', mask_norm='roi_heads.mask.feature_extractor.mask_fcn{n}.1',
    upsample='roi_heads.mask.predictor.conv5_mask', masks='roi_heads.mask.predictor.mask_fcn_logits',
)  # fmt: skip


class Detector:
    """A published Mask R-CNN with 4conv1fc box head (or 2fc, if ``box_norms`` is None).

    Args:
        names: one of the tables above.
        backbone_norm: (position, stage) -> norm class or factory; position in 1, 2, 3, 'stem', 'downsample'.
        head_norm: of FPN and mask head; None: none, and convolutions with bias.
        box_norms: of the four convolutions.
        abbr: name of a norm -> its name in a ConvModule.
        caffe: stride in the first convolution of a block.
        conv: class of all convolutions before norms.
        stem_bias: whether the stem's convolution has one.
        norm3: name of a block's third norm.
        width: of the stem.
    """

    def __init__(self, names, backbone_norm=lambda position, stage: nn.BatchNorm2d, head_norm=None,
                 box_norms=(None,) * 4, abbr=lambda norm: 'bn', caffe=False, conv=nn.Conv2d, stem_bias=False,
                 norm3='bn3', width=WIDTH, neck=NECK, fc=FC, classes=CLASSES):  # fmt: skip
        torch.manual_seed(0)
        self.names, self.caffe, self.conv, self.abbr = names, caffe, conv, abbr
        self.layers, self.paths = {}, {}
        self._add('stem', conv(3, width, 7, 2, 3, bias=stem_bias))
        self._add('stem_norm', backbone_norm('stem', 0)(width))
        wide = width
        for stage, depth in enumerate(DEPTHS):
            mid = width * 2**stage
            for block in range(depth):
                stride = 2 if stage and not block else 1
                strides = (stride, 1, 1) if caffe else (1, stride, 1)
                path = names['block'].format(s=stage + 1, b=block)
                sizes = ((wide, mid, 1), (mid, mid, 3), (mid, 4 * mid, 1))
                for i, (before, after, kernel) in enumerate(sizes, 1):
                    role = (stage, block, i)
                    self._add(
                        ('conv', *role),
                        conv(before, after, kernel, strides[i - 1], kernel // 2, bias=False),
                        f'{path}.conv{i}',
                    )
                    name = norm3 if i == 3 else f'bn{i}'
                    self._add(('norm', *role), backbone_norm(i, stage)(after), f'{path}.{name}')
                if not block:
                    shortcut = conv(wide, 4 * mid, 1, stride, bias=False)
                    self._add(('conv', stage, block, 'shortcut'), shortcut, f'{path}.downsample.0')
                    norm = backbone_norm('downsample', stage)(4 * mid)
                    self._add(('norm', stage, block, 'shortcut'), norm, f'{path}.downsample.1')
                wide = 4 * mid
        for i in range(4):
            self._conv_norm('lateral', i, 4 * width * 2**i, neck, 1, head_norm)
            self._conv_norm('out', i, neck, neck, 3, head_norm)
            if box_norms is not None:
                self._conv_norm('box', i, neck, neck, 3, box_norms[i])
            self._conv_norm('mask', i, neck, neck, 3, head_norm)
        self._add('rpn', nn.Conv2d(neck, neck, 3, padding=1))
        self._add('objectness', nn.Conv2d(neck, 3, 1))
        self._add('rpn_boxes', nn.Conv2d(neck, 12, 1))
        self._add(('fc', 0), nn.Linear(neck * 49, fc), names['fc'].format(i=0))
        if box_norms is None:
            self._add(('fc', 1), nn.Linear(fc, fc), names['fc'].format(i=1))
        background = 0 if names is MMDET_2 else 1  # a row of fc_reg and conv_logits
        self._add('classes', nn.Linear(fc, classes + 1))
        self._add('boxes', nn.Linear(fc, 4 * (classes + background)))
        self._add('upsample', nn.ConvTranspose2d(neck, neck, 2, 2))
        self._add('masks', nn.Conv2d(neck, classes + background, 1))

    def _add(self, role, layer, path=None):
        _randomise(layer)
        self.layers[role], self.paths[role] = layer.eval(), path or self.names[role]

    def _conv_norm(self, role, i, before, after, kernel, norm):
        where = dict(i=i, n=i + 1, c=3 * i, c_norm=3 * i + 1, abbr=self.abbr(norm))
        conv = (self.conv if norm else nn.Conv2d)(before, after, kernel, padding=kernel // 2, bias=norm is None)
        self._add((role, i), conv, self.names[role].format(**where))
        if norm:
            self._add((role + '_norm', i), norm(after), self.names[role + '_norm'].format(**where))

    def state_dict(self):
        """The published keys, in fp32."""
        return {
            f'{self.paths[role]}.{key}': value.clone()
            for role, layer in self.layers.items()
            for key, value in layer.state_dict().items()
        }

    def double(self):
        for layer in self.layers.values():
            layer.double()
        return self

    def _run(self, role, x):
        for name in (role, (role[0] + '_norm', role[1])):
            x = self.layers[name](x) if name in self.layers else x
        return x

    def backbone(self, x):
        get = self.layers
        x = F.max_pool2d(get['stem_norm'](get['stem'](x)).relu(), 3, 2, 1)
        outs = []
        for stage, depth in enumerate(DEPTHS):
            for block in range(depth):
                y = x
                for i in (1, 2, 3):
                    y = get['norm', stage, block, i](get['conv', stage, block, i](y))
                    y = y.relu() if i < 3 else y
                if not block:
                    x = get['norm', stage, block, 'shortcut'](get['conv', stage, block, 'shortcut'](x))
                x = (x + y).relu()
            outs.append(x)
        return outs

    def neck(self, features):
        maps = [self._run(('lateral', i), x) for i, x in enumerate(features)]
        for i in (2, 1, 0):
            maps[i] = maps[i] + F.interpolate(maps[i + 1], scale_factor=2, mode='nearest')
        maps = [self._run(('out', i), x) for i, x in enumerate(maps)]
        return [*maps, maps[-1][..., ::2, ::2]]

    def rpn(self, maps):
        hidden = [self.layers['rpn'](x).relu() for x in maps]
        return [self.layers['objectness'](x) for x in hidden], [self.layers['rpn_boxes'](x) for x in hidden]

    def box_head(self, x):
        for i in range(4):
            x = self._run(('box', i), x).relu() if ('box', i) in self.layers else x
        x = x.flatten(1)
        for i in range(2):
            x = self.layers['fc', i](x).relu() if ('fc', i) in self.layers else x
        return self.layers['classes'](x), self.layers['boxes'](x)

    def mask_head(self, x):
        for i in range(4):
            x = self._run(('mask', i), x).relu()
        return self.layers['masks'](self.layers['upsample'](x).relu())


def _randomise(layer):
    """Values of which no two are alike, at scales that neither die out nor explode through a network."""
    with torch.no_grad():
        for key, value in layer.state_dict().items():
            name = key.rpartition('.')[2]
            if value.is_meta:
                return
            if not value.is_floating_point():
                value.fill_(int(torch.randint(1, 5000, ())))
            elif name in ('running_var', 'buffer_x2'):
                value.uniform_(0.5, 1.5)
            elif name == 'weight_':
                value.normal_(1, 0.1).mul_(2 / len(value))
            elif value.dim() == 1 and name == 'weight':
                value.normal_(1, 0.1)
            elif value.dim() < 2 or name in ('bias_', 'buffer_gz'):
                value.normal_(0, 0.1)
            else:
                value.normal_(0, (value[0].numel() ** -0.5))
