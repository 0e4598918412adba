# Published row mask-r50-mabn-2x-finetune: box AP 38.42, mask AP 34.12.
# R50-wc.pth: the authors' ImageNet weights, trained centred, without which it fails (README). Another place:
# --cfg-options model.backbone.init_cfg.checkpoint=FILE
_base_ = './mask-rcnn_r50-scratch_fpn_mabn_180k_coco.py'
model = dict(backbone=dict(init_cfg=dict(
    _delete_=True, type='Pretrained', checkpoint='pretrained/R50-wc.pth')))
