# Published row mask-aognet40m-an: box AP 44.1, mask AP 39.0.
# pretrained/aognet-40m_an.pth: the authors' ImageNet weights, converted (README). Another place:
# --cfg-options model.backbone.init_cfg.checkpoint=FILE
_base_ = './mask-rcnn_aognet-40m_fpn_bn_2x_coco.py'
# The line to edit for another norm: 'AN' or 'BN'.
model = dict(backbone=dict(norm='AN', init_cfg=dict(checkpoint='pretrained/aognet-40m_an.pth')))
