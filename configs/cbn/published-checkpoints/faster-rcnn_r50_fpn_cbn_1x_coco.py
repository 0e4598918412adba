# For the authors' checkpoint of this row, converted: evaluates it in the conventions of mmdet 0.6,
# which it was trained in (docs/legacy-geometry.md).
# tools/convert_checkpoint.py SRC DST --from cbn --config THIS && tools/test.py THIS DST --eval bbox
_base_ = [
    '../faster-rcnn_r50_fpn_cbn_1x_coco.py', '../../_base_/models/legacy_mmdet-v1_faster-rcnn.py'
]
model = _base_.legacy_model
test_pipeline = [_base_.legacy_resize if step['type'] == 'Resize' else step for step in _base_.test_pipeline]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
