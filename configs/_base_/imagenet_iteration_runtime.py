# For schedules in iterations: checkpoints and logs count them, not epochs.
_base_ = './imagenet_runtime.py'
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=5000))
log_processor = dict(by_epoch=False)
