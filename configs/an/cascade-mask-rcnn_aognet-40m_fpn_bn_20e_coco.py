# Published row cascade-mask-aognet40m-bn: box AP 45.6, mask AP 39.3.
# pretrained/aognet-40m_bn.pth: the authors' ImageNet weights, converted (README). Another place:
# --cfg-options model.backbone.init_cfg.checkpoint=FILE
_base_ = './cascade-mask-rcnn_r101_fpn_bn_20e_coco.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='AOGNet', arch='40m', norm='BN', frozen_stages=1, norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='pretrained/aognet-40m_bn.pth')),
    neck=dict(in_channels=[224, 448, 896, 1400]))
