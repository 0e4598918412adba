# Published row faster-r50-cbn-1x: box AP 37.6.
_base_ = './faster-rcnn_r50_fpn_none_1x_coco.py'
# As released: 8 iterations. The authors mean 8 epochs, burnin='8e'.
# The line to edit for another norm (`tools/train.py CONFIG --norm NAME` edits nothing).
norm_cfg = dict(type='CBN', buffer_num=3, burnin=8)
part = dict(norm_cfg=norm_cfg)
model = dict(neck=part, roi_head=dict(bbox_head=part))
