# No published row.
# Starts from torchvision's BN weights, as the same function. The authors' own ImageNet weights instead:
# --cfg-options model.backbone.init_cfg.checkpoint=R50_BNET-5.pth
_base_ = 'mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['mmdet_norms'], allow_failed_imports=False)
# The line to edit for another norm (`tools/train.py CONFIG --norm NAME` edits nothing).
model = dict(backbone=dict(type='NormResNet', norm_at=dict(last=dict(type='BNET', kernel_size=5))))
