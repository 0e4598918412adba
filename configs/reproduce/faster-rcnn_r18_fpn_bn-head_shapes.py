_base_ = [
    'mmdet::_base_/default_runtime.py', '../_base_/models/faster-rcnn_r18_fpn_small.py',
    '../_base_/datasets/shapes_detection.py', '../_base_/schedules/reproduce_shapes.py'
]
# Batch norm in FPN and 4conv1fc box head, in a pretrained backbone with its statistics fixed: CBN's setting, small.
_checkpoint = 'work_dirs/reproduce/pretrain/bn-b32-s0/epoch_7.pth'
model = dict(
    backbone=dict(init_cfg=dict(_delete_=True, type='Pretrained', prefix='backbone.', checkpoint=_checkpoint)))

train_dataloader = dict(batch_size=16)
