_base_ = 'resnet18_bn_norm-batch_shapes-cls.py'
# Its window is one batch: real_B / norm_batch groups. The rest is as published: r after 100 iterations, momentum 0.98.
model = dict(
    backbone=dict(
        conv_cfg=dict(type='CenConv'),
        norm_cfg=dict(_delete_=True, type='MABN', norm_batch=32, real_B=32)))
