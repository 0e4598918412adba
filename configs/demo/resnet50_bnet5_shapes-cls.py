_base_ = [
    '../_base_/classification_runtime.py', '../_base_/models/resnet50_small_cls.py',
    '../_base_/datasets/shapes-cls.py', '../_base_/schedules/shapes-cls.py'
]
# As in the demo's detector, which this pretrains; or any config with `--norm NAME`.
model = dict(backbone=dict(type='NormResNet', norm_at=dict(last=dict(type='BNET', kernel_size=5))))
