_base_ = [
    'mmdet::_base_/default_runtime.py', 'mmdet::_base_/models/faster-rcnn_r50_fpn.py',
    '../_base_/datasets/shapes-large.py', '../_base_/schedules/reproduce_shapes-large.py'
]
# faster-rcnn_r18_fpn_bn-head_shapes.py at full width, for a GPU.
custom_imports = dict(imports=['mmdet_norms'], allow_failed_imports=False)
_checkpoint = 'work_dirs/reproduce-gpu/pretrain/bn-b32-s0/epoch_7.pth'
_norm = dict(type='BN', requires_grad=True)
model = dict(
    backbone=dict(init_cfg=dict(_delete_=True, type='Pretrained', prefix='backbone.', checkpoint=_checkpoint)),
    neck=dict(norm_cfg=_norm),
    roi_head=dict(bbox_head=dict(type='Shared4Conv1FCBBoxHead', num_classes=6, norm_cfg=_norm)))

train_dataloader = dict(batch_size=16)
