# Published row mask-r50-bn: box AP 39.2, mask AP 35.2.
# Starts from torchvision's BN weights. The authors' own ImageNet weights instead:
# --cfg-options model.backbone.init_cfg.checkpoint=FILE
_base_ = [
    '../_base_/models/mask-rcnn_r50_fpn_4conv1fc.py', 'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/schedules/an_2x.py', 'mmdet::_base_/default_runtime.py'
]
custom_imports = dict(imports=['mmdet_norms'], allow_failed_imports=False)
