# ImageNet-1k: data/imagenet/{train,val}/SYNSET/*.JPEG. Crops and sizes by Pillow, whose filter torchvision has too.
_base_ = './image_folder.py'
data_root = 'data/imagenet/'

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=224, backend='pillow'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackClsInputs')
]
# The shorter side to 256 px, and the square in the middle.
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(10**6, 256), keep_ratio=True, backend='pillow'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackClsInputs')
]
train_dataloader = dict(
    batch_size=64, num_workers=8, dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=64, num_workers=8, dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader
