# Imagenette with a shorter side of 160 px (imagenette2-160.tgz of https://github.com/fastai/imagenette), in data/.
dataset_type = 'ImageFolder'
data_root = 'data/imagenette2-160/'

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=160, crop_ratio_range=(0.35, 1.0)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackClsInputs')
]
# The shorter side to 160 px, which the files of this size have, and the square in the middle.
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(10**6, 160), keep_ratio=True),
    dict(type='CenterCrop', crop_size=160),
    dict(type='PackClsInputs')
]
train_dataloader = dict(
    batch_size=32,
    num_workers=4,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type=dataset_type, data_root=data_root, split='train', pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=32,
    num_workers=4,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type=dataset_type, data_root=data_root, split='val', test_mode=True, pipeline=test_pipeline))
test_dataloader = val_dataloader

val_evaluator = dict(type='Accuracy', topk=(1, 5))
test_evaluator = val_evaluator
