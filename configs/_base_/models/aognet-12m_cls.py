# AOGNet-12m as an ImageNet classifier.
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(
        type='ClsDataPreprocessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(type='AOGNet', arch='12m', norm='BN', out_indices=(3, ), frozen_stages=-1, norm_eval=False),
    head=dict(type='LinearClsHead', num_classes=1000, in_channels=824))
