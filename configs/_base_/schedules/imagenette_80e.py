# From scratch on 9,469 images. Ours, and never measured.
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=80, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=0, by_epoch=True, begin=5, end=80, T_max=75, convert_to_iter_based=True)
]
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=0.0005))
custom_hooks = [dict(type='NormHook')]  # in other tools too; tools/train.py adds it anyway
auto_scale_lr = dict(enable=False, base_batch_size=32)
