# Published row faster-r50-syncbn-1x: box AP 37.5.
_base_ = './faster-rcnn_r50_fpn_none_1x_coco.py'
# The line to edit for another norm (`tools/train.py CONFIG --norm NAME` edits nothing).
norm_cfg = dict(type='SyncBN', requires_grad=True)
part = dict(norm_cfg=norm_cfg)
model = dict(neck=part, roi_head=dict(bbox_head=part))
