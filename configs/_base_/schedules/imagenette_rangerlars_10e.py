# Ten epochs at one learning rate.
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=10, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = []
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='RangerLars', lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=1e-3))
auto_scale_lr = dict(enable=False, base_batch_size=32)
