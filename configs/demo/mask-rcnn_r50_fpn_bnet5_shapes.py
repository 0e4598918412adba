_base_ = [
    'mmdet::_base_/default_runtime.py', '../_base_/models/mask-rcnn_r50_fpn_small.py',
    '../_base_/datasets/shapes.py', '../_base_/schedules/demo.py'
]
# The line to edit for another norm, or run any config with `--norm NAME`.
model = dict(backbone=dict(type='NormResNet', norm_at=dict(last=dict(type='BNET', kernel_size=5))))

default_hooks = dict(logger=dict(interval=20))
