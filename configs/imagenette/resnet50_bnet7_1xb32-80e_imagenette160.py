# BNET-7 as the last norm of every block.
_base_ = './resnet50_bn_1xb32-80e_imagenette160.py'
# The lines to edit for another norm (`tools/train.py CONFIG --norm NAME` edits nothing).
model = dict(backbone=dict(
    type='NormResNet', norm_at=dict(last=dict(type='BNET', kernel_size=7))))
