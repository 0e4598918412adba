_base_ = './faster-rcnn_r18_fpn_bn-head_shapes.py'
# Every norm in training mode, the pretrained ones of the backbone included: MABN's, BNET's and AN's setting, small.
model = dict(backbone=dict(frozen_stages=-1, norm_eval=False))
