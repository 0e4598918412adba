# AN's ResNet-101: 45.001M parameters, as published. Batch and learning rate are ours (README).
_base_ = './resnet101_bn_8xb32-120e_in1k.py'
# The lines to edit for another norm (`tools/train.py CONFIG --norm NAME` edits nothing).
model = dict(backbone=dict(
    type='NormResNet',
    norm_at=dict(norm2=[dict(type='AN', norm='BN', k=k) for k in (10, 10, 20, 20)])))
