# Half of the demo's 585 iterations.
_base_ = 'demo.py'

train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=292, val_interval=73)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', eta_min=0, by_epoch=False, begin=0, end=292, T_max=292)
]
