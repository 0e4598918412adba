# Mask R-CNN R-50-FPN as mmdet 0.6 and 1 and maskrcnn-benchmark trained it: smooth L1, 2 x 2 samples per RoI bin, 2000
# proposals; and the box head of four convolutions and one fc layer, which the norms of CBN, MABN and AN sit in.
_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'

model = dict(
    rpn_head=dict(loss_bbox=dict(_delete_=True, type='SmoothL1Loss', beta=1 / 9, loss_weight=1.0)),
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=dict(sampling_ratio=2)),
        bbox_head=dict(
            type='Shared4Conv1FCBBoxHead', conv_out_channels=256,
            loss_bbox=dict(_delete_=True, type='SmoothL1Loss', beta=1.0, loss_weight=1.0)),
        mask_roi_extractor=dict(roi_layer=dict(sampling_ratio=2))),
    train_cfg=dict(rpn=dict(allowed_border=0), rpn_proposal=dict(max_per_img=2000)))
