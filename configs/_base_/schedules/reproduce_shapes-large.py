# reproduce_shapes.py with twice the epochs, for a GPU: not run yet.
_base_ = './reproduce_shapes.py'
train_cfg = dict(max_epochs=12)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=250),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=12, milestones=[8, 10], gamma=0.1)
]
optim_wrapper = dict(optimizer=dict(lr=0.02))
custom_hooks = []
