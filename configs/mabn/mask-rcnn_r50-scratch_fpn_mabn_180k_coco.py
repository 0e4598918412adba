# Published row mask-r50-mabn-2x-scratch: box AP 36.5, mask AP 32.69.
_base_ = './mask-rcnn_r50-scratch_fpn_bn-all_180k_coco.py'
# The lines to edit for another norm (`tools/train.py CONFIG --norm NAME` edits nothing).
norm_cfg = dict(type='MABN', B=2, real_B=32)
conv_cfg = dict(type='CenConv')
part = dict(norm_cfg=norm_cfg, conv_cfg=conv_cfg)
model = dict(backbone=part, neck=part, roi_head=dict(bbox_head=part, mask_head=part))
