# mmdet's COCO boxes and masks with 4 images per GPU.
_base_ = 'mmdet::_base_/datasets/coco_instance.py'

train_dataloader = dict(batch_size=4)
