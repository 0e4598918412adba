# Trains what the authors published as R101_BNET-5.pth, which detectors with BNET-5 start from.
_base_ = './resnet101_bn_4xb64-100e_in1k.py'
# The lines to edit for another norm (`tools/train.py CONFIG --norm NAME` edits nothing).
model = dict(backbone=dict(
    type='NormResNet', norm_at=dict(last=dict(type='BNET', kernel_size=5))))
# Published for ResNet-101 only: its kernels stand still from epoch 61 on.
custom_hooks = [dict(type='FreezeBNETHook', epoch=61)]
