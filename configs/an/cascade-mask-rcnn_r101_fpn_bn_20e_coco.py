# Published row cascade-mask-r101-bn: box AP 44.4, mask AP 38.2.
# Starts from torchvision's BN weights. The authors' own ImageNet weights instead:
# --cfg-options model.backbone.init_cfg.checkpoint=FILE
_base_ = [
    '../_base_/models/cascade-mask-rcnn_r50_fpn_an.py', 'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/schedules/an_20e.py', 'mmdet::_base_/default_runtime.py'
]
custom_imports = dict(imports=['mmdet_norms'], allow_failed_imports=False)
model = dict(backbone=dict(depth=101, init_cfg=dict(checkpoint='torchvision://resnet101')))
