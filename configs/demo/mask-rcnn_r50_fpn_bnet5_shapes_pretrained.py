_base_ = [
    '../_base_/iteration_runtime.py', '../_base_/models/mask-rcnn_r50_fpn_small.py', '../_base_/datasets/shapes.py',
    '../_base_/schedules/demo_half.py'
]
# The backbone of `make pretrain`. That of another norm: --norm NAME and this key by --cfg-options; None: from scratch.
model = dict(
    backbone=dict(
        type='NormResNet', norm_at=dict(last=dict(type='BNET', kernel_size=5)),
        init_cfg=dict(
            _delete_=True, type='Pretrained', checkpoint='work_dirs/pretrain/epoch_7.pth', prefix='backbone.')))

train_dataloader = dict(sampler=dict(type='InfiniteSampler'))
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=292))
