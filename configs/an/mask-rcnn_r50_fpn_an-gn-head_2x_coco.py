# Published row mask-r50-an-angn: box AP 41.6, mask AP 37.4.
_base_ = './mask-rcnn_r50_fpn_an_2x_coco.py'
# The lines to edit for other norms; the box head takes one, or one per convolution.
norm_cfg = dict(type='GN', num_groups=32, requires_grad=True)
model = dict(
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(
        bbox_head=dict(
            type='NormShared4Conv1FCBBoxHead',
            norm_cfg=[dict(type='AN', norm='GN', k=k) for k in (10, 10, 20, 20)]),
        mask_head=dict(norm_cfg=norm_cfg)))
