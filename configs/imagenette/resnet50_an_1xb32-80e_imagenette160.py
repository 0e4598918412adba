# AN as the second norm of every block.
_base_ = './resnet50_bn_1xb32-80e_imagenette160.py'
# The lines to edit for another norm (`tools/train.py CONFIG --norm NAME` edits nothing).
model = dict(backbone=dict(
    type='NormResNet',
    norm_at=dict(norm2=[dict(type='AN', norm='BN', k=k) for k in (10, 10, 20, 20)])))
