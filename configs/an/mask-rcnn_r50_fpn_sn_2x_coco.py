# Published row mask-r50-sn: box AP 41.0, mask AP 36.5 (the authors quote it from another paper).
# That paper's recipe is unknown: this is the one of the other rows here, with nothing frozen.
# Starts from torchvision's BN weights, where the paper has weights that were trained with SN:
# --cfg-options model.backbone.init_cfg.checkpoint=FILE
_base_ = './mask-rcnn_r50_fpn_bn_2x_coco.py'
# The line to edit for another norm (`tools/train.py CONFIG --norm NAME` edits nothing).
norm_cfg = dict(type='SN')
model = dict(
    backbone=dict(norm_cfg=dict(_delete_=True, type='SN'), norm_eval=False, frozen_stages=-1),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg), mask_head=dict(norm_cfg=norm_cfg)))
