# Published row r50-bn-2: top-1 error 35.22.
_base_ = './resnet50_bn32_8xb32-120e_in1k.py'
# The statistics of pairs, 16 of them in the batch of 32.
model = dict(backbone=dict(
    norm_cfg=dict(type='BN', norm_batch=2)))
