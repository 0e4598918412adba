# AN's ResNet-101 with batch norm: 44.549M parameters, as published. Batch and learning rate are ours (README).
_base_ = './resnet50_bn_8xb32-120e_in1k.py'
model = dict(backbone=dict(depth=101))
# With a line for another norm, see the others of this folder;
# `tools/train.py CONFIG --norm NAME` needs none.
