# Trains what the authors published as R50_BNET-7.pth, which detectors with BNET-7 start from.
_base_ = './resnet50_bn_4xb64-100e_in1k.py'
# The lines to edit for another norm (`tools/train.py CONFIG --norm NAME` edits nothing).
model = dict(backbone=dict(
    type='NormResNet', norm_at=dict(last=dict(type='BNET', kernel_size=7))))
