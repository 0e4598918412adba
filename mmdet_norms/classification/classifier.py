"""A backbone as an image classifier: global average pooling, a linear layer, cross entropy."""

from collections.abc import Sequence

import numpy as np
import torch
from mmengine.model import BaseModel, BaseModule, ImgDataPreprocessor
from mmengine.registry import MODELS
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.nn import functional as F

from ..console import as_text
from ..errors import UserError
from ..layers._args import ConfigError


@MODELS.register_module()
class ImageClassifier(BaseModel):
    """Backbone and head: ``(N, 3, H, W)`` images to ``(N, num_classes)`` scores.

    The weights are called as mmpretrain calls those of its classifier of that name (``backbone.*``, ``head.fc.*``), so
    each loads the other's. A detector starts from them by
    ``backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=FILE, prefix='backbone.'))``.

    Args:
        backbone: any of mmdet or of this package; of several outputs the last is classified.
        head: :class:`LinearClsHead`.
        data_preprocessor: :class:`ClsDataPreprocessor` by default, which only stacks images.
        init_cfg: of the whole classifier.
    """

    def __init__(
        self, backbone: dict, head: dict, data_preprocessor: dict | None = None, init_cfg: dict | None = None
    ) -> None:
        super().__init__(data_preprocessor or dict(type='ClsDataPreprocessor'), init_cfg)
        self.backbone = MODELS.build(backbone)
        self.head = MODELS.build(head)
        mixed, known = getattr(self.data_preprocessor, 'num_classes', None), getattr(self.head, 'num_classes', None)
        if mixed not in (None, known):
            raise ConfigError(
                f'data_preprocessor.num_classes={mixed!r} must be head.num_classes={known!r}, or left out'
            )
        self.data_preprocessor.num_classes = known

    def extract_feat(self, inputs: Tensor) -> Tensor:
        """The backbone's last output, ``(N, C, H, W)``."""
        features = self.backbone(inputs)
        return features[-1] if isinstance(features, (list, tuple)) else features

    def forward(
        self, inputs: Tensor, data_samples: Sequence[BaseDataElement] | None = None, mode: str = 'tensor'
    ) -> Tensor | dict[str, Tensor] | list[BaseDataElement]:
        """Scores (``mode='tensor'``), the loss (``'loss'``), or samples with ``pred_score``, ``pred_label``."""
        scores = self.head(self.extract_feat(inputs))
        if mode == 'tensor':
            return scores
        if mode == 'loss':
            return self.head.loss(scores, data_samples)
        if mode == 'predict':
            return self.head.predict(scores, data_samples)
        raise ValueError(f"mode={mode!r}: must be 'tensor', 'loss' or 'predict'")


@MODELS.register_module()
class LinearClsHead(BaseModule):
    """Global average pooling, dropout, a linear layer; cross entropy with label smoothing.

    Args:
        num_classes: of the data.
        in_channels: of the backbone's last output, 2048 for ResNet-50.
        dropout: probability, before the linear layer. Default 0.
        label_smoothing: part of the target that is spread over all classes. Default 0.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg or dict(type='Normal', layer='Linear', std=0.01))
        if not isinstance(num_classes, int) or num_classes < 2:
            raise ConfigError(f'head.num_classes={num_classes!r} must be a whole number of at least 2')
        for key, value in (('dropout', dropout), ('label_smoothing', label_smoothing)):
            if not 0 <= value < 1:
                raise ConfigError(f'head.{key}={value!r} must be at least 0 and less than 1')
        self.num_classes, self.in_channels = num_classes, in_channels
        self.label_smoothing = label_smoothing
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, H, W)`` to scores ``(N, num_classes)``."""
        if x.shape[1] != self.in_channels:
            raise ConfigError(f'head.in_channels={self.in_channels} must be {x.shape[1]}, as the backbone gives')
        return self.fc(self.dropout(x.mean((2, 3))))

    def loss(self, scores: Tensor, data_samples: Sequence[BaseDataElement]) -> dict[str, Tensor]:
        """Cross entropy with ``gt_score`` (mixed labels) where the samples have it, else with ``gt_label``."""
        if 'gt_score' in data_samples[0]:
            target = torch.stack([sample.gt_score for sample in data_samples])
        else:
            target = torch.stack([sample.gt_label for sample in data_samples])
        return dict(loss=F.cross_entropy(scores.float(), target, label_smoothing=self.label_smoothing))

    def predict(self, scores: Tensor, data_samples: Sequence[BaseDataElement] | None) -> list[BaseDataElement]:
        """The samples with ``pred_score`` (``num_classes`` probabilities) and ``pred_label``."""
        samples = data_samples or [BaseDataElement() for _ in scores]
        scores = scores.float().softmax(1)
        for sample, score, label in zip(samples, scores, scores.argmax(1)):
            sample.pred_score, sample.pred_label = score, label
        return list(samples)


@MODELS.register_module()
class ClsDataPreprocessor(ImgDataPreprocessor):
    """Stack, normalize and, in training, mix images. Labels go to the device in one piece.

    Args:
        num_classes: of the data. Default: the head's.
        mixup: alpha of ``Beta(alpha, alpha)``, from which one weight per batch is drawn (Zhang et al.,
            arXiv:1710.09412): each image and its label become ``w * own + (1 - w) * another's`` of the batch. Default
            0: none.
        kwargs: as for :class:`mmengine.model.ImgDataPreprocessor`: ``mean``, ``std``, ``bgr_to_rgb``, ...

    Raises:
        UserError: images of different sizes, or a label that no class has.
    """

    def __init__(self, num_classes: int | None = None, mixup: float = 0.0, **kwargs) -> None:
        super().__init__(**kwargs)
        if isinstance(mixup, bool) or not isinstance(mixup, (int, float)) or not 0 <= mixup < float('inf'):
            raise ConfigError(f'data_preprocessor.mixup={mixup!r} must be a number of at least 0, such as 0.2')
        self.num_classes, self.mixup = num_classes, mixup

    def forward(self, data: dict, training: bool = False) -> dict:
        """``inputs``, a tensor or a list of ``(3, H, W)``, become one normalized ``(N, 3, H, W)``."""
        inputs, samples = data['inputs'], data.get('data_samples')
        if not isinstance(inputs, Tensor):
            inputs = _stacked(inputs, samples)
        inputs = super().forward(dict(inputs=inputs), training)['inputs']
        if samples is not None and all('gt_label' in sample for sample in samples):
            samples = [sample.new() for sample in samples]
            labels = torch.stack([sample.gt_label for sample in samples])
            if self.num_classes is not None and labels.device.type == 'cpu':
                _require_classes(labels, samples, self.num_classes)
            labels = labels.to(inputs.device, non_blocking=True)
            for sample, label in zip(samples, labels):
                sample.gt_label = label
            if training and self.mixup:
                inputs = self._mix(inputs, labels, samples)
        return dict(data, inputs=inputs, data_samples=samples)

    def _mix(self, images: Tensor, labels: Tensor, samples: Sequence[BaseDataElement]) -> Tensor:
        if self.num_classes is None:
            raise ConfigError(f'data_preprocessor.mixup={self.mixup!r} needs data_preprocessor.num_classes')
        # Drawn in the main process, from generators that a resumed run restores; nothing waits for the device.
        others = 1 - float(np.random.beta(self.mixup, self.mixup))
        order = torch.randperm(len(images)).to(images.device, non_blocking=True)
        labels = F.one_hot(labels, self.num_classes).float()
        for sample, mixed in zip(samples, labels.lerp(labels[order], others)):
            sample.gt_score = mixed
        return images.lerp(images[order], others)


def _stacked(images: Sequence[Tensor], samples: Sequence[BaseDataElement] | None) -> Tensor:
    """A batch of images, which must be of one size."""
    sizes = {tuple(image.shape): place for place, image in enumerate(images)}
    if len(sizes) > 1:
        names = [getattr(samples[place], 'img_path', place) if samples else place for place in sizes.values()]
        found = [f'{w} x {h} ({as_text(name)})' for (_, h, w), name in zip(sizes, names)]
        raise UserError(
            f'images of different sizes in one batch: {", ".join(found[:3])}; end the pipeline with RandomResizedCrop, '
            'or with Resize and CenterCrop(auto_pad=True)'
        )
    return torch.stack(list(images))


def _require_classes(labels: Tensor, samples: Sequence[BaseDataElement], num_classes: int) -> None:
    worst = int(labels.argmax())
    if labels[worst] >= num_classes:
        raise UserError(
            f'{as_text(getattr(samples[worst], "img_path", "an image"))} has gt_label={int(labels[worst])}, and '
            f'model.head.num_classes={num_classes}: write the number of classes of the data'
        )
