# The network of the Imagenette example; the other configs take another backbone.
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(
        type='ClsDataPreprocessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(type='XSEMiniNet', norm='bnet', act_cls='mish'),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=512,
        dropout=0.2,
        init_cfg=dict(type='Kaiming', layer='Linear', mode='fan_in')))
