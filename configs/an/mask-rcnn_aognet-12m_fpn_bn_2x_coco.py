# Published row mask-aognet12m-bn: box AP 40.7, mask AP 36.4.
# pretrained/aognet-12m_bn.pth: the authors' ImageNet weights, converted (README). Another place:
# --cfg-options model.backbone.init_cfg.checkpoint=FILE
_base_ = './mask-rcnn_r50_fpn_bn_2x_coco.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='AOGNet', arch='12m', norm='BN', frozen_stages=1, norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='pretrained/aognet-12m_bn.pth')),
    neck=dict(in_channels=[128, 256, 512, 824]))
