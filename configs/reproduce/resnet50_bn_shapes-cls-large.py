_base_ = [
    '../_base_/classification_runtime.py', '../_base_/models/resnet50_cls.py', '../_base_/datasets/shapes-cls.py',
    '../_base_/schedules/shapes-cls.py'
]
# The backbone of the detectors for a GPU. Another norm: --norm NAME.
data_root = 'data/shapes-cls-large/'
model = dict(head=dict(num_classes=6))

train_dataloader = dict(num_workers=4, dataset=dict(data_root=data_root))
val_dataloader = dict(num_workers=4, dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
custom_hooks = []
