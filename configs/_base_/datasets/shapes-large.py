# Images of 256 px of the kind, without masks, for a GPU: tools/reproduce.sh writes them.
_base_ = './shapes_detection.py'
data_root = 'data/shapes-large/'
train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[2].scale = test_pipeline[1].scale = (256, 256)
test_pipeline[2].pop('with_mask')
train_dataloader = dict(num_workers=4, dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(num_workers=4, dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/val.json')
test_evaluator = val_evaluator
