_base_ = [
    '../_base_/classification_runtime.py', '../_base_/models/resnet50_small_cls.py',
    '../_base_/datasets/shapes-cls.py', '../_base_/schedules/shapes-cls.py'
]
# The backbone of the detectors here. Another norm: --norm NAME.
model = dict(backbone=dict(depth=18), head=dict(in_channels=128))
