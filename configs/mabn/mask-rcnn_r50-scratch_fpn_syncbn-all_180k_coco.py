# Published row mask-r50-syncbn-2x-scratch: box AP 36.8, mask AP 33.1.
_base_ = './mask-rcnn_r50-scratch_fpn_bn-all_180k_coco.py'
# The line to edit for another norm (`tools/train.py CONFIG --norm NAME` edits nothing).
norm_cfg = dict(type='SyncBN')
part = dict(norm_cfg=norm_cfg)
model = dict(backbone=part, neck=part, roi_head=dict(bbox_head=part, mask_head=part))
