# Published row mask-r50-syncbn-2x-finetune: box AP 38.25, mask AP 34.22.
# Starts from mmdet's copy of the MSRA weights, whose batch norms are folded into scale and shift; the authors have
# the unfolded ones (R-50-2.pkl). Others: --cfg-options model.backbone.init_cfg.checkpoint=FILE
_base_ = './mask-rcnn_r50-scratch_fpn_syncbn-all_180k_coco.py'
model = dict(backbone=dict(init_cfg=dict(
    _delete_=True, type='Pretrained', checkpoint='open-mmlab://detectron2/resnet50_caffe')))
