# `shapes` for detectors without masks.
_base_ = './shapes.py'
train_pipeline = _base_.train_pipeline
train_pipeline[1].pop('with_mask')
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_evaluator = dict(metric='bbox')
test_evaluator = val_evaluator
