# Published row faster-r50-bnet5-3x: box AP 41.7 (the authors never released its config).
# Starts from torchvision's BN weights, as the same function. The authors' own ImageNet weights instead:
# --cfg-options model.backbone.init_cfg.checkpoint=R50_BNET-5.pth
# Its recipe is not known beyond "3x": this is 1x, three times as long, at one scale (mmdet's own 3x is multi-scale).
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['mmdet_norms'], allow_failed_imports=False)
# The line to edit for another norm (`tools/train.py CONFIG --norm NAME` edits nothing).
model = dict(backbone=dict(type='NormResNet', norm_at=dict(last=dict(type='BNET', kernel_size=5))))
train_cfg = dict(max_epochs=36)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', begin=0, end=36, by_epoch=True, milestones=[27, 33], gamma=0.1),
]
