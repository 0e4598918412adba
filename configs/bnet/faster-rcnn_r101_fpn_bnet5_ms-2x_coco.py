# The file the authors released for "2x", box AP 43.7, printed where faster-r101-bnet5-3x stood: short side 480-960.
# Starts from torchvision's BN weights, as the same function. The authors' own ImageNet weights instead:
# --cfg-options model.backbone.init_cfg.checkpoint=R101_BNET-5.pth
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r101_fpn_2x_coco.py'
custom_imports = dict(imports=['mmdet_norms'], allow_failed_imports=False)
# The line to edit for another norm (`tools/train.py CONFIG --norm NAME` edits nothing).
model = dict(backbone=dict(type='NormResNet', norm_at=dict(last=dict(type='BNET', kernel_size=5))))
train_pipeline = [
    dict(type='LoadImageFromFile', backend_args=None),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomResize', scale=[(1333, 480), (1333, 960)], keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
