# Mask R-CNN of the CBN paper, without norms in FPN and heads: 2000 proposals in testing too.
_base_ = './mask-rcnn_r50_fpn_4conv1fc.py'

model = dict(test_cfg=dict(rpn=dict(nms_pre=2000, max_per_img=2000)))
