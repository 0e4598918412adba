"""Small detectors with the norms of every named choice, in the middle of nowhere: no number at its default."""

from unittest import mock

import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch.nn import functional as F

from helpers import tiny
from mmdet_norms import apply_norm
from mmdet_norms.cli.common import read_config
from mmdet_norms.registry import MODELS

# Group norm's 32 groups, and a box head with four convolutions, at the tiny model's 16 channels.
FEW_GROUPS = {
    'gn': ['neck', 'roi_head.mask_head', 'roi_head.bbox_head'],
    'gn-ws': ['neck', 'roi_head.mask_head', 'roi_head.bbox_head'],  # in the backbone they fit
    'an-gn-head': ['neck', 'roi_head.mask_head', *(f'roi_head.bbox_head.norm_cfg.{i}' for i in range(4))],
}


def few_groups(norm: str) -> dict:
    """Options of a config that make the named choice fit the tiny model."""
    paths = FEW_GROUPS.get(norm, ())
    return {f'model.{p}{"" if "norm_cfg" in p else ".norm_cfg"}.num_groups': 4 for p in paths}


def two_stage(norm: str) -> torch.nn.Module:
    """The tiny Mask R-CNN of the tests of the commands."""
    cfg = Config.fromstring(tiny.CONFIG.replace('{root}', 'none'), '.py')
    cfg.model = apply_norm(cfg.model, norm)
    cfg.merge_from_dict(few_groups(norm))
    model = build(cfg)
    # random features are large, and saturated scores and boxes of no size would compare nothing
    with torch.no_grad():
        for layer in (model.rpn_head.rpn_reg, model.roi_head.bbox_head.fc_cls, model.roi_head.bbox_head.fc_reg):
            layer.weight.mul_(1e-3)
    return model


def single_stage(kind: str, norm: str | None = None) -> torch.nn.Module:
    """A small detector with another head."""
    if kind == 'retinanet':
        cfg = read_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
        cfg.model.backbone = dict(type='ResNet', depth=18, base_channels=8, out_indices=(0, 1, 2, 3), norm_eval=False)
        cfg.model.neck.update(in_channels=[8, 16, 32, 64], out_channels=16)
        cfg.model.bbox_head.update(in_channels=16, feat_channels=16, stacked_convs=1, num_classes=3)
    else:
        names = dict(yolox='yolox/yolox_tiny_8xb8-300e_coco.py', rtmdet='rtmdet/rtmdet_tiny_8xb32-300e_coco.py')
        cfg = read_config(f'mmdet::{names[kind]}')
        cfg.model.backbone.pop('init_cfg', None)
    if norm is not None:
        cfg.model = apply_norm(cfg.model, norm)
    return build(cfg)


def build(cfg: Config) -> torch.nn.Module:
    """The model of a config in eval mode, with random statistics and weights."""
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    for part in model.modules():
        for name, low, high in (('running_mean', -0.3, 0.3), ('running_var', 0.3, 1)):
            if isinstance(getattr(part, name, None), torch.Tensor):
                getattr(part, name).uniform_(low, high)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for part in model.modules():
            if hasattr(part, 'weight_'):  # AN: its k affine steps add up to about k / 2
                part.weight_.mul_(2 / part.k)
    return model.eval()


def image(size: int = 64) -> torch.Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def detections(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What the model detects in :func:`image`."""
    x = image().to(next(model.parameters()))
    size = tuple(x.shape[2:])
    meta = dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size, scale_factor=(1, 1))
    sample = F.grid_sample
    # mmdet pastes masks as float32 whatever the model is
    with mock.patch.object(F, 'grid_sample', lambda maps, grid, **how: sample(maps.to(grid.dtype), grid, **how)):
        (result,) = model.predict(x, [DetDataSample(metainfo=meta)])
    return dict(result.pred_instances.items())
