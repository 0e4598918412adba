# Published row mask-r50-bn-2x-scratch: box AP 32.38, mask AP 29.07 (the authors never released its config).
_base_ = [
    '../_base_/models/mask-rcnn_r50_fpn_mabn.py', '../_base_/datasets/coco_instance_infinite.py',
    '../_base_/schedules/mabn_180k.py', '../_base_/iteration_runtime.py'
]
custom_imports = dict(imports=['mmdet_norms'], allow_failed_imports=False)
