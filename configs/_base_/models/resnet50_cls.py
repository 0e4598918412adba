# ResNet-50 as an ImageNet classifier, stride in the 3x3 convolution as in torchvision.
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(
        type='ClsDataPreprocessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    # Kaiming normal, fan-out, for convolutions; the last norm of a block starts at 0.
    backbone=dict(
        type='ResNet', depth=50, num_stages=4, out_indices=(3, ), style='pytorch', frozen_stages=-1, norm_eval=False,
        zero_init_residual=True, norm_cfg=dict(type='BN', requires_grad=True)),
    head=dict(type='LinearClsHead', num_classes=1000, in_channels=2048))
