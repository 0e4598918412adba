"""Whole detectors, fused: the same maps, the same detections."""

import copy

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from helpers import detectors
from mmdet_norms import PLACEMENTS, fuse
from mmdet_norms.layers import CBN, MABN, CenConv2d, FrozenBN

KEPT = {
    'gn': {'GN'},
    'gn-ws': {'GN'},
    'sn': {'SN'},
    'rbn': {'RBN'},
    'bin': {'BIN'},
    'an-gn-head': {'GN'},
}


def same(ours, theirs, tolerance):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


@pytest.mark.parametrize('norm', PLACEMENTS)
@pytest.mark.filterwarnings('ignore::UserWarning')
def test_a_mask_rcnn_with_any_named_norm_detects_the_same(norm):
    model = detectors.two_stage(norm).double()
    reference = copy.deepcopy(model)
    fused = fuse(model)
    with torch.no_grad():
        maps = [m.extract_feat(detectors.image().double()) for m in (fused, reference)]
    for ours, theirs in zip(*maps):
        same(ours, theirs, 1e-9)
    ours, theirs = detectors.detections(fused), detectors.detections(reference)
    assert len(theirs['scores']) > 3
    same(ours['scores'], theirs['scores'], 1e-8)
    same(ours['bboxes'], theirs['bboxes'], 1e-8)
    assert torch.equal(ours['labels'], theirs['labels']) and torch.equal(ours['masks'], theirs['masks'])
    report = fused.fuse_report
    assert {report.types[name] for name in report.kept} == KEPT.get(norm, set())
    left = [type(m) for m in fused.modules() if isinstance(m, (_BatchNorm, CBN, MABN, FrozenBN, CenConv2d))]
    assert not left or norm in ('sn', 'rbn', 'bin')


@pytest.mark.parametrize(
    ('kind', 'norm'),
    [('retinanet', 'bnet5'), ('retinanet', 'mabn'), ('retinanet', 'an'), ('yolox', None), ('rtmdet', None)],
)
@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::UserWarning')
def test_a_single_stage_detector_puts_out_the_same_maps(kind, norm):
    model = detectors.single_stage(kind, norm).double()
    reference, fused = copy.deepcopy(model), fuse(model)
    with torch.no_grad():
        ours, theirs = (m.bbox_head(m.extract_feat(detectors.image().double())) for m in (fused, reference))
    for a, b in zip(ours, theirs):
        for level, expected in zip(a, b):
            same(level, expected, 1e-9)
    # RTMDet's levels share convolutions, but each has norms of its own: 2 towers x 2 convolutions x 3 levels
    assert len(fused.fuse_report.kept) == (12 if kind == 'rtmdet' else 0)
