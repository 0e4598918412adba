"""One classifier with several norms: a training step, inference, and inference with the norms folded away."""

from collections.abc import Mapping, Sequence

import torch
from mmengine.config import Config
from mmengine.structures import BaseDataElement

from ..entries import name_of
from ..placement import CENTRED
from .detectors import MODES, Detectors
from .groups import Setting
from .layers import BASELINE, norm_cfg_of

__all__ = ['MODES', 'NORMS_BY_DEFAULT', 'PUBLISHED', 'Classifiers', 'resnet50']

NORMS_BY_DEFAULT = ('bn', 'mabn', 'in', 'gn', 'ln')
PUBLISHED = {'BN': 237.88, 'MABN': 237.88, 'IN': 105.60, 'GN': 99.37, 'LN2d': 125.44}
"""Iterations per second of ResNet-50 at inference, on the GPU of Yan et al. (arXiv:2001.06838)."""

_CLASSES = 1000


def resnet50(names: Sequence[str]) -> dict[str, Config]:
    """ResNet-50 with one norm at all places, for each name that :func:`.layers.norm_cfg_of` takes; batch norm first.

    MABN has its centred convolutions.
    """
    configs = {}
    for name in dict.fromkeys([BASELINE, *names]):
        norm_cfg = norm_cfg_of(name)
        backbone = dict(type='ResNet', depth=50, out_indices=(3,), norm_cfg=dict(norm_cfg), norm_eval=False)
        if norm_cfg['type'] == 'MABN':
            backbone.update(conv_cfg=dict(CENTRED))
        elif norm_cfg['type'] == 'BN':
            norm_cfg.update(requires_grad=True)
            backbone.update(norm_cfg=norm_cfg)
        model = dict(
            type='ImageClassifier',
            backbone=backbone,
            head=dict(type='LinearClsHead', num_classes=_CLASSES, in_channels=2048),
        )
        optimizer = dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4)
        configs[name] = Config(dict(model=model, optim_wrapper=dict(type='OptimWrapper', optimizer=optimizer)))
    return configs


class Classifiers(Detectors):
    """Classifiers that differ in their norms, measured beside their batch norm twins as :class:`Detectors` are.

    Args:
        configs: name -> config, with the norms in place already.
        setting: device, precision, layout.
        image: height and width.
        batch: images of a call, in both modes.
        published: whether the rows have :data:`PUBLISHED` beside them, because it is that network.
    """

    level = 'classifier'

    def __init__(
        self,
        configs: Mapping[str, Config],
        setting: Setting,
        image: tuple[int, int],
        batch: int,
        published: bool = False,
    ):
        super().__init__(configs, setting, image, batch)
        self.published = published

    def images(self, mode: str) -> int:
        return self.batch

    def _data(self, images: int) -> dict:
        generator = torch.Generator().manual_seed(0)
        samples = [BaseDataElement(gt_label=torch.tensor(0)) for _ in range(images)]
        drawn = torch.randint(256, (images, 3, *self.image), generator=generator, dtype=torch.uint8)
        return dict(inputs=list(drawn), data_samples=samples)

    def _facts(self, name: str) -> dict:
        norm_cfg = (self.configs[name].model.get('backbone') or {}).get('norm_cfg') if name in self.configs else None
        rate = PUBLISHED.get(name_of(norm_cfg)) if self.published and norm_cfg else None
        return {} if rate is None else dict(published_per_s=rate, published_ratio=PUBLISHED['BN'] / rate)
