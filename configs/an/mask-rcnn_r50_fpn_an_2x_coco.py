# Published row mask-r50-an: box AP 40.8, mask AP 36.4.
# Starts from torchvision's BN weights, as the same function. The authors' own ImageNet weights instead:
# --cfg-options model.backbone.init_cfg.checkpoint=FILE
_base_ = './mask-rcnn_r50_fpn_bn_2x_coco.py'
# The line to edit for another norm (`tools/train.py CONFIG --norm NAME` edits nothing).
model = dict(backbone=dict(
    type='NormResNet',
    norm_at=dict(norm2=[dict(type='AN', norm='BN', k=k) for k in (10, 10, 20, 20)])))
