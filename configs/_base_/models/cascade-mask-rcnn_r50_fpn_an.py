# Cascade Mask R-CNN R-50-FPN of the AN paper: mmdet's, with 2 x 2 samples per RoI bin.
_base_ = 'mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py'

_sampling = dict(roi_layer=dict(sampling_ratio=2))
model = dict(roi_head=dict(bbox_roi_extractor=_sampling, mask_roi_extractor=_sampling))
