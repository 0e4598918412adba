# As in MABN's ImageNet code: an endless stream, square crops, AlexNet's lighting, on pixels that stay BGR, 0 to 255.
_base_ = './imagenet_bs64.py'

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=224, aspect_ratio_range=(1, 1)),
    dict(type='Lighting', alphastd=0.1),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackClsInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(10**6, 256), keep_ratio=True),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackClsInputs')
]
train_dataloader = dict(
    batch_size=32, sampler=dict(type='InfiniteSampler'), dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=32, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
