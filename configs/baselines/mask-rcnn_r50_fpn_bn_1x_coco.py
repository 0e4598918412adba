# Published row mask-r50-bn-1x: box AP 38.2, mask AP 34.7.
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['mmdet_norms'], allow_failed_imports=False)
# The line to edit for another norm (`tools/train.py CONFIG --norm NAME` edits nothing).
model = dict(backbone=dict(type='ResNet', norm_cfg=dict(type='BN', requires_grad=True)))
