# mmdet's COCO boxes and masks as an endless stream, for schedules in iterations.
_base_ = 'mmdet::_base_/datasets/coco_instance.py'

train_dataloader = dict(sampler=dict(type='InfiniteSampler'))
