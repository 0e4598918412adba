# MABN everywhere, behind centred convolutions: moments averaged over the last 16 iterations.
_base_ = './resnet50_bn_1xb32-80e_imagenette160.py'
# The lines to edit for another norm (`tools/train.py CONFIG --norm NAME` edits nothing).
norm_cfg = dict(_delete_=True, type='MABN', B=2, real_B=32)
model = dict(backbone=dict(norm_cfg=norm_cfg, conv_cfg=dict(type='CenConv')))
