# Batch renormalization everywhere.
_base_ = './resnet50_bn_1xb32-80e_imagenette160.py'
# The line to edit for another norm (`tools/train.py CONFIG --norm NAME` edits nothing).
norm_cfg = dict(_delete_=True, type='BRN')
model = dict(backbone=dict(norm_cfg=norm_cfg))
