# For the authors' checkpoint of this row, converted: evaluates it in the conventions of mmdet 1,
# which it was trained in (docs/legacy-geometry.md).
# tools/convert_checkpoint.py SRC DST --from aognet --config THIS && tools/test.py THIS DST --eval bbox segm
_base_ = [
    '../cascade-mask-rcnn_aognet-40m_fpn_bn_20e_coco.py', '../../_base_/models/legacy_mmdet-v1_cascade-mask-rcnn.py'
]
model = _base_.legacy_model
test_pipeline = [_base_.legacy_resize if step['type'] == 'Resize' else step for step in _base_.test_pipeline]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
