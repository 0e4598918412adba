_base_ = './faster-rcnn_r50_fpn_bn-head_shapes-large.py'
# Every norm in training mode, the pretrained ones of the backbone included.
model = dict(backbone=dict(frozen_stages=-1, norm_eval=False))
