# mmdet's runtime for schedules in iterations: checkpoints and logs count them, not epochs.
_base_ = 'mmdet::_base_/default_runtime.py'

default_hooks = dict(checkpoint=dict(by_epoch=False, interval=10000))
log_processor = dict(by_epoch=False)
