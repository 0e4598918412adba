# Published row mask-aognet12m-an: box AP 42.0, mask AP 37.8.
# pretrained/aognet-12m_an.pth: the authors' ImageNet weights, converted (README). Another place:
# --cfg-options model.backbone.init_cfg.checkpoint=FILE
_base_ = './mask-rcnn_aognet-12m_fpn_bn_2x_coco.py'
# The line to edit for another norm: 'AN' or 'BN'.
model = dict(backbone=dict(norm='AN', init_cfg=dict(checkpoint='pretrained/aognet-12m_an.pth')))
