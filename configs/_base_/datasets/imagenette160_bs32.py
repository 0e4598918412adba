# Imagenette with a shorter side of 160 px (imagenette2-160.tgz of https://github.com/fastai/imagenette), in data/.
_base_ = './image_folder.py'
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
    batch_size=32, num_workers=4, drop_last=True, dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=32, num_workers=4, dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader
