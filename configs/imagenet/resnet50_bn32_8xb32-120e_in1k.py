# Published row r50-bn-32: top-1 error 23.41.
_base_ = [
    '../_base_/imagenet_iteration_runtime.py', '../_base_/models/resnet50_cls.py',
    '../_base_/datasets/imagenet_mabn_bs32.py', '../_base_/schedules/imagenet_600k.py'
]
# BGR of 0 to 255 as it is.
model = dict(
    data_preprocessor=dict(_delete_=True, type='ClsDataPreprocessor'),
    backbone=dict(zero_init_residual=False),
    head=dict(label_smoothing=0.1))
