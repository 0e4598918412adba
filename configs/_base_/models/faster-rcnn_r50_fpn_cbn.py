# Faster R-CNN of the CBN paper, without norms in FPN and head: mask-rcnn_r50_fpn_cbn.py without the mask branch.
_base_ = 'mmdet::_base_/models/faster-rcnn_r50_fpn.py'

model = dict(
    rpn_head=dict(loss_bbox=dict(_delete_=True, type='SmoothL1Loss', beta=1 / 9, loss_weight=1.0)),
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=dict(sampling_ratio=2)),
        bbox_head=dict(
            type='Shared4Conv1FCBBoxHead', conv_out_channels=256,
            loss_bbox=dict(_delete_=True, type='SmoothL1Loss', beta=1.0, loss_weight=1.0))),
    train_cfg=dict(
        rpn=dict(allowed_border=0),
        rpn_proposal=dict(max_per_img=2000),
        rcnn=dict(assigner=dict(match_low_quality=True))),
    test_cfg=dict(rpn=dict(nms_pre=2000, max_per_img=2000)))
