# MABN's recipe: 120 "epochs" of 5000 iterations of 256 images, steps after 30, 60 and 90, no warm-up.
train_cfg = dict(type='IterBasedTrainLoop', max_iters=600000, val_interval=5000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = [
    dict(type='MultiStepLR', begin=0, end=600000, by_epoch=False, milestones=[150000, 300000, 450000], gamma=0.1)
]
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=0.0001))
custom_hooks = [dict(type='NormHook')]  # in other tools too; tools/train.py adds it anyway
auto_scale_lr = dict(enable=False, base_batch_size=256)
