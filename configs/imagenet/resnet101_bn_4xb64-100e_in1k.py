# ResNet-101 with batch norm by the recipe of the BNET weights: what BNET is compared with.
_base_ = './resnet50_bn_4xb64-100e_in1k.py'
model = dict(backbone=dict(depth=101))
# With a line for another norm, see the others of this folder;
# `tools/train.py CONFIG --norm NAME` needs none.
