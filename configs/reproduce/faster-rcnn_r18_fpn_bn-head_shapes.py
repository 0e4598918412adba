_base_ = [
    'mmdet::_base_/default_runtime.py', '../_base_/models/faster-rcnn_r18_fpn_small.py', '../_base_/datasets/shapes.py',
    '../_base_/schedules/reproduce_shapes.py'
]
# Batch norm in FPN and 4conv1fc box head, in a pretrained backbone with its statistics fixed: CBN's setting, small.
_checkpoint = 'work_dirs/reproduce/pretrain/bn-b32-s0/epoch_7.pth'
model = dict(
    backbone=dict(init_cfg=dict(_delete_=True, type='Pretrained', prefix='backbone.', checkpoint=_checkpoint)))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(128, 128), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5, direction=['horizontal', 'vertical']),
    dict(type='PackDetInputs')
]
train_dataloader = dict(batch_size=16, dataset=dict(pipeline=train_pipeline))
val_evaluator = dict(metric='bbox')
test_evaluator = val_evaluator
