# Published row r50-brn-2: top-1 error 30.29 (the authors' limits of the correction are unknown).
_base_ = './resnet50_bn32_8xb32-120e_in1k.py'
# The statistics of pairs, 16 of them in the batch of 32.
model = dict(backbone=dict(
    norm_cfg=dict(_delete_=True, type='BRN', norm_batch=2)))
