# legacy_mmdet-v1_mask-rcnn.py for Cascade Mask R-CNN. The heads are whole, because a list replaces a list.
_convention = 'mmdet-v1'
_roi_extractor = dict(type='PlusOneRoIExtractor', convention=_convention, roi_layer=dict(sampling_ratio=2))
_bbox_coder = dict(type='PlusOneDeltaXYWHBBoxCoder', convention=_convention)

legacy_model = dict(
    rpn_head=dict(
        anchor_generator=dict(type='PlusOneAnchorGenerator', convention=_convention),
        bbox_coder=_bbox_coder),
    roi_head=dict(
        bbox_roi_extractor=_roi_extractor,
        bbox_head=[
            dict(
                type='PlusOneShared2FCBBoxHead', convention=_convention, in_channels=256,
                fc_out_channels=1024, roi_feat_size=7, num_classes=80, reg_class_agnostic=True,
                bbox_coder=dict(_bbox_coder, target_means=[0.0] * 4, target_stds=[xy, xy, wh, wh]),
                loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type='SmoothL1Loss', beta=1.0, loss_weight=1.0))
            for xy, wh in ((0.1, 0.2), (0.05, 0.1), (0.033, 0.067))
        ],
        mask_roi_extractor=_roi_extractor,
        mask_head=dict(type='PlusOneFCNMaskHead', convention=_convention)))
legacy_resize = dict(type='LegacyResize', scale=(1333, 800), convention=_convention)
