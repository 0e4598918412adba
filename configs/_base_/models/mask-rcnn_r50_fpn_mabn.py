# Mask R-CNN of the MABN paper, from scratch: a norm (here BN) everywhere but in the RPN, nothing frozen, BGR images
# with their mean subtracted, stride in the first 1x1 convolution, and maskrcnn-benchmark's initialization.
_base_ = './mask-rcnn_r50_fpn_4conv1fc.py'

_norm_cfg = dict(type='BN')
_fan_in_uniform = dict(type='Caffe2Xavier', layer='Conv2d')  # std 1 / sqrt(fan_in)
model = dict(
    data_preprocessor=dict(mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], bgr_to_rgb=False),
    backbone=dict(
        frozen_stages=-1, norm_eval=False, style='caffe',
        norm_cfg=dict(_delete_=True, type='BN'),
        init_cfg=dict(_delete_=True, **_fan_in_uniform)),
    neck=dict(norm_cfg=_norm_cfg, init_cfg=_fan_in_uniform),
    roi_head=dict(
        bbox_head=dict(
            norm_cfg=_norm_cfg,
            init_cfg=[
                dict(type='Normal', std=0.01, layer='Conv2d'),
                dict(type='Caffe2Xavier', override=dict(name='shared_fcs')),
                dict(type='Normal', std=0.01, override=dict(name='fc_cls')),
                dict(type='Normal', std=0.001, override=dict(name='fc_reg')),
            ]),
        mask_head=dict(norm_cfg=_norm_cfg)),
    train_cfg=dict(
        rpn_proposal=dict(max_per_img=1000),  # the authors keep 2000 of a batch of two images
        rcnn=dict(assigner=dict(match_low_quality=False))))
