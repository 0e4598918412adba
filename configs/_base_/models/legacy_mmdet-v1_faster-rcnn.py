# The conventions that mmdet 0.x and 1.x trained Faster R-CNN with (docs/legacy-geometry.md), to go on top of a config.
_convention = 'mmdet-v1'
_roi_extractor = dict(type='PlusOneRoIExtractor', convention=_convention, roi_layer=dict(sampling_ratio=2))
_bbox_coder = dict(type='PlusOneDeltaXYWHBBoxCoder', convention=_convention)

legacy_model = dict(
    rpn_head=dict(
        anchor_generator=dict(type='PlusOneAnchorGenerator', convention=_convention),
        bbox_coder=_bbox_coder),
    roi_head=dict(
        bbox_roi_extractor=_roi_extractor,
        bbox_head=dict(
            type='PlusOneShared4Conv1FCBBoxHead', convention=_convention, bbox_coder=_bbox_coder)),
    train_cfg=dict(rcnn=dict(assigner=dict(match_low_quality=True))))
legacy_resize = dict(type='LegacyResize', scale=(1333, 800), convention=_convention)
