# The conventions that maskrcnn-benchmark trained Mask R-CNN with (docs/legacy-geometry.md), to go on top of a config.
_convention = 'maskrcnn-benchmark'
_roi_extractor = dict(type='PlusOneRoIExtractor', convention=_convention, roi_layer=dict(sampling_ratio=2))
_bbox_coder = dict(type='PlusOneDeltaXYWHBBoxCoder', convention=_convention)

legacy_model = dict(
    data_preprocessor=dict(mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], bgr_to_rgb=False),
    rpn_head=dict(
        anchor_generator=dict(type='PlusOneAnchorGenerator', convention=_convention),
        bbox_coder=_bbox_coder),
    roi_head=dict(
        bbox_roi_extractor=_roi_extractor,
        bbox_head=dict(type='PlusOneShared4Conv1FCBBoxHead', convention=_convention, bbox_coder=_bbox_coder),
        mask_roi_extractor=_roi_extractor,
        mask_head=dict(type='PlusOneFCNMaskHead', convention=_convention)))
legacy_resize = dict(type='LegacyResize', scale=(1333, 800), convention=_convention)
