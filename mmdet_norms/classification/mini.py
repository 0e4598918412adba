"""The Imagenette networks in Python: ``xsemininet(c_in=3, n_out=10, norm='bnet', p=0.2, act_cls='mish')``.

Each function returns an :class:`ImageClassifier`, a torch module with drawn weights that makes ``(N, n_out)`` scores of
``(N, c_in, H, W)`` images: the model, and the names of its weights, that the configs in ``configs/imagenette`` have.

Args:
    c_in: channels of the images. Default 3.
    n_out: number of classes. Default 10.
    norm: at every convolution, by name: a key of :data:`mmdet_norms.models.mini.NORMS`. Default 'bnet'.
    p: dropout before the linear layer. Default 0.2.
    act_cls: a key of :data:`mmdet_norms.models.activations.ACTIVATIONS`. Default 'mish'.
    more: as for the backbone, :class:`mmdet_norms.models.mini.NormEverywhere`.

Raises:
    ConfigError: an unknown name; says which there are.
"""

import logging

from ..models import MiniNeStBA, MiniNeStBN, MiniNet, ResNeSt50, XMiniNet, XSEMiniNet
from .classifier import ImageClassifier


def xmininet(c_in=3, n_out=10, norm='bnet', p=0.2, act_cls='mish', **more) -> ImageClassifier:
    """:class:`~mmdet_norms.models.XMiniNet` with a linear layer."""
    return _classifier(XMiniNet, c_in, n_out, norm, p, act_cls, more)


def xsemininet(c_in=3, n_out=10, norm='bnet', p=0.2, act_cls='mish', **more) -> ImageClassifier:
    """:class:`~mmdet_norms.models.XSEMiniNet` with a linear layer."""
    return _classifier(XSEMiniNet, c_in, n_out, norm, p, act_cls, more)


def mininet(c_in=3, n_out=10, norm='bnet', p=0.2, act_cls='mish', **more) -> ImageClassifier:
    """:class:`~mmdet_norms.models.MiniNet` with a linear layer."""
    return _classifier(MiniNet, c_in, n_out, norm, p, act_cls, more)


def mininest_ba(c_in=3, n_out=10, norm='bnet', p=0.2, act_cls='mish', **more) -> ImageClassifier:
    """:class:`~mmdet_norms.models.MiniNeStBA` with a linear layer."""
    return _classifier(MiniNeStBA, c_in, n_out, norm, p, act_cls, more)


def mininest_bn(c_in=3, n_out=10, norm='bnet', p=0.2, act_cls='mish', **more) -> ImageClassifier:
    """:class:`~mmdet_norms.models.MiniNeStBN` with a linear layer."""
    return _classifier(MiniNeStBN, c_in, n_out, norm, p, act_cls, more)


def resnest50(c_in=3, n_out=10, norm='bnet', p=0.2, act_cls='mish', **more) -> ImageClassifier:
    """:class:`~mmdet_norms.models.ResNeSt50` with a linear layer."""
    return _classifier(ResNeSt50, c_in, n_out, norm, p, act_cls, more)


def _classifier(backbone: type, c_in: int, n_out: int, norm: str | None, p: float, act_cls: str, more: dict):
    model = ImageClassifier(
        backbone=dict(type=backbone, in_channels=c_in, norm=norm, act_cls=act_cls, **more),
        head=dict(
            type='LinearClsHead',
            num_classes=n_out,
            in_channels=backbone.widths(more.get('base_channels', 64))[-1],
            dropout=p,
            init_cfg=dict(type='Kaiming', layer='Linear', mode='fan_in'),
        ),
    )
    before = logging.root.manager.disable
    logging.disable(logging.INFO)  # mmengine has a line about each parameter
    try:
        model.init_weights()
    finally:
        logging.disable(before)
    return model
