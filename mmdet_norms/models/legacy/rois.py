"""RoIAlign of the inclusive ("+1") world on boxes stored as ``(x1, y1, x2 + 1, y2 + 1)``."""

import torch
from mmcv.ops import RoIAlign
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from torch import Tensor, nn

from ...entries import name_of
from ...layers._args import ConfigError
from ...registry import MODELS
from .conventions import MASKRCNN_BENCHMARK, MMDET_V1, check_convention


class PlusOneRoIAlign(RoIAlign):
    """mmcv's RoIAlign, without the shift by half a pixel, over the extent that the convention pools.

    With s = ``spatial_scale``, along one axis of the feature map:

    - ``'mmdet-v1'``: from ``x1 s`` to ``(x2 + 1) s``, any size.
    - ``'maskrcnn-benchmark'``: from ``x1 s`` to ``x2 s``, at least 1.

    Args:
        convention: see above.
        **kwargs: of mmcv's ``RoIAlign``, but ``aligned``.
    """

    def __init__(self, *args, convention: str, **kwargs):
        self.convention = check_convention(self, convention)
        # mmcv enlarges RoIs to one pixel unless they are aligned; forward() takes back the shift of aligned ones.
        super().__init__(*args, aligned=convention == MMDET_V1, **kwargs)

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """(R, C, *output_size) of ``input`` (N, C, H, W) at ``rois`` (R, 5): image index, x1, y1, x2 + 1, y2 + 1."""
        if self.convention == MMDET_V1:
            half_pixel = 0.5 / self.spatial_scale
            rois = rois + rois.new_tensor([0] + [half_pixel] * 4)
        else:
            rois = rois - rois.new_tensor([0, 0, 0, 1, 1])
        return super().forward(input, rois)


@MODELS.register_module()
class PlusOneRoIExtractor(SingleRoIExtractor):
    """mmdet's ``SingleRoIExtractor`` with :class:`PlusOneRoIAlign`.

    The level of a RoI is the stock one, which on ``x2 + 1`` is the legacy one: from the root of the area, in
    ``'maskrcnn-benchmark'`` as ``floor(4 + log2(root / 224 + 1e-6))``.

    Args:
        convention: see :class:`PlusOneRoIAlign`. Default: ``'mmdet-v1'``.
        roi_layer: as in mmdet, of type ``RoIAlign`` and without ``aligned``, which the convention decides.
        **kwargs: of mmdet's ``SingleRoIExtractor``.

    Raises:
        ConfigError: unknown convention, another ``roi_layer.type``, or ``roi_layer.aligned``.
    """

    def __init__(self, *args, convention: str = MMDET_V1, **kwargs):
        self.convention = check_convention(self, convention)
        super().__init__(*args, **kwargs)

    def build_roi_layers(self, layer_cfg: dict, featmap_strides: list[int]) -> nn.ModuleList:
        """One :class:`PlusOneRoIAlign` per level."""
        cfg = dict(layer_cfg)
        kind = cfg.pop('type')
        if name_of(kind) != 'RoIAlign':
            raise ConfigError(f"PlusOneRoIExtractor.roi_layer.type={kind!r} has no legacy form; write 'RoIAlign'")
        if 'aligned' in cfg:
            raise ConfigError(
                f'PlusOneRoIExtractor.roi_layer.aligned={cfg["aligned"]} is decided by convention='
                f'{self.convention!r}; leave it out'
            )
        return nn.ModuleList(
            PlusOneRoIAlign(spatial_scale=1 / stride, convention=self.convention, **cfg) for stride in featmap_strides
        )

    def map_roi_levels(self, rois: Tensor, num_levels: int) -> Tensor:
        """(R,) level of each RoI, 0 the finest."""
        if self.convention != MASKRCNN_BENCHMARK:
            return super().map_roi_levels(rois, num_levels)
        sizes = rois[:, 3:] - rois[:, 1:3]
        root = sizes.prod(1).sqrt()
        # The finest level is number 2, that of a stride of 4 = 2^2. The 1e-6 stands beside 224, not beside 56.
        level = torch.floor(4 + torch.log2(root / (4 * self.finest_scale) + 1e-6)) - 2
        return level.clamp(min=0, max=num_levels - 1).long()
