# mmdet's COCO boxes with 4 images per GPU.
_base_ = 'mmdet::_base_/datasets/coco_detection.py'

train_dataloader = dict(batch_size=4)
