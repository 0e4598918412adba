_base_ = ['../_base_/classification_runtime.py', '../_base_/datasets/shapes-cls.py']
# For docs/norm-batch.md: `norm_batch` images of each batch of 32 are normalized together; all else stays as it is.
# ResNet-18 at a quarter of the width; about three minutes on one CPU core.
# `python tools/make_shapes.py --classification --hard` writes the data.
data_root = 'data/shapes-cls-hard/'
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(
        type='ClsDataPreprocessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(
        type='ResNet', depth=18, base_channels=16, num_stages=4, out_indices=(3, ), style='pytorch',
        frozen_stages=-1, norm_eval=False, norm_cfg=dict(type='BN', requires_grad=True, norm_batch=32)),
    head=dict(type='LinearClsHead', num_classes=6, in_channels=128))

train_dataloader = dict(
    batch_size=32, num_workers=0, persistent_workers=False, sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(data_root=data_root))
val_dataloader = dict(batch_size=100, num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root))
test_dataloader = val_dataloader

max_iters = 4000
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min=0, by_epoch=False, begin=50, end=max_iters, T_max=max_iters - 50)
]
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=10, norm_type=2))
default_hooks = dict(
    logger=dict(interval=100),
    checkpoint=dict(by_epoch=False, interval=500, max_keep_ckpts=1))
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
auto_scale_lr = dict(enable=False, base_batch_size=32)
