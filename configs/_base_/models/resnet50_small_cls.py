# The backbone of the demo's detector (a quarter of the width) as a classifier of small images.
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(
        type='ClsDataPreprocessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(
        type='ResNet', depth=50, base_channels=16, num_stages=4, out_indices=(0, 1, 2, 3), style='pytorch',
        frozen_stages=-1, norm_eval=False, norm_cfg=dict(type='BN', requires_grad=True)),
    head=dict(type='LinearClsHead', num_classes=6, in_channels=512))
