# Published row mask-r101-bn-1x: box AP 40.0, mask AP 36.1.
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r101_fpn_1x_coco.py'
custom_imports = dict(imports=['mmdet_norms'], allow_failed_imports=False)
# The line to edit for another norm (`tools/train.py CONFIG --norm NAME` edits nothing).
model = dict(backbone=dict(type='ResNet', norm_cfg=dict(type='BN', requires_grad=True)))
