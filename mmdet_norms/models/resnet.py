"""mmdet's ResNets with a norm per position."""

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
from torch import nn

from ..layers import BNET
from ..registry import MODELS
from .norm_at import NormAt


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
        for block in self.modules():
            if isinstance(getattr(block, 'norm3', None), BNET):
                nn.init.zeros_(block.norm3.bnconv.weight)


@MODELS.register_module()
class NormDetectoRS_ResNet(_DetectoRS, DetectoRS_ResNet):
    """mmdet's DetectoRS_ResNet (recursive feature pyramid, switchable atrous convolution) with ``norm_at``."""


@MODELS.register_module()
class NormDetectoRS_ResNeXt(_DetectoRS, DetectoRS_ResNeXt):
    """mmdet's DetectoRS_ResNeXt with ``norm_at``."""
