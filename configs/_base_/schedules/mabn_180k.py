# The MABN rows: 180k iterations on 8 GPUs x 2 images ("2x"), warm-up from a third of the learning rate; biases, those
# of norms included, learn twice as fast and do not decay. No gradient clipping.
train_cfg = dict(type='IterBasedTrainLoop', max_iters=180000, val_interval=10000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = [
    dict(type='LinearLR', start_factor=1 / 3, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', begin=0, end=180000, by_epoch=False, milestones=[120000, 160000], gamma=0.1)
]
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=0.0001),
    # By name, as the authors: mmengine's bias_lr_mult leaves out the biases of batch norms.
    paramwise_cfg=dict(custom_keys=dict(bias=dict(lr_mult=2.0, decay_mult=0.0))))
auto_scale_lr = dict(enable=False, base_batch_size=16)
custom_hooks = [dict(type='NormHook')]  # in mmdet's own tools too; tools/train.py adds it anyway
