_base_ = 'resnet18_bn_norm-batch_shapes-cls.py'
# The published 5000, 40000 and 25000 iterations over 50, and twice the published momentum: training takes 4000 here.
model = dict(
    backbone=dict(norm_cfg=dict(
        _delete_=True, type='BRN', norm_batch=32, warmup_iters=100, r_iters=800, d_iters=500, momentum=0.02)))
