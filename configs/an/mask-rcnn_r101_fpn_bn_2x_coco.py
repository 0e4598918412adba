# Published row mask-r101-bn: box AP 41.4, mask AP 36.8.
# Starts from torchvision's BN weights. The authors' own ImageNet weights instead:
# --cfg-options model.backbone.init_cfg.checkpoint=FILE
_base_ = './mask-rcnn_r50_fpn_bn_2x_coco.py'
model = dict(backbone=dict(depth=101, init_cfg=dict(checkpoint='torchvision://resnet101')))
