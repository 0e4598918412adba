_base_ = [
    'mmdet::_base_/default_runtime.py', 'mmdet::_base_/models/faster-rcnn_r50_fpn.py',
    '../_base_/datasets/shapes.py', '../_base_/schedules/reproduce_shapes-large.py'
]
# faster-rcnn_r18_fpn_bn-head_shapes.py at full width, for a GPU.
custom_imports = dict(imports=['mmdet_norms'], allow_failed_imports=False)
_checkpoint = 'work_dirs/reproduce-gpu/pretrain/bn-b32-s0/epoch_7.pth'
_norm = dict(type='BN', requires_grad=True)
model = dict(
    backbone=dict(init_cfg=dict(_delete_=True, type='Pretrained', prefix='backbone.', checkpoint=_checkpoint)),
    neck=dict(norm_cfg=_norm),
    roi_head=dict(bbox_head=dict(type='Shared4Conv1FCBBoxHead', num_classes=6, norm_cfg=_norm)))

data_root = 'data/shapes-large/'
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(256, 256), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5, direction=['horizontal', 'vertical']),
    dict(type='PackDetInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(256, 256), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))
]
train_dataloader = dict(
    batch_size=16, num_workers=4, dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(num_workers=4, dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/val.json', metric='bbox')
test_evaluator = val_evaluator
