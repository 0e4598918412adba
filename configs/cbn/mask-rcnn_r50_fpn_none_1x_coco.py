# Published row mask-r50-none-1x: box AP 37.6, mask AP 34.0.
_base_ = [
    '../_base_/models/mask-rcnn_r50_fpn_cbn.py', '../_base_/datasets/coco_instance_4img.py',
    '../_base_/schedules/cbn_1x.py', 'mmdet::_base_/default_runtime.py'
]
custom_imports = dict(imports=['mmdet_norms'], allow_failed_imports=False)
