# legacy_mmdet-v1_faster-rcnn.py with masks.
_base_ = './legacy_mmdet-v1_faster-rcnn.py'

legacy_model = dict(
    roi_head=dict(
        mask_roi_extractor=_base_._roi_extractor,
        mask_head=dict(type='PlusOneFCNMaskHead', convention=_base_._convention)))
