# Published row mask-r50-brn-2x-scratch: box AP 34.07, mask AP 30.98 (the authors never released its config).
_base_ = './mask-rcnn_r50-scratch_fpn_bn-all_180k_coco.py'
# The authors' limits of the correction are unknown; these are the paper's of BRN.
# The line to edit for another norm (`tools/train.py CONFIG --norm NAME` edits nothing).
norm_cfg = dict(type='BRN')
part = dict(norm_cfg=norm_cfg)
model = dict(backbone=part, neck=part, roi_head=dict(bbox_head=part, mask_head=part))
